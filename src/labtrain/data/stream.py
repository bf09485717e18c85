"""Loaders with ready batches in their own order: torch's of an IterableDataset, torchdata's, mosaicml-streaming's.

Each process iterates the whole stream and keeps its shards: the rows of each batch are cut as those of other loaders.
So the result does not depend on the number of devices, if the stream gives each process the same batches. The first
batch of an epoch is compared.

The stream runs under global generators of its own, seeded by (seed, epoch, batch). A resume restores the stream's state
if it has `state_dict` and `load_state_dict`. Otherwise it begins the epoch's stream again, and skips the batches that
have been trained on.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader as TorchDataLoader

from labtrain.base.errors import ConfigError
from labtrain.data.batches import length_of
from labtrain.data.sharded import Loader, Sharded, cuts, number_of_shards
from labtrain.exact.collate import cut, rows_of
from labtrain.exact.determinism import derive_seed, keep_draws, run_mode, run_seed, seed_all
from labtrain.exact.tree_sum import shard_range
from labtrain.record.digests import digest_content

COMPARED_BYTES = 1 << 20  # of a batch, to see whether a stream without a state is the same after a resume


class Stream(Loader):
    """Wraps a loader that can be iterated again for each epoch.

    The Trainer may fetch a batch ahead of the one that it trains on. So the wrapper keeps the state after each of the
    last two batches.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader
        self.holder = holder_of(loader)
        self.states: dict[int, object] = {}  # by the number of batches of this epoch that were yielded
        self.last: dict[int, object] = {}  # as `states`, for a stream without one: the first rows of the batch before
        self.rows: dict[int, int] = {}  # of the batches of this epoch, by their number
        self.exhausted = False  # it was asked for another batch in this epoch, but had no more
        self._state: object = None
        self._ended = False
        generator = getattr(loader, "generator", None)
        self._generator = (generator, generator.initial_seed()) if isinstance(generator, torch.Generator) else None

    def __len__(self) -> int:
        return len(self.loader)  # TypeError where it has none, as Lightning expects

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch of the loader, its sampler and its dataset."""
        self.epoch = epoch
        for part in (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "dataset", None)):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def start_at(
        self, epoch: int, batch: int, *, state: object = None, ended: bool = False, exhausted: bool = True
    ) -> None:
        """Resume from a state.

        Args:
            epoch: the epoch of the state.
            batch: the number of its batches before the state.
            state: from a stream of this class; None if it has none.
            ended: the epoch of the training ended with that batch.
            exhausted: the loader was asked for another batch, but had no more.
        """
        self._start, self._state, self._ended, self.epoch = (epoch, batch), state, ended, epoch
        self.exhausted = exhausted

    def state_after(self, batches: int) -> object:
        """Return the state after this number of batches of the epoch; on every rank, or on none.

        A stream without a state has the digest of the last batch instead.
        """
        if self.holder is None:
            return digest_content(self.last[batches]) if batches in self.last else None
        return self.states.get(batches)

    def samples_of(self, batch: int) -> int:
        size = getattr(self.loader, "batch_size", None)
        return self.rows.get(batch, size if isinstance(size, int) else 1)

    def _shards_in(self, batch: int) -> int:
        return self._shards_of(self.samples_of(batch))

    def __iter__(self) -> Iterator[object]:
        epoch, done = self._start[0], self._skipped()
        if self.epoch == epoch and self._ended:
            return
        skipped = done if self.holder is None else 0
        if self.holder is not None and (self.epoch == epoch or (self._ended and self.epoch == epoch + 1)):
            self._restore(self.holder)
        self.exhausted, self.rows = False, {}
        for number, batch in enumerate(self._iterated(done - skipped), done - skipped):
            if number < done:
                if number == done - 1:
                    self._refuse_others(_first_rows(batch))
                continue
            if number == done:
                self._compare(batch)
            if self.holder is None:
                self.last = {each: rows for each, rows in self.last.items() if each == number}
                self.last[number + 1] = _first_rows(batch)
            self.states = {each: state for each, state in self.states.items() if each == number}
            self.states[number + 1] = None if self.holder is None else copy.deepcopy(self.holder.state_dict())
            yield self._cut(batch, number)
        self.exhausted = True

    def _iterated(self, first: int) -> Iterator[object]:
        def begin() -> Iterator[object]:
            if self._generator is not None:
                self._generator[0].manual_seed(derive_seed(self._generator[1], "stream", self.epoch))
            return iter(self.loader)

        return begin() if run_mode() == "off" else each_seeded(begin, "stream", self.epoch, first=first)

    def _restore(self, holder: Any) -> None:
        holder.load_state_dict(copy.deepcopy(self._state))
        if self._ended and self._ends_again():
            holder.load_state_dict(copy.deepcopy(self._state))

    def _ends_again(self) -> bool:
        """Move the loader to the end of an epoch whose last batch another process has trained.

        Its state was taken before the end. torchdata's loader first gives the rest of that epoch, which is empty, then
        starts the next one. Lightning asks for one more batch only if the loader has no length. Under
        `limit_train_batches` it does not ask, and the next epoch starts there.

        Returns:
            whether that gave a batch of the next epoch: some loaders start it at once.
        """
        rest, nothing = iter(self.loader), object()
        if length_of(self.loader) is not None or not self.exhausted:
            return False
        return next(rest, nothing) is not nothing

    def _cut(self, batch: object, number: int) -> object:
        """Return this rank's shards of a batch; without shards the batch as it came."""
        samples = rows_of(batch)
        self.rows[number] = samples or 1
        if self._shards is None:
            return batch
        if samples is None and self._shards > 1:
            raise ConfigError(
                f"{_name(self.loader)} gives batches without rows ({type(batch).__name__}): they cannot be cut into"
                f" determinism.shards={self._shards}",
                hint="determinism.shards=1",
            )
        samples = samples or 1
        shards = self._shards_of(samples)
        places = cuts(samples, shards)
        parts = []
        for shard in shard_range(shards, *self._place):
            part = slice(places[shard], places[shard + 1])
            parts.append((shard, part.stop - part.start, cut(batch, samples, part) if shards > 1 else batch))
        return Sharded(parts, samples=samples, shards=shards)

    def _shards_of(self, samples: int) -> int:
        return number_of_shards(samples, batch_size=getattr(self.loader, "batch_size", None), most=self._shards or 1)

    def _refuse_others(self, rows: object) -> None:
        """Compare the last batch that is skipped with the one that was trained on.

        Raises:
            ConfigError: the stream gives other batches than before, such as one that depends on the weights.
        """
        if isinstance(self._state, str) and digest_content(rows) != self._state:
            raise ConfigError(
                f"{_name(self.loader)} gives other batches than before the resume: it depends on more than the seed,"
                " the epoch and data.num_workers",
                hint="give it state_dict and load_state_dict; or resume=never",
            )

    def _compare(self, batch: object) -> None:
        """Raise ConfigError if ranks get different batches: cutting those would leave out samples without a word."""
        if self._shards is None or self._place[1] == 1:
            return
        digests: list[str] = [""] * self._place[1]
        dist.all_gather_object(digests, digest_content(batch))
        if len(set(digests)) > 1:
            raise ConfigError(
                f"{_name(self.loader)} gives each process other batches: labtrain gives each device its part of each"
                " batch itself",
                hint="remove from the dataset what splits it by rank, or trainer.devices=1",
            )


def each_seeded(begin: Callable[[], Iterator[object]], *place: int | str, first: int) -> Iterator[object]:
    """Iterate with global generators of its own, which are seeded for each batch by the run's seed, place and number.

    So a resume repeats the draws of the batches after its position.

    Args:
        begin: makes the iterator.
        place: what is iterated.
        first: the number of the first batch.
    """
    iterator: Iterator[object] | None = None
    for number in itertools.count(first):
        put_back = keep_draws()
        try:
            if iterator is None:
                seed_all(run_seed(), *place)
                iterator = begin()  # draws the seeds of workers
            seed_all(run_seed(), *place, number)
            item = next(iterator)
        except StopIteration:
            return
        finally:
            put_back()
        yield item


def holder_of(loader: Any) -> Any:
    """Return what can save and restore a loader's position: the loader or, in this process, its dataset; or None."""
    if is_stateful(loader):
        return loader
    dataset = getattr(loader, "dataset", None)
    alone = isinstance(loader, TorchDataLoader) and loader.num_workers == 0
    return dataset if alone and is_stateful(dataset) else None


def is_stateful(loader: object) -> bool:
    """Return whether a loader can save and restore its position."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def can_begin_again(loader: object) -> bool:
    """Return whether a loader can be iterated for each epoch: an iterator can not."""
    return hasattr(loader, "__iter__") and not hasattr(loader, "__next__")


def _name(loader: object) -> str:
    dataset = getattr(loader, "dataset", None)
    return f"{type(loader).__name__}{'' if dataset is None else f' of {type(dataset).__name__}'}"


def _first_rows(batch: object) -> object:
    """Return a copy of a batch's first rows, up to COMPARED_BYTES; None if it has no rows."""
    samples = rows_of(batch)
    if not samples:
        return None
    size = sum(each.numel() * each.element_size() for each in tree_leaves(batch) if isinstance(each, torch.Tensor))
    rows = cut(batch, samples, slice(0, max(1, min(samples, COMPARED_BYTES * samples // max(size, 1)))))
    return tree_map(lambda each: each.clone() if isinstance(each, torch.Tensor) else copy.deepcopy(each), rows)
