"""CPU seconds of the starts: `labtrain --help`, `python train.py --help`, and `python train.py` to its first step.

Each is a fresh process on one thread, measured by the kernel (user and system time of the process and of what it waited
for), five times in turn; the median counts. Prints a table and writes results-start.json beside this file.

Run: make bench
"""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPEATS = 5
HERE = Path(__file__).resolve().parent
TARGETS = {"labtrain --help": 0.15, "python train.py --help": 1.0, "python train.py, to its first step": 4.0}


def cpu_seconds(command: list[str], folder: Path) -> tuple[float, str]:
    """Run a command in `folder`; return its CPU seconds and what it printed to standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    before = os.times()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stderr


def first_step_seconds(python: str, folder: Path) -> float:
    """Return the CPU seconds until the first optimizer step is done, as first_step.py prints them."""
    _, printed = cpu_seconds(
        [python, "train.py", "resume=never", "+callbacks.first._target_=first_step.FirstStep"], folder
    )
    match = re.search(r"first-step ([\d.]+)", printed)
    assert match is not None, printed
    return float(match.group(1))


def main() -> None:
    """Measure, print and write."""
    python, labtrain = sys.executable, str(Path(sys.executable).with_name("labtrain"))
    seconds: dict[str, list[float]] = {name: [] for name in TARGETS}
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Path(scratch) / "digits"
        subprocess.run([labtrain, "new", str(experiment)], check=True, capture_output=True)
        shutil.copy(HERE / "first_step.py", experiment)
        for _ in range(REPEATS):
            seconds["labtrain --help"].append(cpu_seconds([labtrain, "--help"], experiment)[0])
            seconds["python train.py --help"].append(cpu_seconds([python, "train.py", "--help"], experiment)[0])
            seconds["python train.py, to its first step"].append(first_step_seconds(python, experiment))
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    print(f"{'CPU seconds, median of 5':<40}{'measured':>9}{'at most':>9}")
    for name, median in medians.items():
        print(f"{name:<40}{median:>9.2f}{TARGETS[name]:>9.2f}")
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    results = {"cpu_seconds": medians, "cpu": cpu, "python": platform.python_version(), "repeats": REPEATS}
    (HERE / "results-start.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
