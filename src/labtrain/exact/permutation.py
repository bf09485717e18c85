"""The order of samples: a keyed permutation gives the index at each position of an epoch, on demand.

It depends only on (seed, epoch) and the position, in our own integer arithmetic: the same on every platform and with
every release of torch and numpy. Up to SORTED samples it sorts as many SplitMix64 outputs, and is as uniform as they
are random. Above, it is a Feistel network with cycle walking. That needs constant memory and gives any position at
once, so a resume needs only (seed, epoch, step) and a dataset may have 2^60 samples.

Sources: SplitMix64, G. Steele, D. Lea, C. Flood, OOPSLA 2014. Cycle walking and the Feistel network on a domain that is
not a power of two: J. Black, P. Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002. A network whose halves
differ by a bit at most covers 2^b with 2^(b-1) < N <= 2^b, so that a walk takes less than two evaluations on average.
"""

import numpy as np
import numpy.typing as npt

from labtrain.exact.determinism import derive_seed

Indices = npt.NDArray[np.int64]

SORTED = 1 << 16
LARGEST = 1 << 60
ROUNDS = 8
BLOCK = 1 << 11  # positions to compute at once: for one batch at a time, numpy's calls would cost too much
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """The order of one epoch: maps positions to sample indices.

    Args:
        num_samples: N, at most 2^60.
        seed: the run's.
        epoch: each epoch has another order.
        shuffle: if False, position and index are the same.
    """

    def __init__(self, num_samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> None:
        if not 0 <= num_samples <= LARGEST:
            raise ValueError(f"{num_samples} samples: at most 2^60 can be ordered")
        self.num_samples, self.shuffle = num_samples, shuffle
        self._sorted: Indices | None = None
        self._block, self._begin = np.empty(0, np.int64), 0  # positions that are computed, and the first of them
        if not shuffle:
            return
        if num_samples <= SORTED:
            counters = np.arange(1, num_samples + 1, dtype=np.uint64) * GOLDEN_GAMMA
            keys = _mix(counters + np.uint64(derive_seed(seed, "order", epoch)))  # distinct: the mixing is a bijection
            self._sorted = np.argsort(keys).astype(np.int64)
            return
        bits = (num_samples - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._masks = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
        self._keys = [np.uint64(derive_seed(seed, "order", epoch, number)) for number in range(ROUNDS)]

    def __call__(self, start: int, stop: int) -> Indices:
        """Return the indices at positions start..stop-1, shape (stop - start,), int64.

        Positions past the end are left out.
        """
        stop = min(stop, self.num_samples)
        if self._sorted is not None:
            return self._sorted[start:stop]
        if not self.shuffle:
            return np.arange(start, max(start, stop), dtype=np.int64)
        if not self._begin <= start <= stop <= self._begin + len(self._block):
            last = min(max(stop, start + BLOCK), self.num_samples)
            self._block, self._begin = self._permuted(np.arange(start, max(start, last), dtype=np.int64)), start
        return self._block[start - self._begin : max(start, stop) - self._begin]

    def _permuted(self, positions: Indices) -> Indices:
        found = self._encrypt(positions.astype(np.uint64))
        limit = np.uint64(self.num_samples)
        while (outside := np.flatnonzero(found >= limit)).size:
            found[outside] = self._encrypt(found[outside])
        return found.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low_mask, high_mask = self._masks
        low, high = values & low_mask, values >> self._low_bits
        for number, key in enumerate(self._keys):
            if number % 2:
                high ^= _mix(low + key) & high_mask
            else:
                low ^= _mix(high + key) & low_mask
        return (high << self._low_bits) | low


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
