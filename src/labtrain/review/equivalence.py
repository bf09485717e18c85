"""Are two sets of results the same for practical purposes? Two one-sided tests on paired differences. No torch.

A t test that finds no difference shows nothing: with few runs it finds none. Equivalence is shown the other way round:
that the mean difference lies below -margin is refused, and that it lies above +margin is (Schuirmann, 1987,
https://doi.org/10.1007/BF01068419; Lakens, 2017, https://doi.org/10.1177/1948550617697177). The power says how probable
that was to begin with; it is the noncentral t approximation of Phillips (1990, https://doi.org/10.1007/BF01063556).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from labtrain.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence:
    """What the two one-sided tests came to.

    Attributes:
        pairs: how many differences.
        mean: of them.
        low: of the confidence interval of the mean, of level 1 - 2 * alpha: it lies within the margin where equivalent.
        high: its other end.
        p: the larger of the two tests'.
        power: the probability of `equivalent` where the true difference is 0 and the spread is what was seen.
        margin: the largest difference that does not matter, as the person said.
        alpha: the probability of `equivalent` where the true difference is the margin.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float
    power: float
    margin: float
    alpha: float

    @property
    def equivalent(self) -> bool:
        return self.p < self.alpha


def compare_pairs(before: Sequence[float], now: Sequence[float], *, margin: float, alpha: float = 0.05) -> Equivalence:
    """Test whether results are equivalent.

    Args:
        before: a metric of each run, finite.
        now: of the same runs (configuration and seed) in the other environment, in the same order.
        margin: the largest difference of the mean that does not matter, in the metric's unit.
        alpha: level of each of the two tests.

    Raises:
        ConfigError: fewer than two pairs, no positive margin, or a metric that is not finite.
    """
    import numpy as np
    from scipy import stats

    differences = np.subtract(now, before)
    pairs = len(differences)
    if pairs < 2:
        raise ConfigError(f"{pairs} pair of runs: a spread takes two", hint="--seeds 5")
    check_levels(margin, alpha)
    if not np.isfinite(differences).all():
        raise ConfigError("a metric is not finite: no mean can be told", hint="labtrain report RUN... shows which")
    mean, freedom = float(differences.mean()), pairs - 1
    error = float(differences.std(ddof=1)) / math.sqrt(pairs)  # of the mean
    if error == 0:  # a spread of 0 is a metric too coarse, or chance: nothing can be shown with it
        p, power = 1.0, 0.0
    else:
        p = float(max(stats.t.sf((mean + margin) / error, freedom), stats.t.cdf((mean - margin) / error, freedom)))
        needed = stats.t.ppf(1 - alpha, freedom)
        power = float(stats.nct.cdf(-needed, freedom, -margin / error) - stats.nct.cdf(needed, freedom, margin / error))
    width = float(stats.t.ppf(1 - alpha, freedom)) * error
    return Equivalence(
        pairs=pairs,
        mean=mean,
        low=mean - width,
        high=mean + width,
        p=p,
        power=max(power, 0.0),
        margin=margin,
        alpha=alpha,
    )


def check_levels(margin: float, alpha: float) -> None:
    """Refuse a margin or a level that no test can have.

    Raises:
        ConfigError: names them.
    """
    if not margin > 0 or not 0 < alpha < 0.5:
        raise ConfigError(f"margin {margin}, alpha {alpha}", hint="a margin above 0, an alpha between 0 and 0.5")
