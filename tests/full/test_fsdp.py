"""A state that is spread over the ranks: more of tests/real/test_fsdp.py."""

import random

from tests.real.test_fsdp import fsdp
from tests.support.exact import Runner, outcome


def test_killed_in_saves(runner: Runner) -> None:
    """SIGKILL of either rank at a seeded random moment of a save, a dozen times in one run."""
    config = fsdp("gpt", trainer={"max_epochs": 12}, checkpoint={"every_n_steps": 1})
    reference = Runner(runner.folder / "reference")
    reference.folder.mkdir()
    whole = outcome(reference.run(config, world=2))
    draw = random.Random(0)
    for _ in range(12):
        moment = f"{draw.randint(2, 4)} {draw.uniform(0, 0.05)} {draw.randrange(2)}"
        assert runner.run(config, world=2, code=None, environment={"KILL_IN_SAVE": moment}) is None
    assert outcome(runner.run(config, world=2)) == whole
