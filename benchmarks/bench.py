"""What labtrain costs: its steps, epochs, starts and memory beside what people write without it.

Each side is a process of its own on one thread, measured by the kernel and by common.Clock in CPU time; the sides take
turns, every other round from the last to the first, and the median of the rounds and of each round's ratio count.
Prints a table; writes results.json beside this file and docs/why/benchmarks.svg.

Run: make bench
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import start

from labtrain.record.provenance import machine

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "fashion"))
from common import EPOCH, source  # noqa: E402

ROUNDS = 5
SLOW_STEPS = 100  # of the networks whose step takes 50 ms
ROWS = (10**4, 10**6, 10**8, 10**9)

Measures = dict[str, float]


def sides(scratch: Path) -> dict[str, list[str]]:
    """Return the command of each side, by its name."""
    python = sys.executable

    def baseline(name: str, network: str = "mlp", steps: int = EPOCH) -> list[str]:
        return [python, "baselines.py", name, network, str(steps)]

    def ours(*overrides: str, clock: str = "{_target_:model.StepClock}") -> list[str]:
        clocked = [f"+callbacks.clock={clock}", "trainer.max_epochs=2", "trainer.limit_val_batches=0"] if clock else []
        return [python, "train.py", "resume=never", f"paths.runs={scratch}", *clocked, *overrides]

    slow = f"{{_target_:model.StepClock,steps:{SLOW_STEPS}}}"
    return {
        "bare": baseline("bare"),
        "per-sample": baseline("per-sample"),
        "slices": baseline("slices"),
        "lightning": baseline("lightning"),
        "labtrain": ours("determinism.shards=1"),
        "labtrain, 4 shards": ours(),
        "labtrain, off": ours("determinism.shards=1", "determinism.mode=off"),
        "bare, conv": baseline("bare", "conv", SLOW_STEPS),
        "labtrain, conv": ours("determinism.shards=1", "model.network=conv", clock=slow),
        "labtrain, conv, off": ours("determinism.shards=1", "model.network=conv", "determinism.mode=off", clock=slow),
        "bare, wide": baseline("bare", "wide", SLOW_STEPS),
        "labtrain, wide": ours("determinism.shards=1", "model.network=wide", clock=slow),
        "lightning, epoch": baseline("lightning-epoch"),
        "labtrain, epoch": ours("determinism.shards=1", clock=""),
        **{
            f"labtrain, {rows:.0e} rows": ours("determinism.shards=1", "data._target_=model.GrowingData",
                                                f"+data.rows={rows}", f"+data.folder={scratch.parent}",
                                                "model.network=rows", "trainer.max_epochs=-1")
            for rows in ROWS
        },
    }  # fmt: skip


def measure(command: list[str], folder: Path) -> Measures:
    """Run a command; return its CPU seconds, its largest memory in MiB, and what it printed of its steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": "."}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{printed[-3000:]}")
    found: Measures = {"seconds": usage.ru_utime + usage.ru_stime, "mebibytes": usage.ru_maxrss / 1024}
    for line in printed.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


# measure, side, the side that it is held against, what is compared, at most
TARGETS = [
    ("step, strict, shards=1, with metrics, TensorBoard, trail, checkpoints", "labtrain", "bare", "milliseconds", 1.6),
    ("the same at 50 ms a step, 23 thousand weights", "labtrain, conv", "bare, conv", "milliseconds", 1.03),
    ("the same at 50 ms a step, 5 million weights", "labtrain, wide", "bare, wide", "milliseconds", 1.03),
    ("step, against a loop over single samples", "labtrain", "per-sample", "milliseconds", 0.4),
    ("step, strict against off", "labtrain", "labtrain, off", "milliseconds", 1.05),
    ("the same of convolutions", "labtrain, conv", "labtrain, conv, off", "milliseconds", 1.05),
    ("one epoch, whole process, against Lightning", "labtrain, epoch", "lightning, epoch", "seconds", 0.35),
    ("memory of it", "labtrain, epoch", "lightning, epoch", "mebibytes", 1.2),
    *(
        (f"step, {rows:.0e} rows against {ROWS[0]:.0e}", f"labtrain, {rows:.0e} rows", f"labtrain, {ROWS[0]:.0e} rows",
         "milliseconds", 1.1)
        for rows in ROWS[1:]
    ),
]  # fmt: skip


PLOTTED = {
    "bare": "bare loop over slices, no log, no checkpoint",
    "slices": "Lightning over slices, no progress bar",
    "labtrain": "labtrain, strict, everything on",
    "per-sample": "bare loop over single samples",
    "lightning": "Lightning over single samples",
}


def main() -> None:
    """Measure the starts, and then the rest; print and write."""
    rounds: list[dict[str, Measures]] = []
    start.main()  # it compiles labtrain first
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        folder = Path(scratch) / "fashion"
        shutil.copytree(HERE / "fashion", folder, ignore=shutil.ignore_patterns("__pycache__", "lightning_logs"))
        for number in range(ROUNDS):
            rounds.append({})
            turns = list(sides(Path(scratch) / "runs").items())
            for name, command in turns[:: -1 if number % 2 else 1]:
                rounds[-1][name] = measure(command, folder)
                sys.stderr.write(f"round {number + 1} of {ROUNDS}: {name}\n")
    medians = {
        name: {key: round(statistics.median(each[name][key] for each in rounds), 3) for key in rounds[0][name]}
        for name in rounds[0]
    }
    ratios = {
        text: round(statistics.median(each[side][key] / each[other][key] for each in rounds), 3)
        for text, side, other, key, _ in TARGETS
    }
    print(f"{f'CPU time on one thread, median of {ROUNDS} rounds':<64}{'ratio':>8}{'at most':>9}")
    for text, *_, at_most in TARGETS:
        print(f"{text:<64}{ratios[text]:>8.3f}{at_most:>9.2f}")
    print(f"\n{'':<32}{'ms a step':>12}{'in the kernel':>15}{'s in all':>12}{'MiB':>8}")
    for name, found in medians.items():
        step, kernel = (f"{found[key]:.2f}" if key in found else "" for key in ("milliseconds", "kernel_milliseconds"))
        print(f"{name:<32}{step:>12}{kernel:>15}{found['seconds']:>12.2f}{found['mebibytes']:>8.0f}")
    results = {
        "ratios": {text: {"measured": ratios[text], "at_most": at_most} for text, *_, at_most in TARGETS},
        "medians": medians,
        "data": source(),
        "cpu": machine()["cpu"],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "lightning")},
        "rounds": ROUNDS,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot({name: found["milliseconds"] for name, found in medians.items() if name in PLOTTED})


def plot(milliseconds: Measures) -> None:
    """Draw bars of what a step costs on each side into docs/why/benchmarks.svg."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "labtrain"  # the same file for the same figures
    import matplotlib.pyplot as plt

    names = sorted(milliseconds, key=milliseconds.__getitem__, reverse=True)
    figure, axes = plt.subplots(figsize=(7, 2.4))
    bars = axes.barh(
        [PLOTTED[name] for name in names],
        [milliseconds[name] for name in names],
        color=["#c2571a" if name.startswith("labtrain") else "#9aa5b1" for name in names],
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("CPU milliseconds a step, one thread")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs/why/benchmarks.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
