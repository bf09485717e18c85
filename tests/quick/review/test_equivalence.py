"""The equivalence test keeps its level and its stated power, in simulation; and known cases."""

import numpy as np
import pytest
from scipy import stats

from labtrain.base.errors import ConfigError
from labtrain.review.equivalence import compare_pairs


def decided(*, difference: float, spread: float, pairs: int, trials: int = 3000) -> tuple[float, float]:
    """Return how often runs of a true difference are called equivalent, and the median of the stated power."""
    draw = np.random.default_rng(0)
    found = [
        compare_pairs(before, before + draw.normal(difference, spread, pairs), margin=1.0)
        for before in draw.normal(0, 5, (trials, pairs))
    ]
    return float(np.mean([each.equivalent for each in found])), float(np.median([each.power for each in found]))


@pytest.mark.parametrize(("spread", "pairs"), [(0.5, 5), (1.0, 10), (0.3, 3)])
def test_a_difference_of_the_margin_is_rarely_called_equivalent(spread: float, pairs: int) -> None:
    """At most alpha; of 3,000 trials, three standard errors more."""
    for difference in (1.0, -1.0, 1.5):
        assert decided(difference=difference, spread=spread, pairs=pairs)[0] <= 0.05 + 3 * (0.05 * 0.95 / 3000) ** 0.5


@pytest.mark.parametrize(("spread", "pairs"), [(0.5, 6), (1.0, 15), (1.0, 30)])
def test_the_stated_power_is_how_often_equal_runs_are_called_equivalent(spread: float, pairs: int) -> None:
    often, stated = decided(difference=0.0, spread=spread, pairs=pairs)
    assert abs(often - stated) < 0.08


def test_a_spread_far_beyond_the_margin_leaves_no_power() -> None:
    assert decided(difference=0.0, spread=50.0, pairs=4)[1] == 0.0


def test_it_agrees_with_two_t_tests_and_with_its_interval() -> None:
    draw = np.random.default_rng(1)
    for _ in range(200):
        before, now = draw.normal(0, 1, 7), draw.normal(0.2, 1, 7)
        found = compare_pairs(before, now, margin=1.0)
        low = stats.ttest_1samp(now - before, -1.0, alternative="greater").pvalue
        high = stats.ttest_1samp(now - before, 1.0, alternative="less").pvalue
        assert found.p == pytest.approx(max(low, high))
        assert found.equivalent == (found.low > -1.0 and found.high < 1.0)


def test_without_a_spread_nothing_is_shown() -> None:
    """Two runs with the same accuracy may be a coarse metric, or chance."""
    for now in ([0.5, 0.6], [0.6, 0.7]):
        found = compare_pairs([0.5, 0.6], now, margin=1.0)
        assert not found.equivalent
        assert found.power == 0.0


@pytest.mark.parametrize(
    ("before", "now", "margin", "says"),
    [
        ([1.0], [1.0], 0.1, "1 pair of runs"),
        ([1.0, 2.0], [1.0, 2.0], 0.0, r"margin must be above 0, got 0\.0"),
        ([1.0, 2.0], [1.0, 2.0], -1.0, r"margin must be above 0, got -1\.0"),
        ([1.0, 2.0], [1.0, float("nan")], 0.1, "not finite"),
    ],
)
def test_what_cannot_be_told_is_refused(before: list[float], now: list[float], margin: float, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compare_pairs(before, now, margin=margin)
