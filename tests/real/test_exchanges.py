"""One order of exchanges on every rank, for each size of the last batch. NCCL hangs where there are two."""

import pytest

from tests.support.exact import Runner, exchanges


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("last", range(1, 8))
def test_ranks_begin_their_exchanges_in_one_order(world: int, last: int, runner: Runner) -> None:
    assert exchanges(runner, world=world, last=last)
