"""CPU seconds of the starts: `labtrain --help`, `python train.py --help`, a wrong key, and to the first optimizer step.

Each is a fresh process on one thread, measured by the kernel (user and system time of the process and of what it waited
for), five times in turn; the median counts. Prints a table and writes results-start.json beside this file.

Beside them the imports that every training needs, in the same turns: what a start costs beyond them is labtrain's, and
the experiment's. They are read as the first step is, before the process ends, and like it without looking for garbage;
FLOOR's first line is what they cost as Python imports them by itself.

Run: make bench
"""

import compileall
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

import labtrain
from labtrain.record.provenance import machine

REPEATS = 5
HERE = Path(__file__).resolve().parent
FIRST_STEP = "python train.py, to its first step"
TARGETS = {
    "labtrain --help": 0.15,
    "python train.py --help": 0.8,
    "python train.py, with a wrong key": 0.5,
    FIRST_STEP: 3.0,
}
PRINT = "import os, time; print(time.process_time(), flush=True); os._exit(0)"  # as first_step.py ends
FLOOR = {
    "import torch, lightning.pytorch": f"import torch, lightning.pytorch; {PRINT}",
    "the same, gc.disable() first": f"import gc; gc.disable(); import torch, lightning.pytorch; {PRINT}",
    "and sklearn.datasets, of the template": (
        f"import gc; gc.disable(); import torch, lightning.pytorch, sklearn.datasets; {PRINT}"
    ),
}


def cpu_seconds(command: list[str], folder: Path, *, code: int = 0) -> tuple[float, str]:
    """Run a command in `folder` that ends with `code`; return its CPU seconds and what it printed to standard error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    before = os.times()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == code, done.stderr
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stderr


def first_step_seconds(python: str, folder: Path) -> float:
    """Return the CPU seconds until the first optimizer step is done, as first_step.py prints them."""
    _, printed = cpu_seconds(
        [python, "train.py", "resume=never", "+callbacks.first._target_=first_step.FirstStep"], folder
    )
    match = re.search(r"first-step ([\d.]+)", printed)
    assert match is not None, printed
    return float(match.group(1))


def floor_seconds(python: str, code: str) -> float:
    """Return the CPU seconds that a process prints which does nothing but import."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure, print and write."""
    python, command = sys.executable, str(Path(sys.executable).with_name("labtrain"))
    # What was changed since `make setup`: PYTHONDONTWRITEBYTECODE, where it is set, would have each start compile it.
    compileall.compile_dir(Path(labtrain.__file__).parent, quiet=2)
    seconds: dict[str, list[float]] = {name: [] for name in (*TARGETS, *FLOOR)}
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Path(scratch) / "digits"
        subprocess.run([command, "new", str(experiment)], check=True, capture_output=True)
        shutil.copy(HERE / "first_step.py", experiment)
        for _ in range(REPEATS):
            seconds["labtrain --help"].append(cpu_seconds([command, "--help"], experiment)[0])
            seconds["python train.py --help"].append(cpu_seconds([python, "train.py", "--help"], experiment)[0])
            wrong = cpu_seconds([python, "train.py", "no_such_key=1"], experiment, code=2)
            seconds["python train.py, with a wrong key"].append(wrong[0])
            seconds[FIRST_STEP].append(first_step_seconds(python, experiment))
            for name, code in FLOOR.items():
                seconds[name].append(floor_seconds(python, code))
    medians = {name: round(statistics.median(values), 2) for name, values in seconds.items()}
    print(f"{'CPU seconds, median of 5':<40}{'measured':>9}{'at most':>9}")
    for name, median in medians.items():
        print(f"{name:<40}{median:>9.2f}" + (f"{TARGETS[name]:>9.2f}" if name in TARGETS else ""))
    results = {
        "cpu_seconds": {name: medians[name] for name in TARGETS},
        "floor": {name: medians[name] for name in FLOOR},
        "at_most": TARGETS,
        "cpu": machine()["cpu"],
        "python": platform.python_version(),
        "repeats": REPEATS,
    }
    (HERE / "results-start.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
