"""Callbacks in whole runs of an experiment."""

import signal

from tests.conftest import QUICK, Experiment
from tests.real.training.test_callbacks import LOOKING


def test_new_memory_is_filled_in_the_first_step_of_a_run_alone(own_experiment: Experiment) -> None:
    """Not of a process: code that reads what nobody has written finds the same in a training that was resumed."""
    model, folder = own_experiment.root / "model.py", own_experiment.root
    model.write_text(model.read_text() + LOOKING)
    command = (*QUICK, "trainer.max_epochs=1", "determinism.shards=1", "checkpoint.every_n_steps=3")
    own_experiment.train(*command, cwd=folder, start_new_session=True, code=-signal.SIGKILL)
    run = own_experiment.train(*command, cwd=folder)
    lines = (folder / "seen").read_text().splitlines()
    assert len(lines) == 20 + 19 - run.receipt["segments"][1]["from_step"]
    assert set(lines) == {"0 True", *(f"{step} False" for step in range(1, 20))}
