"""The demo: train one experiment in four ways and show that the weights digest is the same.

The experiment comes from the template and the data is scikit-learn's digits. Each way runs `train.py` in its own
process, and the kill is SIGKILL. `determinism.mode=portable` gives the same bits on every x86-64 CPU.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from labtrain.assets import asset
from labtrain.base.console import shown
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.programs import run_program
from labtrain.project.new import make_experiment
from labtrain.record.differences import first_difference
from labtrain.record.ranks import alone
from labtrain.record.receipt import read
from labtrain.record.trail import read_trail
from labtrain.review.report import write_report
from labtrain.review.report.data import label_of
from labtrain.review.verification import verify_run

# What MKL, oneDNN, torch, glibc and numpy would select on a CPU without AVX (2008).
OLDER_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F,-AVX,-ERMS,-FSRM",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
KILL_AT_STEP = 111  # in the middle of an epoch, which has 20 steps
TIMEOUT_S = 600
NAME = "golden"
REPORT = "report.html"
GOLDEN = asset("golden/receipt.json").parent


@dataclass(frozen=True, kw_only=True, slots=True)
class WayResult:
    """The result of one way: the run's folder, values from its receipt, and the seconds it took."""

    way: str
    run_dir: Path
    digest: str
    steps: int
    accuracy: float
    seconds: float


def run_demo(folder: Path | None = None) -> bool:
    """Train the golden run in each way, print the table, and return whether every digest is the golden one.

    Args:
        folder: keeps the experiment and its report. None: a temporary folder, removed at the end.
    """
    keep = folder is not None
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="labtrain-demo-")))
        else:
            make_empty(folder)
        experiment = folder / NAME
        make_experiment(experiment, author="labtrain demo")
        outcomes: list[WayResult] = []
        for way, train in WAYS.items():
            sys.stderr.write(f"{way} ...\n")
            started = time.monotonic()
            runs = experiment / "runs" / f"{len(outcomes) + 1}"
            train(
                [
                    sys.executable,
                    str(experiment / "train.py"),
                    "determinism.mode=portable",
                    "trainer.accelerator=cpu",
                    f"paths.runs={runs}",
                    "logger=none",
                    "trainer.enable_progress_bar=false",
                ]
            )
            outcomes.append(read_outcome(way, runs, time.monotonic() - started))
        print_table(outcomes)
        good = judge(outcomes)
        verdict = verify_run(outcomes[0].run_dir)
        print(f"trained again from the receipt: {verdict.found}")
        ways = ", ".join(f"{label_of(place)} {outcome.way}" for place, outcome in enumerate(outcomes))
        said = [f"{len(outcomes)} ways, {'one digest, the golden one' if good else 'different digests'}: {ways}."]
        write_report([outcome.run_dir for outcome in outcomes], folder / REPORT, said=said)
        if keep:
            print(f"report: {shown(folder / REPORT)}")
        return good and verdict.same is True


def as_it_is(command: list[str]) -> None:
    """Train on this CPU."""
    _train(command)


def as_an_older_cpu(command: list[str]) -> None:
    """Train with this CPU's newer instructions hidden from every library that selects code by CPU."""
    _train(command, OLDER_CPU)


def on_two_processes(command: list[str]) -> None:
    """Train in two processes, over gloo."""
    _train([*command, "trainer.devices=2"])


def killed_and_resumed(command: list[str]) -> None:
    """Kill the training with SIGKILL in the middle of an epoch, then start it again."""
    command = [*command, "checkpoint.every_n_steps=7"]
    runs = Path(next(word for word in command if word.startswith("paths.runs=")).partition("=")[2])
    child = subprocess.Popen(command, env=alone(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not any(len(read_trail(path)) >= KILL_AT_STEP for path in runs.glob("*/*")):
            if child.poll() is not None or time.monotonic() > deadline:
                raise LabtrainError(
                    "the training ended before the demo could kill it",
                    hint="labtrain demo --dir kept-demo, then look at its files",
                )
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    _train(command)


WAYS: dict[str, Callable[[list[str]], None]] = {
    "plain run": as_it_is,
    "on an older CPU (emulated)": as_an_older_cpu,
    "in 2 processes": on_two_processes,
    "killed (SIGKILL) and resumed": killed_and_resumed,
}


def read_outcome(way: str, runs: Path, seconds: float) -> WayResult:
    """Read the outcome from the one receipt below `runs`."""
    (run_dir,) = (path for path in runs.glob("*/*") if path.is_dir())
    receipt = read(run_dir)
    assert receipt is not None
    assert receipt["status"] == "complete"
    results = receipt["results"]
    return WayResult(
        way=way,
        run_dir=run_dir,
        digest=results["weights_digest"],
        steps=results["steps"],
        accuracy=results["metrics"]["test/acc"],
        seconds=seconds,
    )


def golden_digest() -> str:
    """Return the weights digest in the golden run's receipt."""
    receipt = read(GOLDEN)
    assert receipt is not None
    return str(receipt["results"]["weights_digest"])


def print_table(outcomes: list[WayResult]) -> None:
    """Print one row for each way, then the golden digest, to standard output."""
    print(f"{'way':<30}{'steps':>6}{'test acc':>10}{'seconds':>9}  weights digest")
    for outcome in outcomes:
        print(f"{outcome.way:<30}{outcome.steps:>6}{outcome.accuracy:>10.4f}{outcome.seconds:>9.1f}  {outcome.digest}")
    print(f"{'golden':<55}  {golden_digest()}")


def judge(outcomes: list[WayResult]) -> bool:
    """Print whether every digest is the golden one; if not, the first step that differs."""
    first = outcomes[0]
    for other in outcomes[1:]:
        if other.digest != first.digest:
            print(f"differs: {first.way} and {other.way}: {first_difference(first.run_dir, other.run_dir)}")
    if len({outcome.digest for outcome in outcomes}) > 1:
        return False
    if first.digest != golden_digest():
        parted = first_difference(GOLDEN, first.run_dir)
        print(f"differs: the ways give one digest, but not the golden one: {parted}")
        print("hint: labtrain doctor compares this environment with the lock")
        return False
    print(f"{len(outcomes)} ways, one digest: the golden one")
    return True


def make_empty(folder: Path) -> None:
    """Make `folder`, or empty it if it holds an earlier demo.

    Raises:
        ConfigError: it holds other files.
    """
    import shutil

    if folder.exists() and {path.name for path in folder.iterdir()} - {NAME, REPORT}:
        raise ConfigError(f"{shown(folder)} holds files that are not a demo's", hint="labtrain demo --dir NEW_FOLDER")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _train(command: list[str], variables: dict[str, str] | None = None) -> None:
    environment = alone(os.environ) | (variables or {})
    done = run_program(command, environment=environment, timeout_s=TIMEOUT_S, hint="labtrain doctor")
    if done.returncode:
        raise LabtrainError(
            f"train.py ended with exit code {done.returncode}:\n{done.stderr.strip()}", hint="labtrain doctor"
        )
