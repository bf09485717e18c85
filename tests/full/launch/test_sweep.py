"""Optuna's sweeps: more of tests/real/launch/test_sweep.py."""

from tests.conftest import Experiment
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
