"""A training's process that saves a state of 80 MB, and kills itself, or the process that writes it.

`python -m tests.support.beside WHOM FOLDER` prints the writer's process id, and the weights digest of what it saved.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from labtrain.checkpoints.beside import InProcess, fork
from labtrain.record.digests import digest
from tests.support.saver import saver_of, state

SIZE = 10_000_000


def mixed(step: int) -> dict[str, object]:
    """Return a state with tensors of many kinds."""
    whole = state(step, SIZE)
    whole["kinds"] = {
        "sparse": torch.eye(4).to_sparse(),
        "bf16": torch.ones(3, dtype=torch.bfloat16) * step,
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(step),
        "last": torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "flags": torch.tensor([True, False]),
        "complex": torch.view_as_complex(torch.ones(2, 2)),
    }
    return whole


def main(whom: str, folder: Path) -> None:
    """Save steps 1 and 2, and kill while 2 is written; then, if this process lives, save 3."""
    fork()
    saver = saver_of(folder)
    assert isinstance(saver.host, InProcess)
    writer = saver.host.pid
    saver.open()
    for step in (1, 2, 3):
        saved = mixed(step)
        saver.save(saved, {"run_id": "abc", "step": step, "epoch": 0, "metrics": {}, "logs": {}})
        for tensor in (saved["state_dict"]["w"], saved["optimizer_states"][0]["m"]):  # type: ignore[index]
            tensor.add_(0.5)  # the next step
        print(writer, digest(mixed(step)["state_dict"]), flush=True)  # type: ignore[arg-type]
        if step == 2 and whom != "nobody":
            assert saver.busy
            os.kill(os.getpid() if whom == "trainer" else writer, signal.SIGKILL)
        saver.wait()
    saver.close(seconds=0, wanted=True)
    saver.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
