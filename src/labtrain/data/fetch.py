"""Loads the samples of one part of a batch, in this process or in a worker, each under its own (seed, epoch, index)."""

import gc
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import getitem
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from labtrain.base.errors import ConfigError
from labtrain.base.permissions import close_umask
from labtrain.base.signals import NUMBERS, end_with_parent
from labtrain.data.arrays import Rows
from labtrain.data.batches import Picks
from labtrain.exact.determinism import STRICT_MODES, run_mode, run_say, run_seed, seed_all
from labtrain.exact.draws import take_draws
from labtrain.exact.plain_values import is_experiments
from labtrain.record.digests import digest_content
from labtrain.record.sources import newly_executed

# A worker must not collect its parent's garbage: a process group would join threads that only the parent has, and hang
# or abort.
os.register_at_fork(after_in_child=gc.freeze)

T = TypeVar("T")

MOST_OBJECTS = 100  # of a dataset, to search for numbers


class Fetch(Dataset[object]):
    """Loads the samples of one part, each under its own (seed, epoch, index); runs in the workers.

    Args:
        dataset: map-style.
        collate: makes a batch from a list of samples; None for torch's.
        by_list: the dataset gets a list of keys and returns a batch.
        draws: the dataset draws random numbers.
        twice: load the first part of each process twice; both must be the same.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[..., object] | None,
        *,
        by_list: bool,
        draws: bool,
        twice: bool,
    ) -> None:
        self.dataset, self.collate, self.by_list = dataset, collate, by_list
        self.rows = Rows.of(dataset) if collate is None else None
        self.seed = run_seed() if run_mode() != "off" else None
        self.mode, self.twice = run_mode(), twice and run_mode() != "off"
        self.draws, self.held_to_it = draws, -1  # the epoch in which the dataset was held to draws=False
        self.after: list[object] = []  # the generators' states after each sample of the first part
        self.collated = False

    def __getitem__(self, picks: Picks) -> object:
        if self.rows is not None:
            return self.rows(picks.numbers if picks.keys is picks.numbers else picks.keys.astype(np.int64))
        try:
            if self.twice:
                loaded = self._compared(picks)
                self.twice = False
            else:
                loaded = self._collated(self._samples(picks))
            if torch.utils.data.get_worker_info() is not None and (files := newly_executed()):
                noted = loaded if isinstance(loaded, Noted) else Noted(loaded)
                return replace(noted, executed=files)
            return loaded
        except ConfigError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return error  # torch would raise it again as another exception, with this process's traceback as its text

    def _compared(self, picks: Picks) -> object:
        """Load a part twice and refuse differences: labtrain seeds only the global generators.

        A dataset that draws the first time only keeps its draws: the same in each epoch, until another worker loads
        that sample. A number that the second load changes again counts the loads; labtrain only reports that.
        """
        digests, drawn, numbers = [], [], []
        for _ in range(2):
            self.after = []
            samples = self._samples(picks)
            drawn.append(self.after)
            each = [digest_content(sample) for sample in samples]  # before collate_fn, which may change them
            batch = self._collated(samples)
            digests.append((each, digest_content(batch)))
            numbers.append(_numbers_of(self.dataset))
        (first, one), (again, other) = digests
        name, said = type(self.dataset).__name__, ""
        if first != again:
            index = next(key for key, a, b in zip(picks.keys, first, again, strict=False) if a != b)
            said = refuse_other(name, f"sample {index}, loaded twice with one seed", self.mode)
        elif drawn[0] != drawn[1]:
            index = next(key for key, a, b in zip(picks.keys, *drawn, strict=False) if a != b)
            said = refuse_other(
                name, f"the random state after sample {index}, loaded twice with one seed", self.mode, kept=True
            )
        elif one != other:
            said = refuse_other("collate_fn", "the first batch, collated twice with one seed", self.mode)
        counts = sorted(key for key, value in numbers[1].items() if numbers[0].get(key, value) != value)
        return Noted(batch, counts, said) if counts or said else batch

    def _samples(self, picks: Picks) -> list[object]:
        keys, numbers = picks.keys.tolist(), picks.numbers.tolist()
        if self.by_list:
            return [self._held(partial(getitem, self.dataset, keys), picks.epoch, numbers[0], "samples")]
        if hasattr(self.dataset, "__getitems__"):
            # One call, so one seed: of the part, which holds the same samples on any number of workers.
            return list(self._held(partial(self.dataset.__getitems__, keys), picks.epoch, numbers[0], "samples"))
        return [
            self._held(partial(getitem, self.dataset, key), picks.epoch, number, "sample")
            for key, number in zip(keys, numbers, strict=True)
        ]

    def _collated(self, samples: list[object]) -> object:
        collate = self.collate or default_collate
        if self.by_list:
            (samples,) = samples  # type: ignore[assignment]  # the dataset has joined them
        if self.seed is None or self.draws or self.collated:
            return collate(samples)
        self.collated, before, batch = True, _generators(), collate(samples)
        if _generators() != before:
            raise ConfigError(
                "draws=False, but collate_fn drew random numbers for the first batch",
                hint="remove draws=False: labtrain then seeds each batch",
            )
        return batch

    def _held(self, load: Callable[[], T], epoch: int, number: int, kind: str) -> T:
        if self.seed is None or (not self.draws and self.held_to_it == epoch):
            return load()
        seed_all(self.seed, kind, epoch, number)
        if self.draws:
            sample = load()
            if self.twice:
                self.after.append(_generators())
            return sample
        self.held_to_it, before, sample = epoch, _generators(), load()
        if _generators() != before:
            raise ConfigError(
                f"draws=False, but {type(self.dataset).__name__} drew random numbers for sample {number}",
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
            "draw from torch, random or numpy.random, which labtrain seeds for each sample in the thread that loads it;"
            " or make the generator in __getitem__: numpy.random.default_rng(torch.randint(2**62, ()).item())"
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


def _generators() -> tuple[object, ...]:
    name, keys, position, *_ = np.random.get_state(legacy=True)
    return random.getstate(), str(name), bytes(np.asarray(keys)), position, torch.get_rng_state().numpy().tobytes()


def begin_worker(parent: int, worker_init_fn: Callable[[int], object] | None, worker: int) -> None:
    """Let only the main process end this worker: schedulers signal both, and the current step must finish first."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    close_umask()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for, args=(parent,), daemon=True).start()
    end_with_parent(parent, signal.SIGKILL)
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Fetch)
    if info.dataset.mode != "off":
        take_draws(run_say)
    if worker_init_fn is not None:
        vars(info)["dataset"] = info.dataset.dataset  # the user's, not the Fetch around it
        worker_init_fn(worker)


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
