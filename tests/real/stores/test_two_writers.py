"""Two processes that train one run: one is stopped by SIGSTOP, the other takes over; then it wakes up."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from labtrain.stores.store import Store
from tests.conftest import QUICK, Experiment
from tests.support.waiting import wait_until
from tests.support.writers import Stopped, walk, whole


@pytest.mark.parametrize("url", ["local", "sftp", "s3"], indirect=True)
def test_a_process_that_wakes_up_too_late_harms_nothing(url: str, tmp_path: Path) -> None:
    """Stopped at every fourth of its changes; tests/full stops it at each."""
    tries = walk(tmp_path, lambda number: f"{url}/{number}", ends=True, kind=Stopped, numbers=range(2, 100, 4))
    assert tries > 3


def test_a_training_that_wakes_up_stops(experiment: Experiment, tmp_path: Path) -> None:
    """With exit code 2; what the other has trained to its end is whole, and all that is there."""
    place = tmp_path / "store"
    words = [*QUICK, "trainer.max_epochs=5", "checkpoint.every_n_steps=10", "checkpoint.keep_last=1",
             f"checkpoint.url={place}"]  # fmt: skip
    command = experiment.command(*words, "paths.runs=a")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as first:
        wait_until(lambda: list(place.glob("*/step-*/manifest.json")), process=first)  # type: ignore[arg-type]
        os.killpg(first.pid, signal.SIGSTOP)
        other = experiment.train(*words, "paths.runs=b")
        (run,) = place.iterdir()
        there = whole(Store(run))
        os.killpg(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 2
    assert "another process has taken over" in said
    assert "Traceback" not in said
    assert whole(Store(run)) == there
    assert other.folder.name == run.name
    assert [path.name for path in run.iterdir()] == list(there)
