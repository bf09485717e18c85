"""Which samples each batch of an epoch holds: by a formula, or as a sampler of torch or of the user yields them.

A sampler is iterated once an epoch, before the epoch's first batch, with the global generators of `random`, numpy and
torch seeded by (seed, epoch). So its list of batches is a function of (seed, epoch). A sampler that remembers something
from one iteration to the next, such as a generator of its own, is iterated for each epoch in turn, also after a resume.
A torch.Generator that was passed is seeded by its own seed and the epoch, so that the order is that of its seed.
"""

import copy
import hashlib
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import STRICT_MODES, derive_seed, keep_draws, run_mode, run_say, run_seed, seed_all
from labtrain.exact.permutation import Indices, Order
from labtrain.exact.plain_values import SCALARS
from labtrain.record.digests import digest_content

Key = TypeVar("Key")
Value = TypeVar("Value")
Keys = Indices | npt.NDArray[np.object_]
SAMPLERS = torch.utils.data.sampler.__name__  # torch's own remember nothing but a torch.Generator
KEPT = 3  # epochs whose order a process keeps
CYCLE = 1 << 20  # more than the epochs of a training: a loader that begins again within an epoch has one of its own
AGAIN = 1 << 44  # more than the samples of a dataset: distinguishes the draws of a sample that comes again


@dataclass(frozen=True, slots=True, eq=False)
class Picks:
    """Samples to load.

    Attributes:
        keys: what the dataset is asked for, shape (B,): int64, or objects if a sampler yields something else.
        numbers: identify the samples' random numbers, int64 (B,): the indices, unless a sample comes twice in an epoch.
        epoch: from 0.
    """

    keys: Keys
    numbers: Indices
    epoch: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, part: slice) -> "Picks":
        numbers = self.numbers[part]
        return Picks(numbers if self.keys is self.numbers else self.keys[part], numbers, self.epoch)


def together(parts: list[Picks]) -> Picks:
    """Return the samples of several parts as one."""
    keys, numbers = (np.concatenate(each) for each in zip(*((part.keys, part.numbers) for part in parts), strict=True))
    return Picks(keys, numbers, parts[0].epoch)


class Batches(Protocol):
    """The batches of one epoch, of all devices together."""

    def __getitem__(self, number: int) -> Picks:
        """Return a batch by its number in the epoch; IndexError after the last one."""

    def __len__(self) -> int:
        """Return their number; this ends only if a sampler does."""


class Ordered:
    """Batches of one size in labtrain's own order, of which any is found at once.

    Args:
        num_samples: of the dataset.
        batch_size: of all devices together.
        shuffle: use a new order each epoch.
        drop_last: leave out a smaller last batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, shuffle: bool, drop_last: bool) -> None:
        self.num_samples, self.batch_size, self.shuffle, self.drop_last = num_samples, batch_size, shuffle, drop_last
        self._known: dict[tuple[int, int], Cut] = {}

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int) -> "Cut":
        def make() -> Cut:
            order = Order(self.num_samples, seed=run_seed(), epoch=epoch, shuffle=self.shuffle)
            return Cut(order, epoch, self.batch_size, len(self))

        return _kept(self._known, (run_seed(), epoch), make)


class Cut:
    """An order, cut into batches."""

    def __init__(self, order: Order, epoch: int, batch_size: int, number: int) -> None:
        self.order, self.epoch, self.batch_size, self.number = order, epoch, batch_size, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> Picks:
        if number >= len(self):
            raise IndexError(number)
        indices = self.order(number * self.batch_size, (number + 1) * self.batch_size)
        return Picks(indices, indices, self.epoch)


class OfFirstEpoch:
    """The batches of the first epoch, in each epoch: the same samples, with the draws of their epoch.

    Args:
        source: gives the batches of the first epoch.
    """

    def __init__(self, source: "Ordered | Sampled") -> None:
        self.source = source
        self._first: Batches | None = None

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int) -> "Again":
        if self._first is None:
            self._first = self.source.epoch(0)
        return Again(self._first, epoch)


class Again:
    """The batches of another epoch, in this one."""

    def __init__(self, batches: Batches, epoch: int) -> None:
        self.batches, self.epoch = batches, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Picks:
        picks = self.batches[number]
        return Picks(picks.keys, picks.numbers, self.epoch)


class Sampled:
    """Batches that a sampler yields.

    Args:
        sampler: a batch sampler: yields lists of keys.
        dataset: which the sampler may hold.
        generators: torch.Generators that the order comes from.
    """

    TRIED = 4  # batches, to see whether a sampler without a length remembers

    def __init__(
        self, sampler: Iterable[object], dataset: object = None, generators: Iterable[torch.Generator] = ()
    ) -> None:
        self.sampler, self.dataset = sampler, dataset
        self.generators = [(each, each.initial_seed()) for each in _distinct([*generators, *generators_of(sampler)])]
        self._known: dict[tuple[int, int], Listed] = {}
        self._next = 0  # the epoch that the sampler yields when it is iterated next, if it remembers
        self._remembers: bool | None = None
        self._left: list[str] | None = None  # of the sampler, after it was iterated

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # TypeError where it has none, as Lightning expects

    def epoch(self, epoch: int) -> "Listed":
        return _kept(self._known, (run_seed(), epoch), lambda: self._list(epoch))

    def _list(self, epoch: int) -> "Listed":
        if self._left is not None and self._left != self._look() and run_mode() != "off":
            self._refuse_changed()
        if self._remembers is None:
            self._remembers = self._is_other_the_second_time(epoch)
        if self._remembers:
            self._iterate_before(epoch)
        batches = Listed(self._iterated(epoch), epoch)
        if length_of(self.sampler) is not None:
            batches.all()
            self._left = self._look()
        return batches

    def _look(self) -> list[str]:
        """Return what shows a change of the sampler's attributes."""
        attributes = [getattr(each, "__dict__", {}) for each in self._both()]
        return [f"{name} {_print(value)}" for table in attributes for name, value in table.items()]

    def _both(self) -> tuple[object, ...]:
        """Return the batch sampler and the sampler that it takes keys from."""
        return self.sampler, getattr(self.sampler, "sampler", None)

    def _refuse_changed(self) -> None:
        what = f"code has changed {self._name()} since it was iterated, and no checkpoint holds that"
        if run_mode() in STRICT_MODES:
            hint = "compute the order in its set_epoch(epoch), or determinism.mode=warn"
            raise ConfigError(f"{what}: a resumed training would have another order", hint=hint)
        run_say(what)

    def _name(self) -> str:
        return type(self._both()[1] or self.sampler).__name__

    def _iterate_before(self, epoch: int) -> None:
        """Iterate a sampler that remembers for the epochs before this one, of which another process saw some."""
        name = self._name()
        if not self._next <= epoch < CYCLE or (epoch and length_of(self.sampler) is None):
            raise ConfigError(
                f"{name} yields another order each time it is iterated: the order of one iteration cannot be repeated",
                hint=f"give {name} __len__ and set_epoch(epoch), and compute its order from the epoch",
            )
        for passed in range(self._next, epoch):
            Listed(self._iterated(passed), passed).all()
        self._next = epoch + 1

    def _iterated(self, epoch: int) -> Iterator[object]:
        """Iterate the sampler once, with draws that depend on nothing but (seed, epoch)."""

        def begin() -> Iterator[object]:
            for generator, seed in self.generators:
                generator.manual_seed(derive_seed(seed, "order", epoch))
            for each in self._both():
                if callable(set_epoch := getattr(each, "set_epoch", None)):
                    set_epoch(epoch)
            return iter(self.sampler)

        return begin() if run_mode() == "off" else apart(begin, "sampler", epoch)

    def _is_other_the_second_time(self, epoch: int) -> bool:
        if all(type(each).__module__ == SAMPLERS for each in self._both()):
            return False
        try:
            tried = copy.deepcopy(self, {id(self.dataset): self.dataset})
        except Exception:  # a running generator or a lock inside: iterate it as torch would, once an epoch
            return True
        limit = self.TRIED if length_of(self.sampler) is None else None
        first, second = (Listed(tried._iterated(epoch), epoch).all(limit) for _ in range(2))
        return [each.keys.tolist() for each in first] != [each.keys.tolist() for each in second]


class Listed:
    """The batches that a sampler yields in one epoch, as far as they were needed.

    Args:
        batches: lists of keys.
        epoch: of these batches.
    """

    def __init__(self, batches: Iterator[object], epoch: int) -> None:
        self.epoch = epoch
        self._rest = batches
        self._found: list[Picks] = []
        self._times = Counter[object]()

    def all(self, limit: int | None = None) -> list[Picks]:
        """Return all batches, or the first ones."""
        for batch in itertools.islice(self._rest, limit):
            self._add(batch)
        return self._found

    def __getitem__(self, number: int) -> Picks:
        while len(self._found) <= number:
            try:
                self._add(next(self._rest))
            except StopIteration:
                raise IndexError(number) from None
        return self._found[number]

    def __len__(self) -> int:
        return len(self.all())

    def _add(self, batch: object) -> None:
        each = list(cast(Iterable[object], batch))
        found = np.asarray([] if any(map(_has_parts, each)) else each)
        keys: Keys
        if found.dtype.kind in "iu" and found.ndim == 1:
            keys = numbers = found.astype(np.int64)
            names: list[object] = keys.tolist()
        else:
            keys = np.fromiter(each, dtype=np.object_, count=len(each))
            names = [repr(key) for key in each]
            numbers = np.array([derive_seed("key", str(name)) % AGAIN for name in names], dtype=np.int64)
        again = []
        for name in names:
            again.append(self._times[name])
            self._times[name] += 1
        if any(again):
            numbers = numbers + np.array(again, dtype=np.int64) * AGAIN
        self._found.append(Picks(keys, numbers, self.epoch))


def apart(begin: Callable[[], Iterator[object]], *place: int | str) -> Iterator[object]:
    """Iterate with global generators of its own, seeded by the run's seed and `place`; others' draws do not matter."""
    own: Callable[[], None] | None = None
    iterator: Iterator[object] | None = None
    while True:
        put_back = keep_draws()
        try:
            if own is None:
                seed_all(run_seed(), *place)
            else:
                own()
            iterator = begin() if iterator is None else iterator
            item = next(iterator)
            own = keep_draws()
        except StopIteration:
            return
        finally:
            put_back()
        yield item


def alone(sampler: Any) -> Any:
    """Return a sampler for the whole dataset in place of a DistributedSampler, which gives each process a part of it.

    labtrain cuts each batch into the parts of the devices itself.
    """
    if isinstance(getattr(sampler, "sampler", None), DistributedSampler):
        sampler = copy.copy(sampler)
        sampler.sampler = alone(sampler.sampler)
    if not isinstance(sampler, DistributedSampler):
        return sampler
    run_say(
        f"{type(sampler).__name__} is not used: labtrain gives each device its part of each batch, so batch_size counts"
        " the samples of all devices (remove the sampler, and use shuffle=True)"
    )
    if type(sampler) is DistributedSampler:
        return RandomSampler(sampler.dataset) if sampler.shuffle else SequentialSampler(sampler.dataset)  # type: ignore[arg-type]
    whole = copy.copy(sampler)
    whole.num_replicas, whole.rank = 1, 0
    whole.num_samples = whole.total_size = len(sampler.dataset)  # type: ignore[arg-type]
    return whole


def generators_of(sampler: object) -> list[torch.Generator]:
    """Return the torch.Generators among a sampler's attributes, and those of a sampler inside it."""
    found = []
    for each in (sampler, getattr(sampler, "sampler", None)):
        found += [value for value in getattr(each, "__dict__", {}).values() if isinstance(value, torch.Generator)]
    return found


def length_of(sized: Any) -> int | None:
    """Return a loader's or sampler's length; None if it does not tell."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _kept(known: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """Return a value, made once; a few values are kept."""
    if key not in known:
        while len(known) >= KEPT:
            del known[next(iter(known))]
        known[key] = make()
    return known[key]


def _distinct(generators: list[torch.Generator]) -> list[torch.Generator]:
    return list({id(each): each for each in generators}.values())


def _print(value: object) -> str:
    """Return a text that changes with a plain value; other objects count only by their type."""
    if isinstance(value, list | tuple | set) and all(type(each) in SCALARS for each in value):
        return hashlib.sha256(pickle.dumps(value)).hexdigest()  # of a million numbers in 20 ms
    return digest_content(value)


def _has_parts(key: object) -> bool:
    return isinstance(key, list | tuple | dict | str | bytes) or getattr(key, "ndim", 0) > 0
