"""A state that is spread over the ranks: more of tests/real/training/test_fsdp.py."""

import random

import pytest

from tests.real.training.test_fsdp import fsdp, full_disk, same_bits
from tests.support.exact import Runner, outcome


@pytest.mark.parametrize(
    ("model", "shape", "world", "story"), [("cnn", "even", 2, "killed twice"), ("gpt", "clipped", 3, "terminated")]
)
def test_a_run_goes_on_with_the_same_bits(runner: Runner, model: str, shape: str, world: int, story: str) -> None:
    same_bits(runner, model, shape, world, story)


def test_a_full_disk_while_the_sums_are_taken_ends_all(runner: Runner) -> None:
    full_disk(runner, "file_sha256")


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
