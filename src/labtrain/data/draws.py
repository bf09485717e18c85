"""Random numbers for whole batches: each number is a function of (seed, epoch, index, name), on any device.

They are computed in integers. Normal and beta numbers come from tables that are made once, on the CPU.

Source: SplitMix64, G. Steele, D. Lea, C. Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014. Its n-th
output depends only on the seed and n, so a batch is drawn at once and in any order.
"""

import math
import statistics
from functools import cache

import numpy as np
import torch
from torch import Tensor

from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import derive_seed

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64, which wraps as uint64 does
QUANTILES = 1 << 16


class Draws:
    """The random numbers of a batch: B samples, each with its own numbers.

    A name's numbers are one SplitMix64 sequence, seeded by (seed, epoch, name); a sample that draws n of them takes
    outputs index * n to index * n + n - 1. Each name has its own sequence; the same name gives the same numbers again.

    Args:
        seed: the run's.
        epoch: from 0.
        indices: of the samples in the dataset, int64 (B,), on the device that draws.
        place: put before each name, so that two transforms of one class draw different numbers.
    """

    def __init__(self, seed: int, epoch: int, indices: Tensor, *, place: tuple[int | str, ...] = ()) -> None:
        self.seed, self.epoch, self.indices, self.place = seed, epoch, indices, place

    def __len__(self) -> int:
        return len(self.indices)

    def bits(self, name: str, *shape: int) -> Tensor:
        """Return 64 random bits each, int64 (B, *shape)."""
        lanes = math.prod(shape)
        key = derive_seed(self.seed, "augment", self.epoch, *self.place, name)
        counters = (self.indices * lanes)[:, None] + torch.arange(1, lanes + 1, device=self.indices.device)
        return _mix(counters.mul_(GOLDEN_GAMMA).add_(key)).view(-1, *shape)

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """Return integers of low..high-1, int64 (B, *shape).

        63 bits modulo their number: the chances of two integers differ by a part in 2^63 / (high - low).
        """
        if high <= low:
            raise ConfigError(f"integers {name!r} from {low} to {high}: the range is empty", hint="set high above low")
        return (self.bits(name, *shape) & ((1 << 63) - 1)).remainder_(high - low).add_(low)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Return multiples of 2^-24 from 0 to below 1, float32 (B, *shape)."""
        return (self.bits(name, *shape) >> 40).bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Return numbers with mean 0 and deviation 1, float32 (B, *shape).

        The normal distribution's quantiles at (k + 1/2) / 65536, all equally likely. They end at 4.32, their deviation
        is 0.99999, and near 0 their distance is 0.00004. Other ways need logarithm and cosine, which differ by device.
        """
        lanes = math.prod(shape)
        words = self.bits(name, -(-lanes // 4)).view(torch.int16)[:, :lanes]  # four numbers a draw
        places = words.to(torch.int32).add_(QUANTILES // 2)
        return _normal(self.indices.device).index_select(0, places.reshape(-1)).view(-1, *shape)

    def beta(self, name: str, alpha: float, *shape: int) -> Tensor:
        """Return numbers of the Beta(alpha, alpha) distribution, float32 (B, *shape): 65536 quantiles, as `normal`."""
        places = (self.bits(name, *shape) >> 48).bitwise_and_(QUANTILES - 1)
        return _beta(alpha, self.indices.device).index_select(0, places.view(-1)).view(-1, *shape)

    def within(self, *place: int | str) -> "Draws":
        """Return draws of the same samples under separate names."""
        return Draws(self.seed, self.epoch, self.indices, place=(*self.place, *place))

    def first(self, samples: int) -> "Draws":
        """Return the draws of the first samples."""
        return Draws(self.seed, self.epoch, self.indices[:samples], place=self.place)


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place; torch shifts int64 with its sign, so the result is masked."""
    values ^= (values >> 30).bitwise_and_((1 << 34) - 1)
    values *= 0xBF58476D1CE4E5B9 - (1 << 64)
    values ^= (values >> 27).bitwise_and_((1 << 37) - 1)
    values *= 0x94D049BB133111EB - (1 << 64)
    values ^= (values >> 31).bitwise_and_((1 << 33) - 1)
    return values


@cache
def _normal(device: torch.device) -> Tensor:
    """Return the normal distribution's quantiles, float32 (65536,)."""
    inverse = statistics.NormalDist().inv_cdf
    upper = [inverse((place + 0.5) / QUANTILES) for place in range(QUANTILES // 2, QUANTILES)]
    return torch.tensor([-value for value in reversed(upper)] + upper, dtype=torch.float32).to(device)


@cache
def _beta(alpha: float, device: torch.device) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha), multiples of 2^-20, float32 (65536,).

    The density is integrated over u = x^k, which takes its pole at 0 away for alpha below 1; the upper half mirrors the
    lower one.
    """
    power = min(alpha, 1.0)
    grid = np.linspace(0.0, 0.5**power, 4 * QUANTILES + 1)
    x = grid ** (1 / power)
    density = (2 * x) ** (alpha - power) * (2 - 2 * x) ** (alpha - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    wanted = (np.arange(QUANTILES // 2) + 0.5) / (QUANTILES // 2)
    lower = np.round(np.interp(wanted, mass / mass[-1], grid) ** (1 / power) * 2.0**20) / 2.0**20
    return torch.from_numpy(np.concatenate([lower, 1 - lower[::-1]]).astype(np.float32)).to(device)
