"""Test whether two sets of results are equivalent: two one-sided tests (TOST) on paired differences. No torch.

A t test that finds no difference proves nothing: with few runs it rarely finds one. TOST rejects both that the mean
difference is below -margin and that it is above +margin (Schuirmann, 1987, https://doi.org/10.1007/BF01068419; Lakens,
2017, https://doi.org/10.1177/1948550617697177). The power is the probability of that outcome, by the noncentral t
approximation of Phillips (1990, https://doi.org/10.1007/BF01063556).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from labtrain.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence:
    """The result of the two one-sided tests.

    Attributes:
        pairs: number of differences.
        mean: mean difference.
        low: lower end of the mean's confidence interval of level 1 - 2 * alpha; within the margin if equivalent.
        high: upper end.
        p: the larger p value of the two tests.
        power: the probability of `equivalent` if the true difference is 0 and the spread is the observed one.
        margin: the largest difference that does not matter, given by the user.
        alpha: the probability of `equivalent` if the true difference is the margin.
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
        now: the same runs (configuration and seed) in the other environment, in the same order.
        margin: the largest difference of the mean that does not matter, in the metric's unit.
        alpha: level of each of the two tests.

    Raises:
        ConfigError: fewer than two pairs, a margin that is not positive, or a metric that is not finite.
    """
    import numpy as np
    from scipy import stats

    differences = np.subtract(now, before)
    pairs = len(differences)
    if pairs < 2:
        raise ConfigError(f"got {pairs} pair of runs, need at least 2 to estimate a spread", hint="--seeds 5")
    check_levels(margin, alpha)
    if not np.isfinite(differences).all():
        raise ConfigError("a metric is not finite, so the mean is undefined", hint="labtrain report RUN... shows which")
    mean, freedom = float(differences.mean()), pairs - 1
    error = float(differences.std(ddof=1)) / math.sqrt(pairs)  # of the mean
    if error == 0:  # a spread of 0 means a metric that is too coarse, or chance: it proves nothing
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
    """Raise ConfigError if the margin or the level is out of range."""
    if not margin > 0 or not 0 < alpha < 0.5:
        raise ConfigError(
            f"margin must be above 0, got {margin}; alpha must be between 0 and 0.5, got {alpha}",
            hint="--margin 0.005 --alpha 0.05",
        )
