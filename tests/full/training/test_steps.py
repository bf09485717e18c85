"""Steps that do more than compute a loss: more of tests/quick/training/test_steps.py, each a training or several."""

import pytest

from tests.support.exact import Runner, exchanges
from tests.support.steps import model, one_and_two


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("last", range(2, 8))
def test_ranks_begin_their_exchanges_in_one_order(world: int, last: int, runner: Runner) -> None:
    """NCCL hangs where there are two; for each size of the last batch."""
    assert exchanges(runner, world=world, last=last)


@pytest.mark.parametrize("size", [35, 36, 38, 39])
def test_a_smaller_last_batch_trains_with_batchnorm(size: int, runner: Runner, other: Runner) -> None:
    one_and_two(runner, other, model("Normed", data={"size": size, "batch_size": 8}))
