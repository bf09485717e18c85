"""Keys of `trainer` and callbacks of Lightning's: they do what Lightning says, or are refused in words."""

import shutil
import signal

from labtrain.base.errors import EXIT_STOPPED
from tests.real.training.test_trainer_keys import across_epochs, validated_at
from tests.support.exact import Runner, outcome


def test_validation_across_epochs_is_the_same_when_killed(runner: Runner, other: Runner) -> None:
    """Stopped before, at and after a validation, and moved to two devices: the same bits and metrics."""
    whole = outcome(runner.run(across_epochs()))
    for stop in (6, 7, 15):
        other.run(across_epochs(), code=EXIT_STOPPED, signal_at=f"{stop} {int(signal.SIGTERM)} 0")
        (left,) = (path for path in other.folder.glob("runs/*/*") if (path / "checkpoints").exists())
        run_dir = other.run(across_epochs(), world=2)
        assert outcome(run_dir) == whole
        assert validated_at(run_dir) == [7, 14, 21]
        shutil.rmtree(left)
