"""torch's DataLoader with its other samplers, several loaders and streams."""

import pytest

from tests.support.exact import Runner
from tests.support.own_code import LOADERS_IN_FULL, is_exact_with_loader


@pytest.mark.parametrize("loader", LOADERS_IN_FULL)
def test_the_order_is_what_the_sampler_yields(loader: str, runner: Runner, other: Runner) -> None:
    is_exact_with_loader(loader, runner, other)
