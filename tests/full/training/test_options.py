"""What the new command says is what happens: options, schedules and callbacks of a training that goes on."""

import signal
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.real.training.test_options import config, stopped, used, whole
from tests.support.exact import Runner


@pytest.mark.parametrize(
    ("kind", "before", "now"),
    [
        ("lambda", {}, {"lr": 0.01}),
        ("lambda", {}, {"warmup": 12}),
        ("cycle", {}, {"lr": 0.01}),
        ("cycle", {}, {"trainer": {"max_epochs": 5}}),
        ("epochs", {}, {"lr": 0.01}),
        ("epochs", {"kind": "none"}, {}),
        ("none", {"kind": "cycle"}, {}),
    ],
)
def test_a_changed_schedule_is_entered(runner: Runner, kind: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """From the resumed step on, each step has what it has in a training with this schedule from the beginning."""
    run_dir = stopped(runner, 7, **{"kind": kind, **before})
    wanted = whole(runner, kind=kind, **now)
    runner.run(config(kind=kind, **now, resume=run_dir))
    assert used(runner) == {step: value for step, value in wanted.items() if step > 7}
    assert "from step 7 on, lr is" in runner.said()


def test_the_patience_of_early_stopping_is_the_commands(runner: Runner) -> None:
    """Lightning's callback brings its old patience back from the checkpoint."""
    early = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 9}

    def with_patience(patience: int, resume: str = "auto") -> Any:
        found = config()
        found["callbacks"] = {"early": early | {"patience": patience}, **found["callbacks"]}
        return found | {"resume": resume}

    runner.run(with_patience(9), code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    (run_dir,) = runner.folder.glob("runs/exact/*")
    runner.run(with_patience(1, str(run_dir)))
    assert "EarlyStopping: patience is 1, and was 9" in runner.said()
    assert max(used(runner)) == 10
