"""Runs that torchrun starts: the same wiring as Slurm's, in the same folder with the same bits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import QUICK, Experiment, Run
from tests.support.slurm import break_rank, wait_for_steps
from tests.support.waiting import wait_until

EPOCHS = 4


@pytest.fixture(scope="module")
def alone(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_experiment.train(
        *QUICK, f"trainer.max_epochs={EPOCHS}", f"paths.runs={tmp_path_factory.mktemp('alone')}"
    )


def command(experiment: Experiment, *options: str, epochs: int = EPOCHS) -> list[str]:
    train = [str(experiment.root / "train.py"), *QUICK, f"trainer.max_epochs={epochs}", "paths.runs=runs"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options, *train]


def start(
    experiment: Experiment, *options: str, epochs: int = EPOCHS, cwd: Path | None = None
) -> subprocess.Popen[str]:
    line = command(experiment, *options, epochs=epochs)
    return subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def receipt() -> dict:
    (run,) = Path("runs/digits").iterdir()
    return dict(json.loads((run / "receipt.json").read_text()))


def test_its_processes_give_the_bits_of_one(experiment: Experiment, alone: Run) -> None:
    out, err = start(experiment).communicate(timeout=300)
    assert out.split() == [f"runs/digits/{alone.folder.name}", alone.digest], err
    assert receipt()["segments"][0]["devices"] == 2


def test_a_killed_worker_is_started_again_and_goes_on(experiment: Experiment, alone: Run) -> None:
    """torchrun's own --max-restarts: it starts all workers again, with the variables of a new round."""
    process = start(experiment, "--max-restarts=1")
    wait_for_steps(Path("runs/digits"), 25)
    workers = [child for child in psutil.Process(process.pid).children() if "labtrain.launch.job" in child.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    out, err = process.communicate(timeout=300)
    assert out.split()[1:] == [alone.digest], err
    assert len(receipt()["segments"]) == 2


@pytest.mark.release
def test_sigterm_saves_and_the_same_command_goes_on(experiment: Experiment, alone: Run) -> None:
    process = start(experiment)
    wait_for_steps(Path("runs/digits"), 10)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert "stopped by SIGTERM, saved" in err
    assert process.returncode != 0
    found = receipt()
    assert (found["status"], found["segments"][0]["why"]) == ("interrupted", "SIGTERM")
    out, err = start(experiment).communicate(timeout=300)
    assert out.split()[1:] == [alone.digest], err


def test_its_workers_save_where_it_is_killed_itself(experiment: Experiment) -> None:
    process = start(experiment, epochs=40)
    wait_for_steps(Path("runs/digits"), 10)
    process.kill()
    wait_until(lambda: receipt()["status"] == "interrupted")
    assert receipt()["segments"][0]["why"] == "SIGTERM"
    process.communicate(timeout=300)


@pytest.mark.release
def test_a_worker_that_fails_is_heard_alone(own_experiment: Experiment, tmp_path: Path) -> None:
    break_rank(own_experiment, 1)
    process = start(own_experiment, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert out == ""
    assert "ArithmeticError: of rank 1" in err
    assert err.count("Traceback (most recent call last):") == 2, "its own, and torchrun's"


def test_a_sweep_in_each_worker_is_refused(experiment: Experiment) -> None:
    done = subprocess.run([*command(experiment), "-m"], capture_output=True, text=True, check=False, timeout=300)
    assert "error: each of 2 processes would run the whole sweep" in done.stderr
    assert not Path("runs").exists()
