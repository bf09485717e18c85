"""What receipts cost: the trail in a step, a receipt at the start, runs of 10^6 steps compared, the page, the table.

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
from typing import Any, cast

import torch

from labtrain.assets import asset
from labtrain.base.contracts import Config
from labtrain.exact.checksums import two_sums
from labtrain.record import receipt
from labtrain.record.differences import compare
from labtrain.record.identity import Job
from labtrain.record.installed import files_state
from labtrain.record.provenance import code_state, environment_state, machine
from labtrain.record.trail import HISTORY, TRAIL, read_trail

ROUNDS = 15
STEPS = 1_000_000


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a call, of this process and of those it waited for."""
    before = os.times()
    work()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def measure_trail(model: torch.nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Compare the sums over a model's gradients and weights with a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    rounds: list[tuple[float, float]] = []
    for turn in range(ROUNDS + 1):
        began = time.thread_time()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        between = time.thread_time()
        two_sums(enumerate(parameter.grad for parameter in model.parameters() if parameter.grad is not None))
        gradients = time.thread_time() - between
        optimizer.step()
        stepped = time.thread_time()
        two_sums(enumerate(model.state_dict().values()))
        if turn:
            rounds.append((stepped - began - gradients, time.thread_time() - stepped + gradients))
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
    job = Job(
        run_id="", run_dir="", root=str(experiment), config=cast(Config, {}), command=[], code_digest="", lock_digest=""
    )

    def gather() -> None:
        code_state(job)
        environment_state(job)
        machine()

    return {
        "start_s": statistics.median(cpu_seconds(gather) for _ in range(ROUNDS)),
        "end_s": statistics.median(cpu_seconds(files_state) for _ in range(3)),
    }


def golden_receipt() -> receipt.Receipt:
    """Return a real receipt, of another trail than its own."""
    found = receipt.read(asset("golden/receipt.json").parent)
    assert found is not None
    found["trail"]["sha256"] = None
    return found


def measure_diff(folder: Path) -> dict[str, float]:
    """Compare two runs of 10^6 steps that part in the last quarter; read one trail."""
    draw, at = random.Random(0), STEPS * 3 // 4
    a, b = folder / "a", folder / "b"
    a.mkdir()
    b.mkdir()
    with (a / TRAIL).open("w") as one, (b / TRAIL).open("w") as other:
        for step in range(1, STEPS + 1):
            weights = f"{draw.getrandbits(128):032x}"
            line = {"step": step, "epoch": step // 1000, "loss": draw.random(), "batch": f"{draw.getrandbits(64):016x}",
                    "gradients": f"{draw.getrandbits(64):016x}"}  # fmt: skip
            one.write(json.dumps({**line, "weights": weights}) + "\n")
            other.write(json.dumps({**line, "weights": weights[::-1] if step >= at else weights}) + "\n")
    for run in (a, b):
        receipt.write(run, golden_receipt())

    def differ() -> None:
        found = compare(a, b).divergence
        assert found is not None
        assert found.step == at

    return {
        "diff_s": statistics.median(cpu_seconds(differ) for _ in range(3)),
        "read_s": statistics.median(cpu_seconds(lambda: read_trail(a)) for _ in range(3)),
    }


def measure_report(folder: Path) -> dict[str, float]:
    """Write the page of 5 runs of 10^5 steps that part at different steps, with an hour's history of three metrics."""
    steps = STEPS // 10
    runs = [folder / f"run-{number}" for number in range(5)]
    for number, run in enumerate(runs):
        run.mkdir()
        draw = random.Random(0)
        with (run / TRAIL).open("w") as trail:
            for step in range(1, steps + 1):
                if number and step == steps * number // 5:
                    draw = random.Random(number)
                weights = f"{draw.getrandbits(128):032x}"
                line = {"step": step, "epoch": step // 1000, "loss": step**-0.3 * (1 + draw.random()),
                        "batch": f"{step:016x}", "gradients": f"{step:016x}", "weights": weights}  # fmt: skip
                trail.write(json.dumps(line) + "\n")
        with (run / HISTORY).open("w") as history:
            for second in range(1, 3601):
                line = {"time": 1_800_000_000.0 + second, "step": second * steps // 3600,
                        "samples_per_s": draw.random(), "memory_bytes": draw.getrandbits(32),
                        "gpu_memory_bytes": None, "lr": [draw.random()],
                        "metrics": {name: draw.random() for name in ("train/loss", "val/loss", "val/acc")}}  # fmt: skip
                history.write(json.dumps(line) + "\n")
        receipt.write(run, golden_receipt() | {"run_id": f"{number:012x}"})
    page = folder / "report.html"

    def report() -> None:
        subprocess.run(["labtrain", "report", *runs, "-o", page], check=True, capture_output=True)

    return {
        "report_s": statistics.median(cpu_seconds(report) for _ in range(3)),
        "report_mb": page.stat().st_size / 1e6,
    }


def measure_listing(folder: Path) -> dict[str, float]:
    """List 500 runs, one in ten of them unfinished, with an hour's history each."""
    line = {"step": 1, "metrics": {"val/acc": 0.9, "val/loss": 0.1}}
    for number in range(500):
        run = folder / "runs" / "lab" / f"{number:012x}"
        run.mkdir(parents=True)
        done = number % 10 > 0
        receipt.write(run, golden_receipt() | {"status": "complete" if done else "interrupted"})
        (run / HISTORY).write_text("".join(f"{json.dumps(line | {'step': step})}\n" for step in range(3600)))

    def listed() -> None:
        subprocess.run(["labtrain", "ls", folder / "runs"], check=True, capture_output=True)

    return {"ls_s": statistics.median(cpu_seconds(listed) for _ in range(3))}


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
            **measure_report(folder),
            **measure_listing(folder),
        }
    finally:
        shutil.rmtree(folder)
    for name, text in (("transformer", "a transformer, 8 texts of 128"), ("mlp", "an MLP, a batch of 64")):
        print(f"{f'the trail, part of a step of {text}':<55}{found[name]['of_a_step']:>8.3f}   at most 0.02")
    for text, key, wanted in (
        ("a receipt at the start, seconds", "start_s", 0.3),
        ("two runs of 10^6 steps compared, seconds", "diff_s", 3.0),
        ("a trail of 10^6 steps read, seconds", "read_s", 2.0),
        ("the page of 5 runs of 10^5 steps, seconds", "report_s", 5.0),
        ("the page of 5 runs of 10^5 steps, MB", "report_mb", 8.0),
        ("labtrain ls of 500 runs, seconds", "ls_s", 0.5),
    ):
        print(f"{text:<55}{found[key]:>8.3f}   at most {wanted}")
    Path(__file__).with_name("results-receipt.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
