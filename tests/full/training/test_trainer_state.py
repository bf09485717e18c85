"""What code changes outside of the model is kept by a checkpoint, or said when one is saved."""

import signal
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.real.training.test_trainer_state import _made, config
from tests.support.exact import Runner, outcome


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"max_epochs": 4, "check_val_every_n_epoch": 2},
    ],
)
def test_settings_of_the_trainer_are_kept(runner: Runner, settings: dict[str, Any]) -> None:
    """Changed in a hook at step 3: a run that was stopped later ends as one that was not."""
    options = config("Sets", settings=settings)
    whole = outcome(Runner(_made(runner, "whole")).run(options))
    runner.run(options, code=EXIT_STOPPED, signal_at=f"6 {signal.SIGTERM} 0")
    assert outcome(runner.run(options)) == whole


def test_an_optimizer_inside_of_an_optimizer_is_kept(runner: Runner) -> None:
    """Though the outer one's state_dict does not hold the inner one's state."""
    options = config("Optimized", optimizer="Wraps")
    whole = outcome(Runner(_made(runner, "whole")).run(options))
    runner.run(options, code=EXIT_STOPPED, signal_at=f"3 {signal.SIGTERM} 0")
    assert outcome(runner.run(options)) == whole
