"""What receipts and trails cost: the trail's part of a step, a receipt at the start, two runs of 10^6 steps compared.

CPU seconds on one thread, medians of rounds in turn; `make bench-receipt`. The models have 10 million parameters.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from labtrain import receipt
from labtrain.callbacks import checksum
from labtrain.compare import TRAIL, compare, read_trail
from labtrain.doctor.environment import files_state
from labtrain.provenance import code_state, environment_state, machine
from labtrain.run import Job

ROUNDS = 15
STEPS = 1_000_000


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a call, of this process and of those it waited for."""
    before = os.times()
    work()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def measure_trail(model: torch.nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Compare the digest of a model's weights with a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    rounds: list[tuple[float, float]] = []
    for turn in range(ROUNDS + 1):
        began = time.thread_time()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        stepped = time.thread_time()
        checksum(model.state_dict().values())
        if turn:
            rounds.append((stepped - began, time.thread_time() - stepped))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_ms": 1e3 * statistics.median(one for one, _ in rounds),
        "trail_ms": 1e3 * statistics.median(other for _, other in rounds),
        "of_a_step": statistics.median(other / one for one, other in rounds),
    }


def transformer() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(*[layer for _ in range(10) for layer in (torch.nn.Linear(1000, 1000), torch.nn.ReLU())])


def measure_start(folder: Path) -> dict[str, float]:
    """Return the CPU seconds of what a receipt gathers, in a repository with a change; data is hashed beside it."""
    experiment = folder / "experiment"
    subprocess.run(["labtrain", "new", experiment], check=True, capture_output=True)
    for arguments in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", "-C", experiment, *arguments], check=True)
    (experiment / "more.py").write_text("x = 1\n")
    job = Job(run_id="", run_dir="", root=str(experiment), config={}, command=[], code_digest="", lock_digest="")

    def gather() -> None:
        code_state(job)
        environment_state(job)
        machine()

    return {
        "start_s": statistics.median(cpu_seconds(gather) for _ in range(ROUNDS)),
        "end_s": statistics.median(cpu_seconds(files_state) for _ in range(3)),
    }


def measure_diff(folder: Path) -> dict[str, float]:
    """Compare two runs of 10^6 steps that part in the last quarter; read one trail."""
    draw, at = random.Random(0), STEPS * 3 // 4
    a, b = folder / "a", folder / "b"
    a.mkdir()
    b.mkdir()
    with (a / TRAIL).open("w") as one, (b / TRAIL).open("w") as other:
        for step in range(1, STEPS + 1):
            weights = f"{draw.getrandbits(128):032x}"
            line = {"step": step, "epoch": step // 1000, "loss": draw.random(), "batch": f"{draw.getrandbits(64):016x}"}
            one.write(json.dumps({**line, "weights": weights}) + "\n")
            other.write(json.dumps({**line, "weights": weights[::-1] if step >= at else weights}) + "\n")
    written = {
        **{key: {} for key in receipt.KEYS},
        "schema": receipt.SCHEMA,
        "status": "complete",
        "determinism": {"mode": "strict"},
        "config": {"determinism": {"shards": 4}, "trainer": {"strategy": "auto", "accelerator": "auto"}},
        "trail": {"sha256": None},
    }
    for run in (a, b):
        receipt.write(run, dict(written))

    def differ() -> None:
        found = compare(a, b).divergence
        assert found is not None
        assert found.step == at

    return {
        "diff_s": statistics.median(cpu_seconds(differ) for _ in range(3)),
        "read_s": statistics.median(cpu_seconds(lambda: read_trail(a)) for _ in range(3)),
    }


def main() -> None:
    """Print the table and write it beside this file."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="labtrain-bench-"))
    try:
        found: dict[str, Any] = {
            "transformer": measure_trail(transformer(), torch.randn(8, 128, 384)),
            "mlp": measure_trail(mlp(), torch.randn(64, 1000)),
            **measure_start(folder),
            **measure_diff(folder),
        }
    finally:
        shutil.rmtree(folder)
    for name, text in (("transformer", "a transformer, 8 texts of 128"), ("mlp", "an MLP, a batch of 64")):
        print(f"{f'the trail, part of a step of {text}':<55}{found[name]['of_a_step']:>8.3f}   at most 0.02")
    for text, key, wanted in (
        ("a receipt at the start, seconds", "start_s", 0.3),
        ("two runs of 10^6 steps compared, seconds", "diff_s", 3.0),
        ("a trail of 10^6 steps read, seconds", "read_s", 2.0),
    ):
        print(f"{text:<55}{found[key]:>8.3f}   at most {wanted}")
    Path(__file__).with_name("results-receipt.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
