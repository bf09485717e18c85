"""What all loaders of a training have: a position that a resume restores, and batches that are cut into shards."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch.utils.data import SequentialSampler

from labtrain.exact.permutation import Indices
from labtrain.exact.tree_sum import shard_range


class Sharded:
    """One global batch, as one rank sees it. It is not a collection, so Lightning passes it on unchanged.

    Attributes:
        parts: (shard number, number of samples, data) of each shard of this rank with samples.
        samples: of the whole batch.
        shards: how many shards the whole batch is cut into.
    """

    def __init__(self, parts: list[tuple[int, int, object]], *, samples: int, shards: int) -> None:
        self.parts, self.samples, self.shards = parts, samples, shards


class _InOrder(SequentialSampler):
    """The sampler of a loader that does not shuffle: Lightning's overfit_batches then leaves the loader unchanged."""

    def __init__(self, loader: "Loader") -> None:
        self.set_epoch = loader.set_epoch


class Loader(ABC):
    """A loader that Lightning iterates once an epoch, after `set_epoch`."""

    def __init__(self) -> None:
        self.epoch, self._start = 0, (-1, 0)
        self.sampler: Any = self  # Lightning calls loader.sampler.set_epoch(epoch)
        self.batch_sampler = None
        self._shards: int | None = None
        self._place = (0, 1)

    @abstractmethod
    def __iter__(self) -> Iterator[object]:
        """Yield the batches of the epoch, from the place where it starts; `Sharded` if they are cut."""

    @abstractmethod
    def samples_of(self, batch: int) -> int:
        """Return the samples of a batch of this epoch, of all ranks."""

    @abstractmethod
    def _shards_in(self, batch: int) -> int:
        """Return into how many shards a batch of this epoch is cut."""

    def indices_of(self, batch: int) -> Indices | None:
        """Return the indices of a batch of this epoch, of all ranks; None if the loader does not know them."""
        return None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def take_same_batches(self) -> None:
        """Yield the same batches in each epoch: in the dataset's order, or as a sampler yields them in the first."""
        self.sampler = _InOrder(self)

    def start_at(self, epoch: int, batch: int) -> None:
        """Skip the first `batch` batches of `epoch`: they have been trained on."""
        self._start = (epoch, batch)

    def shard(self, shards: int, *, rank: int, world: int) -> None:
        """Yield `Sharded` from now on."""
        self._shards, self._place = shards, (rank, world)

    @property
    def is_cut(self) -> bool:
        """Whether each batch is cut into shards."""
        return self._shards is not None

    def calls(self, batch: int) -> int:
        """Return how often this rank calls a step for the batch of that number in its epoch."""
        return len(shard_range(self._shards_in(batch), *self._place)) if self.is_cut else 1

    def _skipped(self) -> int:
        """Return how many batches of this epoch have been trained on."""
        return self._start[1] if self._start[0] == self.epoch else 0


def number_of_shards(samples: int, *, batch_size: object, most: int) -> int:
    """Return into how many shards a batch is cut: if it has not batch_size samples, each shard has at least two."""
    return min(most, samples if samples == batch_size else max(1, samples // 2))


def cuts(samples: int, shards: int) -> list[int]:
    """Return where a batch is cut: evenly."""
    return [samples * shard // shards for shard in range(shards + 1)]
