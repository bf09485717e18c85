"""Optuna's sweeps: real trials, killed in the middle, and what is refused before anything is trained."""

import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from labtrain.review.catalog.listing import is_trained
from tests.conftest import QUICK, Experiment
from tests.support.sweep import OPTUNA, SHORT, results
from tests.support.waiting import wait_until

SPACE = ("model.width=choice(2,4)", "model.learning_rate=interval(0.001,0.1)")


@pytest.mark.release
def test_a_killed_sweep_goes_on_where_it_stood_and_finds_the_same(experiment: Experiment) -> None:
    """SIGKILL in the second trial. Started again, it trains no complete trial anew, and its best is that of a sweep that
    was never killed; direction and sampler seed follow checkpoint.mode and seed. Optuna keeps it all in SQLite besides.
    """
    sweep = (*OPTUNA, *SPACE, "hydra.sweeper.n_trials=2", "trainer.max_epochs=3")
    whole = experiment.train(*sweep, "paths.runs=one")
    found = results("one")
    assert "Directions: ['maximize']" in whole.err
    trials = [line.split() for line in whole.out.splitlines()]
    assert len({folder for folder, _ in trials}) == 2

    killed = (*sweep, "paths.runs=two", "hydra.sweeper.storage=sqlite:///two/study.db")
    first, second = (Path(folder.replace("one", "two")) for folder, _ in trials)
    process = subprocess.Popen(experiment.command(*killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until((second / "trail.jsonl").exists, process=process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not is_trained(second))  # its trial saves, and ends
    before = (first / "receipt.json").read_bytes()

    again = experiment.train(*killed)
    assert [line.split() for line in again.out.splitlines()] == [[f.replace("one", "two"), d] for f, d in trials]
    assert f"{first} is complete: nothing to train" in again.err
    assert (first / "receipt.json").read_bytes() == before
    assert f"{second} resumes from step-" in again.err
    assert results("two") == found
    with sqlite3.connect("two/study.db") as study:
        assert study.execute("select count(*) from trials where state = 'COMPLETE'").fetchone() == (2,)


@pytest.mark.parametrize(
    ("overrides", "says", "hint"),
    [
        (["checkpoint.monitor=null"], "checkpoint.monitor is null", "checkpoint.monitor=val/acc"),
        (
            ["hydra.sweeper.direction=minimize"],
            "checkpoint.mode=max needs maximize",
            "hydra.sweeper.direction=maximize",
        ),
        (["hydra.sweeper.direction=maximize", "checkpoint.mode=min"], "needs minimize", "direction=minimize"),
        (["hydra.sweeper.direction=[maximize,minimize]"], "needs maximize", "or leave it out"),
        (["model.dropout=interval(0.5,0.1)"], "must be smaller than or equal to", "'interval(0.001,0.1)'"),
        (["hydra.sweeper.n_trials=many"], "could not be converted to Integer", "--cfg job"),
    ],
)
def test_what_a_sweep_cannot_use_is_refused_before_it(
    experiment: Experiment, overrides: list[str], says: str, hint: str, tmp_path: Path
) -> None:
    run = experiment.train(*OPTUNA, *SPACE, *SHORT, *overrides, code=2)
    assert says in run.err
    assert hint in run.err.partition("\n\nhint: ")[2]
    assert run.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_is_asked_for_by_hydra_mode_is_recorded_as_one(experiment: Experiment, tmp_path: Path) -> None:
    """Its command says -m, as verify looks for: composed as one run's it would be another configuration."""
    experiment.train("hydra.mode=MULTIRUN", "seed=1", "trainer.max_steps=1", "paths.runs=runs", *QUICK)
    [path] = tmp_path.glob("runs/*/*/receipt.json")
    assert json.loads(path.read_text())["command"][-1] == "-m"
