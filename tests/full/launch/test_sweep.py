"""Optuna's sweeps: more of tests/real/launch/test_sweep.py."""

from pathlib import Path

from tests.conftest import QUICK, Experiment
from tests.support.sweep import OPTUNA, SHORT, results


def test_trials_that_fail_end_the_sweep_unless_it_may_lose_them(experiment: Experiment) -> None:
    """A loss that is no number is a failed trial too; its run is complete, and stays. A metric that no run logs is none."""
    sweep = (
        *OPTUNA,
        *SHORT,
        "hydra.sweeper.n_trials=2",
        "checkpoint.monitor=val/loss",
        "checkpoint.mode=min",
        "seed=0",
    )
    space = "model.learning_rate=choice(0.01,1e30)"
    lossy = experiment.train(*sweep, space, "hydra.sweeper.max_failure_rate=0.5")
    assert "ended with val/loss nan" in lossy.err
    assert results("runs")["best_params"] == {"model.learning_rate": 0.01}
    strict = experiment.train(*sweep, space, code=1)
    assert "hydra.sweeper.max_failure_rate=0.5 continues" in strict.err
    assert strict.err.count("is complete: nothing to train") == 2
    typo = experiment.train(*sweep, space, "checkpoint.monitor=val/typo", code=2)
    assert (
        "logged no such metric\n\nhint: one of these: test/acc, test/loss, train/acc, train/loss, val/acc" in typo.err
    )
    assert typo.err.count("is complete: nothing to train") == 1  # at the first trial
    none = experiment.train(
        *sweep, "model.dropout=choice(7)", "hydra.sweeper.n_trials=1", "hydra.sweeper.max_failure_rate=1", code=1
    )
    assert "error: every trial of this sweep failed" in none.err


def test_runs_side_by_side_are_those_of_one_after_the_other(experiment: Experiment, tmp_path: Path) -> None:
    """The same folders and digests; each line says which run it is of, and a table of the runs comes last."""
    sweep = ("-m", "seed=1,2", "model.width=2,4", "trainer.max_steps=3", *QUICK)
    first = experiment.train(*sweep, "paths.runs=runs")
    (tmp_path / "runs").rename(tmp_path / "before")
    second = experiment.train(*sweep, "paths.runs=runs", "hydra/launcher=parallel", "hydra.launcher.jobs=2")
    assert sorted(second.out.splitlines()) == sorted(first.out.splitlines())
    assert {line.split()[0] for line in second.err.splitlines() if line.startswith("#")} >= {"#0", "#1", "#2", "#3"}
    for run in (first, second):
        table = run.err.splitlines()[-4:]
        assert sorted(line.split()[0] for line in table) == sorted(
            Path(line.split()[0]).name for line in run.out.splitlines()
        )
