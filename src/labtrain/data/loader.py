"""The loader: torch's names, and samples that are a function of (seed, epoch, index).

labtrain seeds `random`, `numpy.random` and torch's global generator before each call of a dataset's `__getitem__`. So
an unchanged dataset with torchvision-style transforms gives the same samples with any number of workers, after a
resume, and on any number of devices. `transform` does the same for whole batches, on the device (augment.py). Rows of
arrays and memory maps of any size are taken a batch at a time (arrays.py). The loader loads the first batch twice with
one seed. If the two differ, the dataset has its own generator: strict refuses it, warn reports it. `batch_size` is
global. In a Trainer with fixed shards (strategy.py) a batch is a `Sharded`: this rank's shards. Otherwise each rank
takes its contiguous part of every batch. Nothing is padded and no sample comes twice, in training and in evaluation.
"""

import gc
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from labtrain.base.errors import ConfigError
from labtrain.base.permissions import close_umask
from labtrain.base.signals import NUMBERS, end_with_parent
from labtrain.data.arrays import Arrays, Rows, is_arrays
from labtrain.data.draws import Draws
from labtrain.data.prefetch import Copies, in_thread, on_tensors
from labtrain.data.transforms import Own, Transform, apply, with_partners
from labtrain.exact.determinism import STRICT_MODES, run_device, run_mode, run_say, run_seed, seed_all
from labtrain.exact.permutation import Indices, Order
from labtrain.exact.plain_values import SCALARS, is_experiments
from labtrain.exact.tree_sum import shard_range
from labtrain.record.digests import digest_content
from labtrain.record.sources import add_executed, newly_executed

# A worker must not collect its parent's garbage: a process group would join threads that only the parent has, and hang
# or abort.
os.register_at_fork(after_in_child=gc.freeze)

MOST_OBJECTS = 100  # of a dataset, to search for numbers

T = TypeVar("T")

Parts = list[tuple[int, Indices]]  # (shard, indices)
Plan = tuple[Indices, Parts, list[Indices]]


class Sharded:
    """One global batch, as one rank sees it. It is not a collection, so Lightning passes it on unchanged.

    Attributes:
        parts: (shard number, number of samples, data) of each shard of this rank with samples.
        samples: of the whole batch.
        shards: how many shards the whole batch is cut into.
    """

    def __init__(self, parts: list[tuple[int, int, object]], *, samples: int, shards: int) -> None:
        self.parts, self.samples, self.shards = parts, samples, shards


class DataLoader:
    """Loads batches of any map-style dataset.

    Args:
        dataset: has `__len__` and `__getitem__`, or `__getitems__`; or a tensor, an array or a memory map, a tuple of
            them, or a TensorDataset, whose rows are then taken a batch at a time.
        batch_size: samples in a batch over all devices.
        shuffle: use a new order each epoch, a function of the run's seed and the epoch.
        num_workers: processes that load; the samples do not depend on it.
        collate_fn: makes a batch from a list of samples; torch's default.
        drop_last: skip the last batch of an epoch if it is smaller.
        pin_memory: copy batches into page-locked memory; by default if there is a GPU.
        draws: False declares that the dataset draws nothing, which saves the seeding of each sample (10 microseconds).
            The loader checks this with the first sample of each epoch, and with collate_fn on the first batch.
        transform: a callable `(batch, draws) -> batch` or several, for whole batches: from labtrain.augment, or your
            own. They run in this process, on `device`.
        device: the device of the yielded batches, such as "cuda" in a notebook. By default the training's device if
            there is a transform; otherwise the CPU, from which Lightning moves them.

    Raises:
        ConfigError: batch_size, the dataset or a transform cannot be used.
    """

    def __init__(
        self,
        dataset: object,
        batch_size: int = 1,
        *,
        shuffle: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[object]], object] | None = None,
        drop_last: bool = False,
        pin_memory: bool | None = None,
        draws: bool = True,
        transform: Transform | Sequence[Transform] | None = None,
        device: torch.device | str | None = None,
        **others: object,
    ) -> None:
        if others:
            raise ConfigError(
                f"labtrain.DataLoader({next(iter(others))}=...): order and seeds come from the run's seed",
                hint="use only shuffle, num_workers, collate_fn, drop_last, pin_memory, draws, transform, device",
            )
        if not batch_size or batch_size < 1:  # torch takes None if the dataset makes its batches
            raise ConfigError(f"batch_size={batch_size}: must be at least 1", hint="data.batch_size=64")
        self.transforms = [transform] if callable(transform) else list(transform or ())
        _check_transforms(self.transforms)
        self.dataset = _map_style(dataset)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.drop_last = drop_last
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.draws = draws
        self.device = None if device is None else torch.device(device)
        self.epoch = 0
        self.sampler, self.batch_sampler = self, None  # Lightning calls loader.sampler.set_epoch(epoch)
        self.indices: Tensor = torch.empty(0, dtype=torch.int64)  # of the global batch that was yielded last
        self._start = (0, 0)
        self._shards: int | None = None
        self._place = (0, 1)
        self._loaded_before = self._transformed_before = self._said = self._said_changed = False
        self.counts: list[str] = []  # attributes of the dataset that count loads
        self.begun: dict[str, object] = {}  # its numbers and texts when the epoch began

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Skip the first `batch` batches of `epoch`: they have been trained on."""
        self._start = (epoch, batch)

    def shard(self, shards: int, *, rank: int, world: int) -> None:
        """Yield `Sharded` from now on."""
        if self.batch_size < shards:
            raise ConfigError(
                f"labtrain.DataLoader with batch_size={self.batch_size} cannot be cut into determinism.shards={shards}"
                f" (dataset: {type(self.dataset).__name__}, {len(self.dataset)} samples)",
                hint=f"set batch_size={shards} or more in train_dataloader, val_dataloader or test_dataloader; or"
                f" determinism.shards={self.batch_size}",
            )
        self._shards, self._place = shards, (rank, world)

    def calls(self, batch: int) -> int:
        """Return how often this rank calls a step for the batch of that number in its epoch."""
        if self._shards is None:
            return 1
        samples = min(self.batch_size, len(self.dataset) - batch * self.batch_size)
        return len(shard_range(len(self._cuts(samples)) - 1, *self._place))

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        if self.drop_last or not rest:
            return whole
        return whole + (self._shards is not None or len(shard_range(rest, *_place())) > 0)

    def __iter__(self) -> Iterator[object]:
        # A generator: nothing below runs before the first next(), which comes after set_epoch.
        epoch = self.epoch
        self.begun = scalars_of(self.dataset)
        order = Order(len(self.dataset), seed=run_seed(), epoch=epoch, shuffle=self.shuffle)
        first = self._start[1] if self._start[0] == epoch else 0
        plan = self._plan(order, range(first, len(self)), epoch)
        for indices, parts, data in self._made(plan, epoch, self.num_workers):
            self.indices = torch.from_numpy(indices)
            if not self._said_changed and run_mode() != "off" and (changed := self.changed()):
                self._said_changed = True
                run_say(changed[0])
            if self._shards is None:
                yield data[0]
            else:
                each = [(shard, len(part), mine) for (shard, part), mine in zip(parts, data, strict=True)]
                yield Sharded(each, samples=len(indices), shards=len(self._cuts(len(indices))) - 1)

    def changed(self) -> list[str]:
        """Return a warning for each number and text of the dataset that code has changed since the epoch began."""
        counts = {name.rpartition(".")[2] for name in self.counts}
        now = scalars_of(self.dataset)
        return [
            f"{name} of {type(self.dataset).__name__} was changed in mid-epoch, but later batches may already be loaded"
            ", and workers have a copy of the dataset: the result depends on data.num_workers, and a resumed training"
            " loads other samples (change it in on_train_epoch_end)"
            for name, value in self.begun.items()
            if name not in counts and now.get(name) != value
        ]

    def first_batch(self, epoch: int) -> Indices:
        """Return the indices of the first batch of an epoch."""
        return Order(len(self.dataset), seed=run_seed(), epoch=epoch, shuffle=self.shuffle)(0, self.batch_size)

    def load(self, groups: Iterable[Sequence[Indices]], epoch: int) -> Iterator[list[object]]:
        """Yield the data of chosen parts, each made like a shard of that epoch; a list for each group.

        If the training loads in workers, one worker loads these too: the dataset of this process does not change.
        """
        parts_of = (list(enumerate(group)) for group in groups)
        plan = ((np.concatenate([part for _, part in parts]), parts, self._loads(parts, epoch)) for parts in parts_of)
        return (data for _, _, data in self._made(plan, epoch, min(self.num_workers, 1)))

    def _plan(self, order: Order, batches: range, epoch: int) -> Iterator[Plan]:
        """Yield for each batch all its indices, the parts of this rank, and the indices to load for each part.

        These are the part's own, followed by the partners that transforms ask for.
        """
        for batch in batches:
            indices = order(batch * self.batch_size, (batch + 1) * self.batch_size)
            parts = self._parts(indices)
            yield indices, parts, self._loads(parts, epoch)

    def _loads(self, parts: Parts, epoch: int) -> list[Indices]:
        if not any(hasattr(transform, "partners") for transform in self.transforms):
            return [part for _, part in parts]
        draws = [Draws(run_seed(), epoch, torch.from_numpy(part)) for _, part in parts]
        return [with_partners(self.transforms, each, len(self.dataset)).numpy() for each in draws]

    def _made(
        self, plan: Iterator[Plan], epoch: int, num_workers: int
    ) -> Iterator[tuple[Indices, Parts, list[object]]]:
        """Yield the finished batches of a plan: loaded, on their device, transformed."""
        seed = run_seed()
        for indices, parts, data in self._on_device(self._load(plan, epoch, num_workers)):
            if self.transforms:
                data = [
                    self._transformed(part, raw, Draws(seed, epoch, load))
                    for (_, part), (raw, load) in zip(parts, data, strict=True)
                ]
            yield indices, parts, data

    def _load(
        self, plan: Iterator[Plan], epoch: int, num_workers: int
    ) -> Iterator[tuple[Indices, Parts, list[object]]]:
        """Yield the loaded batches of a plan; with transforms, each with the indices of its samples."""
        fetch = _Fetch(self, epoch, twice=not self._loaded_before)
        self._loaded_before = True
        waits = fetch.rows is not None and fetch.rows.advise(shuffle=self.shuffle)
        plan, dealt = itertools.tee(plan)
        wanted = (load for _, _, loads in dealt for load in loads)
        results: Iterator[object] = map(fetch.__getitem__, wanted)
        if waits and not num_workers:
            parts_ahead = len(shard_range(self._shards, *self._place)) if self._shards is not None else 1
            results = in_thread(fetch.__getitem__, wanted, number=parts_ahead)
        if num_workers:
            results = iter(
                torch.utils.data.DataLoader(
                    fetch,
                    batch_size=None,
                    sampler=wanted,  # all the indices of a load are an entry: fetched at once
                    num_workers=num_workers,
                    collate_fn=_as_it_is,
                    pin_memory=self.pin_memory,
                    worker_init_fn=partial(_begin_worker, os.getpid()),
                    generator=torch.Generator().manual_seed(0),  # or torch draws its workers' seed from the global one
                )
            )
        elif self.pin_memory:
            results = map(pinned, results)
        results = map(self._received, results)
        for indices, parts, loads in plan:
            if self.transforms:
                yield indices, parts, [(next(results), torch.from_numpy(load)) for load in loads]
            else:
                yield indices, parts, [next(results) for _ in loads]

    def _received(self, result: object) -> object:
        if isinstance(result, ConfigError):
            raise result
        if not isinstance(result, Noted):
            return result
        add_executed(result.executed)
        self.counts += result.counts
        if result.said and not self._said:  # once, though each worker has a sample of its own to name
            self._said = True
            run_say(result.said)  # here, and not in a worker: the receipt is this process's
        return pinned(result.batch) if self.pin_memory else result.batch

    def _on_device(self, loaded: Iterator[object]) -> Iterator[Any]:
        device = self.device
        if device is None:
            device = run_device() if self.transforms else torch.device("cpu")
        if device.type == "cuda":
            return Copies(device).of(loaded)
        return loaded if device.type == "cpu" else (on_tensors(lambda each: each.to(device), batch) for batch in loaded)

    def _transformed(self, indices: Indices, raw: object, draws: Draws) -> object:
        """Transform a part by itself, so that user code computes and draws the same on any number of devices."""
        if run_mode() == "off" or all(isinstance(each, Own) for each in self.transforms):
            return apply(self.transforms, raw, draws)
        place = (draws.seed, "transform", draws.epoch, int(indices[0]))
        if not self._transformed_before:
            self._transformed_before = True
            seed_all(*place)
            first = digest_content(apply(self.transforms, on_tensors(Tensor.clone, raw), draws))
            seed_all(*place)
            made = apply(self.transforms, raw, draws)
            if digest_content(made) != first:
                run_say(refuse_other("transform", "the first batch, transformed twice with one seed"))
            return made
        seed_all(*place)
        return apply(self.transforms, raw, draws)

    def shard_sizes(self) -> tuple[list[int], list[int]]:
        """Return the samples of each shard of a whole batch and of a smaller last one; empty if an epoch has none."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        sizes = self.batch_size if whole else 0, 0 if self.drop_last else rest
        whole_cuts, last_cuts = (self._cuts(size) if self._shards is not None and size else [] for size in sizes)
        return np.diff(whole_cuts).tolist(), np.diff(last_cuts).tolist()

    def _cuts(self, samples: int) -> list[int]:
        """Return where a batch is cut: evenly; a smaller last batch into as many shards as have two samples each."""
        assert self._shards is not None
        shards = self._shards if samples == self.batch_size else max(1, min(self._shards, samples // 2))
        return [samples * shard // shards for shard in range(shards + 1)]

    def _parts(self, indices: Indices) -> Parts:
        """Return (shard, indices) of each part of one batch that this rank loads."""
        if self._shards is None:
            part = shard_range(len(indices), *_place())
            return [(0, indices[part.start : part.stop])]
        cuts = self._cuts(len(indices))
        mine = shard_range(len(cuts) - 1, *self._place)
        return [(shard, indices[cuts[shard] : cuts[shard + 1]]) for shard in mine]


class _Fetch(Dataset[object]):
    """Loads the samples of one part, each under its own (seed, epoch, index); runs in the workers.

    Args:
        loader: whose dataset and collate_fn it calls.
        epoch: from 0.
        twice: load the first part of each process twice; both must be the same.
    """

    def __init__(self, loader: DataLoader, epoch: int, *, twice: bool) -> None:
        self.dataset: object = loader.dataset
        self.collate = loader.collate_fn
        self.rows = Rows.of(self.dataset) if self.collate is None else None
        self.seed = run_seed() if run_mode() != "off" else None
        self.mode, self.twice = run_mode(), twice and run_mode() != "off"
        self.draws, self.epoch, self.held_to_it = loader.draws, epoch, False
        self.after: list[object] = []  # the generators' states after each sample of the first part
        self.collated = False

    def __getitem__(self, indices: Indices) -> object:
        if self.rows is not None:
            return self.rows(indices)
        try:
            if self.twice:
                loaded = self._compared(indices)
                self.twice = False
            else:
                loaded = self._collated(self._samples(indices))
            if torch.utils.data.get_worker_info() is not None and (files := newly_executed()):
                noted = loaded if isinstance(loaded, Noted) else Noted(loaded)
                return replace(noted, executed=files)
            return loaded
        except ConfigError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error  # torch would raise it again as another exception, with this process's traceback as its text

    def _compared(self, indices: Indices) -> object:
        """Load a part twice and refuse differences: labtrain seeds only the global generators.

        A dataset that draws the first time only keeps its draws: the same in each epoch, until another worker loads
        that sample. A number that the second load changes again counts the loads; labtrain only reports that.
        """
        digests, drawn, numbers = [], [], []
        for _ in range(2):
            self.after = []
            samples = self._samples(indices)
            drawn.append(self.after)
            each = [digest_content(sample) for sample in samples]  # before collate_fn, which may change them
            batch = self._collated(samples)
            digests.append((each, digest_content(batch)))
            numbers.append(_numbers_of(self.dataset))
        (first, one), (again, other) = digests
        name, said = type(self.dataset).__name__, ""
        if first != again:
            index = next(index for index, a, b in zip(indices, first, again, strict=True) if a != b)
            said = refuse_other(name, f"sample {index}, loaded twice with one seed", self.mode)
        elif drawn[0] != drawn[1]:
            index = next(index for index, a, b in zip(indices, *drawn, strict=False) if a != b)
            said = refuse_other(
                name, f"the random state after sample {index}, loaded twice with one seed", self.mode, kept=True
            )
        elif one != other:
            said = refuse_other("collate_fn", "the first batch, collated twice with one seed", self.mode)
        counts = sorted(key for key, value in numbers[1].items() if numbers[0].get(key, value) != value)
        return Noted(batch, counts, said) if counts or said else batch

    def _samples(self, indices: Indices) -> list[object]:
        if hasattr(self.dataset, "__getitems__"):
            # One call, so one seed: of the part, which holds the same samples on any number of workers.
            return list(self._held(partial(self.dataset.__getitems__, indices.tolist()), int(indices[0]), "samples"))
        return [self._held(partial(getitem, self.dataset, index), index, "sample") for index in indices.tolist()]

    def _collated(self, samples: list[object]) -> object:
        collate = self.collate or default_collate
        if self.seed is None or self.draws or self.collated:
            return collate(samples)
        self.collated, before, batch = True, _generators(), collate(samples)
        if _generators() != before:
            raise ConfigError(
                "draws=False, but collate_fn drew random numbers for the first batch",
                hint="remove draws=False: labtrain then seeds each batch",
            )
        return batch

    def _held(self, load: Callable[[], T], index: int, kind: str) -> T:
        if self.seed is None or (not self.draws and self.held_to_it):
            return load()
        seed_all(self.seed, kind, self.epoch, index)
        if self.draws:
            sample = load()
            if self.twice:
                self.after.append(_generators())
            return sample
        self.held_to_it, before, sample = True, _generators(), load()
        if _generators() != before:
            raise ConfigError(
                f"draws=False, but {type(self.dataset).__name__} drew random numbers for sample {index}",
                hint="remove draws=False: labtrain then seeds each sample",
            )
        return sample


@dataclass(frozen=True, slots=True)
class Noted:
    """A batch, with messages to the training's process.

    Attributes:
        batch: the loaded batch.
        counts: the names of the dataset's attributes that count loads.
        said: a warning.
        executed: files of code that a worker has executed.
    """

    batch: object
    counts: Sequence[str] = ()
    said: str = ""
    executed: Sequence[str] = ()


class StatefulLoader:
    """Wraps a loader that can save its position, so that a resume can restore it: torchdata's, mosaicml-streaming's.

    The Trainer may fetch a batch ahead of the one that it trains on. So the wrapper keeps the state after each of the
    last two batches.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.sampler, self.batch_sampler = self, None  # Lightning calls loader.sampler.set_epoch(epoch)
        self.states: dict[int, object] = {}  # by the number of batches of this epoch that were yielded
        self.epoch = 0
        self._start = (-1, 0)
        self._state: object = None
        self._ended = False
        self.exhausted = False  # it was asked for another batch in this epoch, but had no more

    def __len__(self) -> int:
        return len(self.loader)  # TypeError where it has none, as Lightning expects

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch of the loader or its sampler."""
        self.epoch = epoch
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def start_at(self, epoch: int, batch: int, *, state: object, ended: bool, exhausted: bool = True) -> None:
        """Resume from a state.

        Args:
            epoch: the epoch of the state.
            batch: the number of its batches before the state.
            state: from a loader of this class.
            ended: the epoch of the training ended with that batch.
            exhausted: the loader was asked for another batch, but had no more.
        """
        self._start, self._state, self._ended, self.epoch = (epoch, batch), state, ended, epoch
        self.exhausted = exhausted

    def __iter__(self) -> Iterator[object]:
        epoch, done = self._start
        if self.epoch == epoch and self._ended:
            return
        if self.epoch == epoch or (self._ended and self.epoch == epoch + 1):
            self.loader.load_state_dict(self._state)
            if self._ended and self._ends_again():
                self.loader.load_state_dict(self._state)
        done = done if self.epoch == epoch else 0
        self.exhausted = False
        for batch in self.loader:
            done += 1
            self.states = {number: state for number, state in self.states.items() if number == done - 1}
            self.states[done] = self.loader.state_dict()
            yield batch
        self.exhausted = True

    def _ends_again(self) -> bool:
        """Move the loader to the end of an epoch whose last batch another process has trained.

        Its state was taken before the end. torchdata's loader first gives the rest of that epoch, which is empty, then
        starts the next one. Lightning asks for one more batch only if the loader has no length. Under
        `limit_train_batches` it does not ask, and the next epoch starts there.

        Returns:
            whether that gave a batch of the next epoch: some loaders start it at once.
        """
        rest, nothing = iter(self.loader), object()
        if _length(self.loader) is not None or not self.exhausted:
            return False
        return next(rest, nothing) is not nothing


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def is_stateful(loader: object) -> bool:
    """Return whether a loader can save and restore its position."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def refuse_other(who: str, what: str, mode: str | None = None, *, kept: bool = False) -> str:
    """Refuse a difference between two loads in strict mode; in warn mode return the warning.

    Args:
        who: the class or function that differs.
        what: the part that differs.
        mode: of the run, if this process does not know it.
        kept: the second load drew other numbers, or none.

    Raises:
        ConfigError: in strict and portable.
    """
    if kept:
        why = "it caches its first random numbers, so samples depend on workers, devices and kills"
        hint = "cache samples before they are augmented, and augment them each time"
    else:
        why = "it has its own random generator, or depends on something that changes"
        hint = (
            "draw from torch, random or numpy.random, which labtrain seeds for each sample; or make the generator in"
            " __getitem__: numpy.random.default_rng(torch.randint(2**62, ()).item())"
        )
    text = f"{who}: {what}, differs: {why}"
    if (mode or run_mode()) in STRICT_MODES:
        raise ConfigError(text, hint=f"{hint}; or determinism.mode=warn")
    return text


def _numbers_of(dataset: object) -> dict[str, int | float]:
    """Return the numbers among the attributes of a dataset and of the experiment's objects in it, by name."""
    found: dict[str, int | float] = {}
    waiting, seen = [(type(dataset).__name__, dataset)], set[int]()
    for path, each in waiting:
        if id(each) in seen or len(seen) > MOST_OBJECTS:
            continue
        seen.add(id(each))
        for name, value in getattr(each, "__dict__", {}).items():
            if type(value) in (int, float):
                found[f"{path}.{name}"] = value
            parts = value if isinstance(value, list | tuple) and len(value) < MOST_OBJECTS else [value]
            waiting += [
                (f"{path}.{name}", part) for part in parts if isinstance(part, Dataset) or is_experiments(type(part))
            ]
    return found


def scalars_of(dataset: object) -> dict[str, object]:
    """Return the numbers and texts among a dataset's attributes, by name."""
    attributes = getattr(dataset, "__dict__", {})
    return {name: value for name, value in attributes.items() if type(value) in SCALARS}


def _generators() -> tuple[object, ...]:
    name, keys, position, *_ = np.random.get_state(legacy=True)
    return random.getstate(), str(name), bytes(np.asarray(keys)), position, torch.get_rng_state().numpy().tobytes()


def _as_it_is(sample: object) -> object:
    return sample


def _map_style(dataset: Any) -> Any:
    """Return a dataset that gives samples by index: arrays become a dataset of their rows."""
    if is_arrays(dataset):
        return Arrays(dataset)
    if not (hasattr(dataset, "__len__") and (hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__"))):
        raise ConfigError(
            f"{type(dataset).__name__} is not a map-style dataset", hint="give it __len__ and __getitem__"
        )
    return dataset


def _check_transforms(transforms: Sequence[object]) -> None:
    for each in transforms:
        if not callable(each) or isinstance(each, type):
            raise ConfigError(
                f"transform={each!r}: must be a callable (batch, draws) -> batch",
                hint="transform=[labtrain.augment.Shift(2), labtrain.augment.Scale()]",
            )


def _begin_worker(parent: int, _worker: int) -> None:
    """Let only the main process end this worker: schedulers signal both, and the current step must finish first."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    close_umask()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for, args=(parent,), daemon=True).start()
    end_with_parent(parent, signal.SIGKILL)


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _place() -> tuple[int, int]:
    """Return (rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
