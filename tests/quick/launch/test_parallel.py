"""Runs of a sweep side by side: GPUs are shared out, results come in order, and a signal or an error stops the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import ConfigError
from labtrain.launch.parallel import SweepJob, gpus_of, run_all
from tests.conftest import ROOT
from tests.support.waiting import wait_until


def occupying(folder: Path, number: int) -> Any:
    """Hold each of its GPUs while another job waits for one; fail if another job holds it."""
    mine = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    for gpu in mine:
        (folder / gpu).mkdir()  # fails if it exists
    time.sleep(0.2)  # fixed: long enough that jobs which share a GPU meet
    for gpu in mine:
        (folder / gpu).rmdir()
    return number, len(mine)


def test_each_job_has_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that need one, two or three of four GPUs; no GPU is held twice at once."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,6,9")
    needs = [1, 2, 3, 1, 1, 2, 3, 1]
    jobs = [SweepJob(number=number, said="", gpus=gpus, run=lambda n=number: occupying(tmp_path, n))
            for number, gpus in enumerate(needs)]  # fmt: skip
    found: list[Any] = run_all(jobs, most=None)
    assert found == list(enumerate(needs))


def test_a_job_that_ends_its_process_stops_the_sweep(tmp_path: Path) -> None:
    """The job that runs beside it comes to its end; the third never starts; the exit code is the job's own."""

    def run(number: int) -> Any:
        if number == 0:
            sys.exit(2)
        time.sleep(0.5)  # fixed: longer than the first job lives
        (tmp_path / str(number)).touch()
        return number

    jobs = [SweepJob(number=number, said="", gpus=0, run=lambda n=number: run(n)) for number in range(3)]
    with pytest.raises(SystemExit) as ended:
        run_all(jobs, most=2)
    assert ended.value.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


PROGRAM = """
import signal, sys, time
from labtrain.launch.parallel import SweepJob, run_all
from labtrain.base.signals import unblock
def run(number):
    def stop(*_):
        open(f"stopped-{number}", "w").close()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    unblock()
    open(f"begun-{number}", "w").close()
    time.sleep(600)  # fixed: until the signal
run_all([SweepJob(number=n, said="", gpus=0, run=lambda n=n: run(n)) for n in range(3)], most=2)
"""


def test_a_signal_reaches_the_running_jobs_and_starts_no_other(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    wait_until(lambda: all((tmp_path / f"begun-{number}").exists() for number in (0, 1)), process=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun-0", "begun-1", "stopped-0", "stopped-1"]


@pytest.mark.parametrize(
    ("accelerator", "devices", "there", "needed"),
    [
        ("cpu", 4, 4, 0),
        ("auto", 2, 0, 0),
        ("auto", 2, 4, 2),
        ("gpu", "auto", 4, 4),
        ("gpu", -1, 3, 3),
        ("gpu", "2", 4, 2),
    ],
)
def test_how_many_gpus_a_job_needs(accelerator: str, devices: object, there: int, needed: int) -> None:
    assert gpus_of(accelerator, devices, there) == needed


@pytest.mark.parametrize(
    ("devices", "says"), [([0, 1], "chooses the GPUs"), ("0,1", "chooses the GPUs"), (5, "has 4 GPUs")]
)
def test_gpus_that_a_job_cannot_have(devices: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        gpus_of("gpu", devices, 4)
