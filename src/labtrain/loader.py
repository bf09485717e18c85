"""The loader: torch's names, and samples that are a function of (seed, epoch, index).

Whatever a dataset's `__getitem__` draws from `random`, `numpy.random` or torch's global generator is seeded per sample,
so an unchanged dataset with torchvision-style transforms gives the same samples with any number of workers and after a
resume. `batch_size` is global: each device takes its part of every batch, without padding and without duplicates.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from labtrain.determinism import run_mode, run_seed, seed_all
from labtrain.errors import ConfigError
from labtrain.order import epoch_order

Key = tuple[int, int]  # epoch, index


class DataLoader:
    """Loads batches of any map-style dataset.

    Args:
        dataset: has `__len__` and `__getitem__`.
        batch_size: samples in a batch over all devices.
        shuffle: a new order each epoch; a function of the run's seed and the epoch.
        num_workers: processes that load; the samples do not depend on it.
        collate_fn: makes a batch of a list of samples; torch's default.
        drop_last: leave out the last batch of an epoch where it is smaller.
        pin_memory: copy batches into page-locked memory; by default where there is a GPU.

    Raises:
        ConfigError: batch_size or the dataset cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        pin_memory: bool | None = None,
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ConfigError(
                f"{type(dataset).__name__} is no map-style dataset", hint="give it __len__ and __getitem__"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: at least 1 is wanted", hint="data.batch_size=64")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.drop_last = drop_last
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.epoch = 0
        self.sampler, self.batch_sampler = self, None  # Lightning calls loader.sampler.set_epoch(epoch)
        self.indices = torch.empty(0, dtype=torch.int64)  # of the global batch that was yielded last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in an epoch."""
        rank, world = _place()
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (not self.drop_last and len(_part(rest, rank, world)) > 0)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing below runs before the first next(), which comes after set_epoch.
        rank, world = _place()
        if self.batch_size < world:
            raise ConfigError(
                f"batch_size={self.batch_size} on {world} devices: one sample a device is wanted",
                hint=f"data.batch_size={world}",
            )
        size = len(self.dataset)
        order = epoch_order(size, seed=run_seed(), epoch=self.epoch) if self.shuffle else torch.arange(size)
        batches = _Batches(order, self.batch_size, len(self), epoch=self.epoch, rank=rank, world=world)
        loader = torch.utils.data.DataLoader(
            _Seeded(self.dataset, run_seed() if run_mode() != "off" else None),
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(0),  # or torch draws its workers' seed from the global generator
        )
        for step, batch in enumerate(loader):
            self.indices = batches.indices(step)
            yield batch


class _Batches:
    """The batch sampler: for each batch, the keys of this rank's part."""

    def __init__(self, order: torch.Tensor, batch_size: int, steps: int, *, epoch: int, rank: int, world: int) -> None:
        self.order, self.batch_size, self.steps = order, batch_size, steps
        self.epoch, self.rank, self.world = epoch, rank, world

    def indices(self, step: int) -> torch.Tensor:
        """Return the indices of one global batch, shape (at most batch_size,), int64."""
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.steps):
            indices = self.indices(step).tolist()
            part = _part(len(indices), self.rank, self.world)
            yield [(self.epoch, index) for index in indices[part.start : part.stop]]


class _Seeded(Dataset[Any]):
    """A dataset whose draws are a function of (seed, epoch, index); with seed None, the dataset as it is."""

    def __init__(self, dataset: Dataset[Any], seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        if self.seed is not None:
            seed_all(self.seed, "sample", epoch, index)
        return self.dataset[index]


def _part(size: int, rank: int, world: int) -> range:
    """Return the positions of a batch of `size` that belong to `rank`: contiguous parts that differ by one at most."""
    return range(size * rank // world, size * (rank + 1) // world)


def _place() -> tuple[int, int]:
    """Return (rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
