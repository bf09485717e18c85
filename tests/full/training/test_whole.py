"""Steps over the whole batch in their other forms."""

import pytest

from tests.support.exact import Runner
from tests.support.own_code import (
    WHOLE,
    WHOLE_IN_CI,
    is_exact_over_whole_batches,
    is_what_the_whole_batch_gives,
)

OTHERS = [name for name in WHOLE if name not in WHOLE_IN_CI]


@pytest.mark.parametrize("kind", OTHERS)
def test_one_result_on_any_number_of_devices(kind: str, runner: Runner, other: Runner) -> None:
    is_exact_over_whole_batches(kind, runner, other)


@pytest.mark.parametrize("kind", OTHERS)
def test_it_is_what_the_whole_batch_gives(kind: str, runner: Runner, other: Runner) -> None:
    is_what_the_whole_batch_gives(kind, runner, other)
