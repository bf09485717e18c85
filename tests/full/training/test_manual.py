"""Manual optimization in its other forms."""

import pytest

from tests.support.exact import Runner
from tests.support.own_code import MANUAL, MANUAL_IN_CI, is_exact_in_manual_optimization


@pytest.mark.parametrize("model", [name for name in MANUAL if name not in MANUAL_IN_CI])
def test_one_result_on_any_number_of_devices(model: str, runner: Runner, other: Runner) -> None:
    is_exact_in_manual_optimization(model, runner, other)
