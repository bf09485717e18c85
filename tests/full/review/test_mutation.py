"""What somebody else may have written, damaged at random: 10,000 times, and read by everything that reads it."""

import pytest

from tests.quick.review.test_mutation import world  # noqa: F401
from tests.support.mutation import World, judge

MUTATIONS = 2500


@pytest.mark.parametrize("part", range(4))
def test_a_damaged_run_harms_nobody(world: World, part: int) -> None:  # noqa: F811
    """Each of 10,000 damages is told in one error: nothing else is written, nothing is run, nothing hangs."""
    seeds = range(1_000_000 + part * MUTATIONS, 1_000_000 + (part + 1) * MUTATIONS)
    wrong = [text for seed in seeds for text in judge(world, seed, quick=8, slow=0.03)]
    assert not wrong, f"{len(wrong)} of {MUTATIONS}\n" + "\n\n".join(wrong[:20])
