"""A saver of small states, in a process that may end between any two changes."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labtrain.checkpoints.beside import InThread
from labtrain.checkpoints.format import load_folder
from labtrain.checkpoints.saver import Saver
from labtrain.checkpoints.writer import Writer
from labtrain.record.digests import PLACE, digest
from labtrain.stores.layout import kept, newest_whole
from labtrain.stores.store import Store

keep_two = partial(kept, last=2)


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((size,), float(step))}, "optimizer_states": [{"m": torch.ones(3) * step}]}


def resumable(step: int, **more: Any) -> dict[str, Any]:
    """Return a state that a training could go on from, with at least one of everything."""
    zero, groups = torch.zeros(()), [{"lr": 0.1, "params": [0]}]
    meta = {
        "fx": "training_step",
        "name": "loss",
        "on_step": False,
        "on_epoch": True,
        "dataloader_idx": None,
        "reduce_fx": "mean",
    }
    logged = {"key": "training_step.loss", "meta": meta, "sync": [True, True, False], "is_tensor": True, "value": zero,
              "weight": zero, "cache": None, "updates": 2, "has_reset": False}  # fmt: skip
    rank = {"logged": [logged], "metrics": {"acc": {"tp": zero, "_update_count": 2}}, "loader": None, "exhausted": True,
            "outputs": [("outputs",)], "buffers": {"b": zero}, "trainable": {"a": False}, "modes": {"": True},
            "hidden_buffers": {"h": None}, "hidden_weights": {"w": zero}, "attributes": {"": {"seen": 3}},
            "began": {"seen": "int 0"}, "gradients": {"a": zero}}  # fmt: skip
    began = {"class": "torch.optim.SGD", "groups": [{"lr": 0.1}]}
    scheduler = {
        "class": "StepLR",
        "interval": "epoch",
        "frequency": 1,
        "optimizer": 0,
        "state": {"last_epoch": 0},
        "probes": [0.1],
    }
    made = {"parameters": {"a": [2, 3]}, "buffers": {}, "optimizers": [{"class": "torch.optim.SGD", "groups": [["a"]]}]}
    place = {"epoch": 1, "batch": 0, "batches": step, "is_last_batch": False, "global_step": step, "scheduler_steps": 1,
             "batches_that_stepped": step, "callback_metrics": {"loss": zero}, "exact": True, "ranks": [rank],
             "outside": {"trainer": {"max_epochs": 3, "accumulate_grad_batches": 2}, "data": {"": {"level": 2}}}, "lost": ["x"],
             "initial": {"callbacks": {"EarlyStopping": {"patience": 3}}, "optimizers": [began], "schedulers": [scheduler]},
             "made": made}  # fmt: skip
    return {"state_dict": {"a": torch.ones(2)}, "epoch": 1, "global_step": step, "pytorch-lightning_version": "2.6.0",
            "callbacks": {"EarlyStopping": {"wait_count": 1}}, "lr_schedulers": [{"last_epoch": 1, "_last_lr": [0.1]}],
            "optimizer_states": [{"state": {0: {"momentum_buffer": zero}}, "param_groups": groups}], PLACE: place, **more}  # fmt: skip


def save(saver: Saver, step: int, size: int = 1000) -> str:
    return saver.save(state(step, size), {"run_id": "abc", "step": step, "epoch": 0, "metrics": {}, "logs": {}})


def saver_of(folder: Path, place: str | None = None, **options: Any) -> Saver:
    place = place or str(folder / "checkpoints")
    return Saver(folder, place, **{"run_id": "abc", "keep": keep_two, "spool_bytes": 1 << 40, **options})


def writer_of(saver: Saver) -> Writer:
    """Return the writer of a saver whose writer is in this process."""
    assert isinstance(saver.host, InThread)
    return saver.host.writer


class Torn(Store):
    """A store that ends the process before its so many-th change, or, of an upload, in its middle."""

    left = 0

    def _step(self, middle: Callable[[], Any] = lambda: None) -> None:
        Torn.left -= 1
        if Torn.left == 0:
            middle()
            os._exit(9)

    def create(self, path: str, data: bytes) -> None:
        self._step()
        super().create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        self._step()
        super().replace(path, data)

    def move(self, path: str, to: str) -> None:
        self._step()
        super().move(path, to)

    def put(self, local: Path, path: str, callback: Any = None) -> None:
        half, full = local.read_bytes()[: local.stat().st_size // 2], f"{self.root}/{path}"
        self._step(lambda: (self.fs.makedirs(self.fs._parent(full), exist_ok=True), self.fs.pipe_file(full, half)))
        super().put(local, path, callback)

    def remove(self, path: str) -> None:
        self._step()
        super().remove(path)


def saves_in_a_child(run_dir: Path, place: str, *, arm: Callable[[], None], remote: bool) -> list[int]:
    """Save steps 1 to 3 in a process that may end at any moment; return the steps that it reported as durable."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if remote:
                import labtrain.checkpoints.writer
                import labtrain.stores.delivery

                labtrain.checkpoints.writer.Store = labtrain.stores.delivery.Store = Torn  # type: ignore[attr-defined,misc]
            saver = saver_of(run_dir, place)
            arm()
            saver.open()
            for step in range(1, 4):
                save(saver, step)
                saver.wait()
                if writer_of(saver).delivery is not None:
                    assert writer_of(saver).delivery.wait(60)
                os.write(write, bytes([step]))
            saver.close(seconds=60, wanted=True)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    os.close(write)
    durable = list(os.read(read, 100))
    while more := os.read(read, 100):
        durable += more
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return [*durable, 0] if code == 9 else []


def judge(run_dir: Path, place: str, durable: list[int]) -> None:
    """What was reported durable is there, whole; and the next process goes on."""
    remote = Store(place)
    found = newest_whole([remote], into=run_dir / "into")
    last = max(durable)
    assert (found[0].step if found else 0) >= last
    for checkpoint in remote.checkpoints():
        folder, manifest = remote.fetch(checkpoint, run_dir / "into" / checkpoint.name)
        assert manifest["weights_digest"] == digest(state(checkpoint.step)["state_dict"])
        assert load_folder(folder)["optimizer_states"][0]["m"].tolist() == [float(checkpoint.step)] * 3
    after = saver_of(run_dir, place)
    after.open()
    save(after, 9)
    after.close(seconds=60, wanted=True)
    assert remote.checkpoints()[-1].step == 9
    assert all(left.sizes.keys() == {"manifest.json"} for left in remote.find() if not left.complete)  # it is cleaned
