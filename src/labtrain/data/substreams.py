"""A stream that can be split at fixed places: each shard of a batch comes from a part of its own.

Its dataset has two methods more than an IterableDataset:

    shard(index, count)               part `index` of `count` parts, an IterableDataset with a state of its own
    state_dict, load_state_dict       its position

There are as many parts as shards. Each rank iterates the parts of its own shards, and nothing else. So the result does
not depend on the number of devices, and loading costs each device only its part. An epoch ends when the first part has
no more rows.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from labtrain.base.errors import ConfigError
from labtrain.data.loader import WORKERS
from labtrain.data.sharded import Sharded, cuts
from labtrain.data.stream import Stream, each_seeded, holder_of
from labtrain.exact.collate import rows_of
from labtrain.exact.tree_sum import shard_range

END = object()


class SubStreams(Stream):
    """Wraps torch's DataLoader of a dataset with `shard(index, count)`."""

    def __init__(self, loader: "TorchDataLoader[object]") -> None:
        super().__init__(loader)
        self.loader: TorchDataLoader[object] = loader
        self.parts: dict[int, TorchDataLoader[object]] = {}  # of this rank, by shard

    def __len__(self) -> int:
        if self._shards is None:
            return super().__len__()
        raise TypeError("the parts of a stream may have different lengths")

    def shard(self, shards: int, *, rank: int, world: int) -> None:
        super().shard(shards, rank=rank, world=world)
        size = self.loader.batch_size
        assert size is not None
        places = cuts(size, shards)
        self.parts = {
            each: self._part(each, places[each + 1] - places[each]) for each in shard_range(shards, rank, world)
        }

    def _part(self, index: int, size: int) -> "TorchDataLoader[object]":
        dataset: Any = self.loader.dataset
        part = dataset.shard(index, self._shards)
        if not isinstance(part, IterableDataset) or part is dataset:
            raise ConfigError(
                f"{type(dataset).__name__}.shard(index, count) returned {type(part).__name__}",
                hint="return a new IterableDataset with this part of the samples",
            )
        options = {name: getattr(self.loader, name) for name in (*WORKERS, "num_workers", "collate_fn", "drop_last")}
        return TorchDataLoader(part, size, **options)

    def _shards_of(self, samples: int) -> int:
        return super()._shards_of(samples) if self._shards is None else self._shards

    def __iter__(self) -> Iterator[object]:
        if self._shards is None:
            yield from super().__iter__()
            return
        epoch, done = self._start[0], self._skipped()
        if self.epoch == epoch and self._ended:
            return
        if self.epoch == epoch or (self._ended and self.epoch == epoch + 1):
            self._restore_parts()
        skipped = done if self.holder is None else 0
        self.exhausted, self.rows = False, {}
        iterators = {shard: self._seeded(shard, part, done - skipped) for shard, part in self.parts.items()}
        number = done - skipped
        while (batches := self._next(iterators)) is not None:
            sizes, parts = batches
            if number >= done:
                self.rows[number] = sum(sizes)
                self.states = {each: state for each, state in self.states.items() if each == number}
                self.states[number + 1] = self._states_of_parts()
                yield Sharded(
                    [(shard, sizes[shard], batch) for shard, batch in parts.items()],
                    samples=sum(sizes),
                    shards=self._shards,
                )
            number += 1
        self.exhausted = True
        self.states[number] = self._states_of_parts()  # with what the parts did when they were asked for another batch

    def _seeded(self, shard: int, part: "TorchDataLoader[object]", first: int) -> Iterator[object]:
        return each_seeded(lambda: iter(part), "stream", self.epoch, shard, first=first)

    def _next(self, iterators: dict[int, Iterator[object]]) -> tuple[list[int], dict[int, object]] | None:
        """Return the rows of each shard, and this rank's batches; None if a part has ended, on any rank."""
        parts = {shard: next(iterator, END) for shard, iterator in iterators.items()}
        assert self._shards is not None
        sizes = [0] * self._shards
        for shard, batch in parts.items():
            sizes[shard] = 0 if batch is END else rows_of(batch) or 1
        if self._place[1] > 1:
            both = torch.tensor(sizes, device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(both)
            sizes = both.tolist()
        return (sizes, parts) if all(sizes) else None

    # ---------------------------------------------------------------------------------------------------- state

    def state_after(self, batches: int) -> object:
        """Return the states of all parts, by shard: on every rank, those of all ranks."""
        state = super().state_after(batches)
        if self._shards is None or self._place[1] == 1 or self.holder is None:
            return state
        ranks: list[Any] = [None] * self._place[1]
        dist.all_gather_object(ranks, state)
        if any(each is None for each in ranks):
            return None
        return {shard: part for each in ranks for shard, part in each.items()}

    def _states_of_parts(self) -> dict[int, object] | None:
        if self.holder is None:
            return None
        return {shard: copy.deepcopy(_holder(part).state_dict()) for shard, part in self.parts.items()}

    def _restore_parts(self) -> None:
        if self.holder is None:
            return
        states: Any = self._state
        for shard, part in self.parts.items():
            _holder(part).load_state_dict(copy.deepcopy(states[shard]))


def can_be_split(loader: object) -> bool:
    """Return whether a loader is torch's of a dataset with the method `shard(index, count)`."""
    dataset = getattr(loader, "dataset", None)
    if type(loader) is not TorchDataLoader or not isinstance(dataset, IterableDataset) or loader.batch_size is None:
        return False
    shard = getattr(dataset, "shard", None)
    return callable(shard) and list(inspect.signature(shard).parameters)[:2] == ["index", "count"]


def _holder(part: "TorchDataLoader[object]") -> Any:
    holder = holder_of(part)
    if holder is None:
        raise ConfigError(
            f"{type(part.dataset).__name__}, which shard(index, count) returned, has no state_dict",
            hint="give it state_dict and load_state_dict, as the whole dataset has",
        )
    return holder
