"""Several loaders whose batches a step gets together, in the modes of Lightning's CombinedLoader.

The batch of step b holds batch b of each loader. A loader that has ended gives None (max_size), begins again with a new
order and new draws (max_size_cycle), or ends the epoch (min_size). All loaders cut their batch into the same number of
shards: a shard of the step has one shard of each.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils._pytree import tree_flatten, tree_unflatten

from labtrain.data.batches import CYCLE, Picks
from labtrain.data.loader import DataLoader
from labtrain.data.sharded import Loader, Sharded
from labtrain.exact.permutation import Indices

MODES = ("max_size_cycle", "max_size", "min_size")


class Combined(Loader):
    """Yields the batches of several loaders together.

    Args:
        loaders: a list, tuple or dict of them, also nested: the form of the batches.
        mode: one of MODES.
    """

    def __init__(self, loaders: object, mode: str) -> None:
        super().__init__()
        found, self._form = tree_flatten(loaders)
        self.loaders: list[DataLoader] = found
        self.mode = mode

    def take_same_batches(self) -> None:
        super().take_same_batches()
        for loader in self.loaders:
            loader.take_same_batches()

    def shard(self, shards: int, *, rank: int, world: int) -> None:
        super().shard(shards, rank=rank, world=world)
        for loader in self.loaders:
            loader.shard(shards, rank=rank, world=world)

    def indices_of(self, batch: int) -> Indices:
        return np.concatenate([picks.numbers for picks in self._picks(batch) if picks is not None])

    def samples_of(self, batch: int) -> int:
        return len(self.indices_of(batch))

    def _shards_in(self, batch: int) -> int:
        return self._shards_of(self._picks(batch))

    def __len__(self) -> int:
        return (min if self.mode == "min_size" else max)(map(len, self.loaders))

    def __iter__(self) -> Iterator[object]:
        plans = itertools.tee(self._plan(), len(self.loaders) + 1)
        streams = [loader.along(_of(number, plans[number])) for number, loader in enumerate(self.loaders)]
        for picks, _ in plans[-1]:
            yield self._together(
                [None if each is None else next(stream) for stream, each in zip(streams, picks, strict=True)]
            )

    def _plan(self) -> Iterator[tuple[list[Picks | None], int]]:
        for batch in itertools.count(self._skipped()):
            try:
                picks = self._picks(batch)
            except IndexError:
                return
            yield picks, self._shards_of(picks)

    def _picks(self, batch: int) -> list[Picks | None]:
        """Return each loader's samples for a batch of this epoch; None if it has ended. IndexError after the last."""
        found = [self._pick(loader, batch) for loader in self.loaders]
        if self.mode != "max_size_cycle":
            ended = [each is None for each in found]
            if all(ended) or (self.mode == "min_size" and any(ended)):
                raise IndexError(batch)
            return found
        if batch >= max(len(loader.source.epoch(self.epoch)) for loader in self.loaders):
            raise IndexError(batch)
        return found

    def _pick(self, loader: DataLoader, batch: int) -> Picks | None:
        batches = loader.source.epoch(self.epoch)
        if self.mode == "max_size_cycle" and 0 < len(batches) <= batch:
            cycle, batch = divmod(batch, len(batches))
            batches = loader.source.epoch(self.epoch + cycle * CYCLE)
        try:
            return batches[batch]
        except IndexError:
            return None

    def _shards_of(self, picks: list[Picks | None]) -> int:
        """Return into how many shards all loaders cut: what the loader with the fewest would choose by itself."""
        return min(
            loader.shards_of(len(each)) for loader, each in zip(self.loaders, picks, strict=True) if each is not None
        )

    def _together(self, batches: list[Any]) -> object:
        """Return the batches of all loaders as one, in the form of the loaders."""
        if self._shards is None:
            return tree_unflatten(batches, self._form)
        first: Sharded = next(each for each in batches if each is not None)  # its samples are the step's, as Lightning
        parts = []
        for place, (shard, samples, _) in enumerate(first.parts):
            data = [None if each is None else each.parts[place][2] for each in batches]
            parts.append((shard, samples, tree_unflatten(data, self._form)))
        return Sharded(parts, samples=first.samples, shards=first.shards)


def parts_of(loader: object) -> list[DataLoader]:
    """Return the exact loaders in a loader."""
    if isinstance(loader, Combined):
        return loader.loaders
    return [loader] if isinstance(loader, DataLoader) else []


def _of(number: int, plan: Iterator[tuple[list[Picks | None], int]]) -> Iterator[tuple[Picks, int]]:
    """Yield the batches of one loader, with the number of their shards."""
    for picks, shards in plan:
        if (mine := picks[number]) is not None:
            yield mine, shards
