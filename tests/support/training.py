"""Runs of a generated experiment by its train.py, of four epochs, ways to end them, and what they are compared with."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from labtrain.record.trail import read_trail
from labtrain.stores.layout import list_checkpoints
from tests.conftest import QUICK, Experiment, Run
from tests.support.waiting import wait_until

SHORT = (*QUICK, "paths.runs=runs", "trainer.max_epochs=4", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def reference(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four epochs, uninterrupted."""
    runs = tmp_path_factory.mktemp("reference")
    return shared_experiment.train(*SHORT, f"paths.runs={runs}")


def folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.glob("*/*") if path.is_dir())


def same(run: Run, reference: Run) -> None:
    """The same weights, the same whole training state, the same trail."""
    assert run.digest == reference.digest
    assert run.receipt["results"]["state_digest"] == reference.receipt["results"]["state_digest"]
    assert run.receipt["results"]["metrics"] == reference.receipt["results"]["metrics"]
    assert run.trail() == reference.trail()


def kill_when(
    experiment: Experiment, *overrides: str, checkpoints: int, number: int = signal.SIGKILL, group: bool = False
) -> int:
    """Start train.py, send it a signal once it has that many checkpoints, and return its exit code."""
    child = subprocess.Popen(
        experiment.command(*overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    written = lambda: sum(len(list_checkpoints(run / "checkpoints")) for run in folders(Path("runs")))  # noqa: E731
    wait_until(lambda: written() >= checkpoints, process=child)
    os.killpg(child.pid, number) if group else child.send_signal(number)
    return child.wait(timeout=300)


def wait_for_step(step: int) -> None:
    """Wait until the one run below runs/ has trained so far."""
    wait_until(lambda: any(len(read_trail(folder)) >= step for folder in folders(Path("runs"))))


def kill_and_go_on(experiment: Experiment, reference: Run, *, checkpoints: int) -> None:
    """Kill a run once it has that many checkpoints, give the same command, and compare with the reference."""
    assert kill_when(experiment, *SHORT, checkpoints=checkpoints) == -signal.SIGKILL
    (folder,) = folders(Path("runs"))
    assert json.loads((folder / "receipt.json").read_text())["status"] == "running"
    run = experiment.train(*SHORT)
    assert "resumes from step-" in run.err
    assert len(run.receipt["segments"]) == 2
    same(run, reference)


def stop_and_go_on(experiment: Experiment, reference: Run, number: int) -> None:
    """Send a run a signal, read of it in the receipt, give the same command, and compare with the reference."""
    assert kill_when(experiment, *SHORT, checkpoints=2, number=number, group=number == signal.SIGINT) == 75
    (folder,) = folders(Path("runs"))
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["status"] == receipt["segments"][0]["status"] == "interrupted"
    same(experiment.train(*SHORT), reference)
