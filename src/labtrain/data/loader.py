"""The loader: torch's names, and samples that are a function of (seed, epoch, index).

labtrain seeds `random`, `numpy.random` and torch's global generator before each call of a dataset's `__getitem__`. So
an unchanged dataset with torchvision-style transforms gives the same samples with any number of workers, after a
resume, and on any number of devices. `transform` does the same for whole batches, on the device (augment.py). Rows of
arrays and memory maps of any size are taken a batch at a time (arrays.py). The loader loads the first batch twice with
one seed. If the two differ, the dataset has its own generator: strict refuses it, warn reports it. Which samples a
batch holds: batches.py; what loads them: fetch.py. from_torch.py makes such a loader of torch's. `batch_size` is
global. In a Trainer with fixed shards (strategy.py) a batch is a `Sharded`: this rank's shards. Otherwise each rank
takes its contiguous part of every batch. Nothing is padded and no sample comes twice, in training and in evaluation.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, default_convert
from torch.utils.data._utils.pin_memory import pin_memory

from labtrain.base.errors import ConfigError
from labtrain.data.arrays import Arrays, is_arrays
from labtrain.data.batches import Batches, OfFirstEpoch, Ordered, Picks, Sampled, alone, together
from labtrain.data.draws import Draws
from labtrain.data.fetch import Fetch, Noted, begin_worker, refuse_other
from labtrain.data.prefetch import Copies, in_thread, on_tensors
from labtrain.data.sharded import Loader, Sharded, cuts, number_of_shards
from labtrain.data.transforms import Own, Transform, apply, with_partners
from labtrain.exact.determinism import run_device, run_mode, run_say, run_seed, seed_all
from labtrain.exact.permutation import Indices
from labtrain.exact.plain_values import SCALARS
from labtrain.exact.tree_sum import shard_range
from labtrain.record.digests import digest_content
from labtrain.record.sources import add_executed

Parts = list[tuple[int, Picks]]  # (shard, its samples)
Plan = tuple[Picks, int, Parts, list[Picks]]
Made = tuple[Picks, int, Parts, list[Any]]


# Passed on to torch: they change no sample. Despite persistent_workers, new workers start each epoch: they see what the
# training has changed in the dataset, as after a resume. Despite in_order=False, batches come in the sampler's order.
WORKERS = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


class DataLoader(Loader):
    """Loads batches of any map-style dataset.

    Args:
        dataset: has `__len__` and `__getitem__`, or `__getitems__`; or a tensor, an array or a memory map, a tuple of
            them, or a TensorDataset, whose rows are then taken a batch at a time.
        batch_size: samples in a batch over all devices; None if `sampler` is a BatchSampler whose lists of keys the
            dataset gets, to return a batch.
        shuffle: use a new order each epoch, a function of the run's seed and the epoch.
        sampler: yields the dataset's keys in the order of an epoch. labtrain seeds what it draws by (seed, epoch).
        batch_sampler: yields the list of keys of each batch.
        num_workers: processes that load; the samples do not depend on it.
        collate_fn: makes a batch from a list of samples; torch's default.
        pin_memory: copy batches into page-locked memory; by default if there is a GPU.
        drop_last: skip the last batch of an epoch if it is smaller.
        draws: False declares that the dataset draws nothing, which saves the seeding of each sample (10 microseconds).
            The loader checks this with the first sample of each epoch, and with collate_fn on the first batch.
        transform: a callable `(batch, draws) -> batch` or several, for whole batches: from labtrain.augment, or your
            own. They run in this process, on `device`.
        device: the device of the yielded batches, such as "cuda" in a notebook. By default the training's device if
            there is a transform; otherwise the CPU, from which Lightning moves them.
        generator: the order is a function of its seed and the epoch, instead of the run's seed.
        of_workers: torch's other arguments, such as timeout and worker_init_fn.

    Raises:
        ConfigError: batch_size, the dataset or a transform cannot be used.
    """

    def __init__(
        self,
        dataset: object,
        batch_size: int | None = 1,
        *,
        shuffle: bool | None = False,
        sampler: Iterable[object] | None = None,
        batch_sampler: Iterable[object] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[..., object] | None = None,
        pin_memory: bool | None = None,
        drop_last: bool = False,
        draws: bool = True,
        transform: Transform | Sequence[Transform] | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        **of_workers: Any,
    ) -> None:
        super().__init__()
        if batch_sampler is None and (not isinstance(sampler, BatchSampler) if batch_size is None else batch_size < 1):
            raise ConfigError(f"batch_size={batch_size}: must be at least 1", hint="data.batch_size=64")
        self.transforms = [transform] if callable(transform) else list(transform or ())
        _check_transforms(self.transforms)
        self.dataset = _map_style(dataset, sized=sampler is None and batch_sampler is None)
        order: Any = {"shuffle": shuffle, "sampler": sampler, "batch_sampler": batch_sampler, "drop_last": drop_last}
        _check_as_torch(batch_size, num_workers, **order, **of_workers)
        self.batch_size = batch_size if batch_sampler is None else None
        self.shuffle = bool(shuffle)
        self.num_workers = num_workers
        self.collate_fn = collate_fn
        self.drop_last = drop_last
        self.of_workers = {name: value for name, value in of_workers.items() if name in WORKERS}
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.draws = draws
        self.device = None if device is None else torch.device(device)
        self.by_list = self.batch_size is None and batch_sampler is None  # the dataset gets a list of keys
        if self.by_list and collate_fn is None:
            self.collate_fn = default_convert
        made = source_of(self.dataset, self.batch_size, generator=generator, **order)
        self.source: Ordered | Sampled | OfFirstEpoch = made
        self._least = 1  # samples of a batch
        self._loaded_before = self._transformed_before = self._said = self._said_changed = False
        self.counts: list[str] = []  # attributes of the dataset that count loads
        self.begun: dict[str, object] = {}  # its numbers and texts when the epoch began

    def take_same_batches(self) -> None:
        super().take_same_batches()
        if isinstance(self.source, Ordered):
            size, drop_last = self.source.batch_size, self.source.drop_last
            self.source = Ordered(self.source.num_samples, size, shuffle=False, drop_last=drop_last)
        elif isinstance(self.source, Sampled):
            self.source = OfFirstEpoch(self.source)

    def shard(self, shards: int, *, rank: int, world: int) -> None:
        super().shard(shards, rank=rank, world=world)
        if self.batch_size is not None and self.batch_size < world:
            run_say(
                f"a loader of batch_size={self.batch_size} over {type(self.dataset).__name__}: each batch leaves"
                f" {world - self.batch_size} of {world} devices idle"
            )

    def need_each_rank(self, world: int, *, most: float) -> None:
        """Refuse batches with fewer samples than ranks. The other ranks would wait for one without samples.

        Args:
            world: number of ranks.
            most: how many batches of an epoch are used: a number, or 1.0 for all, as Lightning's limits.

        Raises:
            ConfigError: an epoch has such a batch. If only a sampler knows, the iteration raises it.
        """
        self._least = world
        if isinstance(self.source, Ordered) and (most == 1.0 or most >= len(self.source)):
            whole, rest = divmod(len(self.dataset), self.source.batch_size)
            self._refuse_small(self.source.batch_size if whole and (not rest or self.drop_last) else rest)

    def _refuse_small(self, samples: int) -> None:
        if samples < self._least:
            raise ConfigError(
                f"a batch of {type(self.dataset).__name__} has {samples} sample{'s' if samples != 1 else ''} for"
                f" {self._least} devices: without determinism.shards each device needs a part of each batch",
                hint="labtrain.DataLoader(..., drop_last=True), another batch_size, or trainer.devices=1",
            )

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in an epoch; TypeError if a sampler has no length."""
        number = len(self.source)
        if self._shards is None and isinstance(self.source, Ordered) and not self.drop_last:
            rest = len(self.dataset) % self.source.batch_size
            return number - (rest > 0 and not shard_range(rest, *_place()))
        return number

    def indices_of(self, batch: int) -> Indices:
        """Return the indices of a batch of this epoch, of all ranks; other keys of a sampler give their hashes."""
        return self.source.epoch(self.epoch)[batch].numbers

    def __iter__(self) -> Iterator[object]:
        # A generator: nothing below runs before the first next(), which comes after set_epoch.
        batches = counted(self.source.epoch(self.epoch), self._skipped())
        yield from self.along((picks, self.shards_of(len(picks))) for picks in batches)

    def along(self, batches: Iterable[tuple[Picks, int]]) -> Iterator[object]:
        """Yield chosen batches, each with the number of its shards."""
        self.begun = scalars_of(self.dataset)
        for picks, shards, parts, data in self._made(map(self._planned, batches), self.num_workers):
            if not self._said_changed and run_mode() != "off" and (changed := self.changed()):
                self._said_changed = True
                run_say(changed[0])
            if self._shards is not None:
                each = [(shard, len(part), mine) for (shard, part), mine in zip(parts, data, strict=True)]
                yield Sharded(each, samples=len(picks), shards=shards)
            elif parts[0][1]:  # of a smaller last batch, ranks without shards may get nothing
                yield data[0]

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

    def shards_in(self, epoch: int, batch: int = 0) -> list[Picks]:
        """Return the samples of each shard of a batch of an epoch."""
        picks = self.source.epoch(epoch)[batch]
        return cut(picks, self.shards_of(len(picks)))

    def load(self, groups: Iterable[Sequence[Picks]]) -> Iterator[list[object]]:
        """Yield the data of chosen parts, each made like a shard; a list for each group.

        If the training loads in workers, one worker loads these too: the dataset of this process does not change.
        """
        parts_of = (list(enumerate(group)) for group in groups)
        plan = ((together([part for _, part in parts]), 0, parts, self._loads(parts)) for parts in parts_of)
        return (data for *_, data in self._made(plan, min(self.num_workers, 1)))

    def _planned(self, batch: tuple[Picks, int]) -> Plan:
        """Return a batch's samples, the number of its shards, the parts of this rank, and what to load for each part.

        These are the part's samples, followed by the partners that transforms ask for.
        """
        picks, shards = batch
        if self._shards is None:
            self._refuse_small(len(picks))
            mine = shard_range(len(picks), *_place())
            parts = [(0, picks[mine.start : mine.stop])]
        else:
            whole = cut(picks, shards)
            parts = [(shard, whole[shard]) for shard in shard_range(shards, *self._place)]
        return picks, shards, parts, self._loads(parts)

    def _loads(self, parts: Parts) -> list[Picks]:
        if not any(hasattr(transform, "partners") for transform in self.transforms):
            return [part for _, part in parts]
        loads = []
        for _, part in parts:
            draws = Draws(run_seed(), part.epoch, torch.from_numpy(part.numbers))
            partners = with_partners(self.transforms, draws, len(self.dataset)).numpy()[len(part) :]
            loads.append(together([part, Picks(partners, partners, part.epoch)]))
        return loads

    def _made(self, plan: Iterable[Plan], num_workers: int) -> Iterator[Made]:
        """Yield the finished batches of a plan: loaded, on their device, transformed."""
        seed = run_seed()
        for picks, shards, parts, data in self._on_device(self._load(plan, num_workers)):
            if self.transforms:
                data = [
                    self._transformed(part, raw, Draws(seed, part.epoch, load))
                    for (_, part), (raw, load) in zip(parts, data, strict=True)
                ]
            yield picks, shards, parts, data

    def _load(self, plan: Iterable[Plan], num_workers: int) -> Iterator[Made]:
        """Yield the loaded batches of a plan; with transforms, each with the numbers of its samples."""
        first_time, self._loaded_before = not self._loaded_before, True
        fetch = Fetch(self.dataset, self.collate_fn, by_list=self.by_list, draws=self.draws, twice=first_time)
        waits = fetch.rows is not None and fetch.rows.advise(shuffle=self.shuffle)
        plan, dealt = itertools.tee(plan)
        wanted = (load for *_, loads in dealt for load in loads)
        parts_ahead = len(shard_range(self._shards, *self._place)) if self._shards is not None else 1
        results: Iterator[object] = map(fetch.__getitem__, wanted)
        if num_workers:
            results = self._in_workers(fetch, wanted, num_workers, parts_ahead)
        elif waits:
            results = in_thread(fetch.__getitem__, wanted, number=parts_ahead)
        if self.pin_memory and not num_workers:
            results = map(pinned, results)
        results = map(self._received, results)
        for picks, shards, parts, loads in plan:
            data = [next(results) for _ in loads]
            if self.transforms:
                data = [(each, torch.from_numpy(load.numbers)) for each, load in zip(data, loads, strict=True)]
            yield picks, shards, parts, data

    def _in_workers(
        self, fetch: Fetch, wanted: Iterator[Picks], num_workers: int, parts_ahead: int
    ) -> Iterator[object]:
        options = dict(self.of_workers)
        if options.get("prefetch_factor") is not None:
            options["prefetch_factor"] *= max(1, parts_ahead)  # of batches
        begin = partial(begin_worker, os.getpid(), options.pop("worker_init_fn", None))
        return iter(
            torch.utils.data.DataLoader(
                fetch,
                batch_size=None,
                sampler=wanted,  # all the samples of a load are an entry: fetched at once
                num_workers=num_workers,
                collate_fn=_unchanged,
                pin_memory=self.pin_memory,
                worker_init_fn=begin,
                generator=torch.Generator().manual_seed(0),  # or torch draws its workers' seed from the global one
                **options,
            )
        )

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

    def _transformed(self, part: Picks, raw: object, draws: Draws) -> object:
        """Transform a part by itself, so that user code computes and draws the same on any number of devices."""
        if run_mode() == "off" or all(isinstance(each, Own) for each in self.transforms):
            return apply(self.transforms, raw, draws)
        place = (draws.seed, "transform", draws.epoch, int(part.numbers[0]))
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
        """Return the samples of each shard of a whole batch and of a smaller last one; empty if an epoch has none.

        Both are empty if a sampler decides.
        """
        if not isinstance(self.source, Ordered):
            return [], []
        whole, rest = divmod(len(self.dataset), self.source.batch_size)
        sizes = self.source.batch_size if whole else 0, 0 if self.drop_last else rest
        whole_cuts, last_cuts = (cuts(size, self.shards_of(size)) if self._shards and size else [] for size in sizes)
        return [b - a for a, b in itertools.pairwise(whole_cuts)], [b - a for a, b in itertools.pairwise(last_cuts)]

    def shards_of(self, samples: int) -> int:
        """Return into how many shards a batch is cut."""
        return number_of_shards(samples, batch_size=self.batch_size, most=self._shards or 1)

    def samples_of(self, batch: int) -> int:
        return len(self.indices_of(batch))

    def _shards_in(self, batch: int) -> int:
        return self.shards_of(self.samples_of(batch))


def cut(picks: Picks, shards: int) -> list[Picks]:
    """Return the samples of each shard of a batch."""
    return [picks[start:stop] for start, stop in itertools.pairwise(cuts(len(picks), shards))]


def counted(batches: Batches, first: int) -> Iterator[Picks]:
    """Yield an epoch's batches from a number on."""
    for number in itertools.count(first):
        try:
            picks = batches[number]
        except IndexError:
            return
        yield picks


def source_of(
    dataset: Any,
    batch_size: int | None,
    *,
    shuffle: bool | None,
    sampler: Iterable[object] | None,
    batch_sampler: Iterable[object] | None,
    drop_last: bool,
    generator: torch.Generator | None,
) -> Ordered | Sampled:
    """Return what gives the batches of each epoch, for torch's arguments."""
    if generator is not None and shuffle:
        sampler = torch.utils.data.RandomSampler(dataset, generator=generator)
    if batch_sampler is None and sampler is not None:
        batch_sampler = sampler if batch_size is None else BatchSampler(sampler, batch_size, drop_last)  # type: ignore[arg-type]
    if batch_sampler is not None:
        return Sampled(alone(batch_sampler), dataset, [] if generator is None else [generator])
    assert batch_size is not None
    return Ordered(len(dataset), batch_size, shuffle=bool(shuffle), drop_last=drop_last)


def pinned(batch: object) -> object:
    """Return a batch in page-locked memory; one that is on a GPU already is returned unchanged."""
    there = any(isinstance(each, Tensor) and not each.is_cpu for each in tree_leaves(batch))
    return batch if there else pin_memory(batch)


def _unchanged(loaded: object) -> object:
    return loaded


def _map_style(dataset: Any, *, sized: bool) -> Any:
    """Return a dataset that gives samples by index: arrays become a dataset of their rows."""
    if is_arrays(dataset):
        return Arrays(dataset)
    wanted = ("__len__", "__getitem__") if sized else ("__getitem__",)
    if not all(hasattr(dataset, name) for name in wanted):
        raise ConfigError(
            f"{type(dataset).__name__} is not a map-style dataset", hint=f"give it {' and '.join(wanted)}"
        )
    return dataset


def _check_as_torch(batch_size: int | None, num_workers: int, **options: object) -> None:
    """Raise ConfigError for arguments that torch does not take together, in torch's words."""
    try:
        torch.utils.data.DataLoader(range(1), batch_size, num_workers=num_workers, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"labtrain.DataLoader: {error}", hint="arguments have the meaning of torch.utils.data.DataLoader's"
        ) from None


def _check_transforms(transforms: Sequence[object]) -> None:
    for each in transforms:
        if not callable(each) or isinstance(each, type):
            raise ConfigError(
                f"transform={each!r}: must be a callable (batch, draws) -> batch",
                hint="transform=[labtrain.augment.Shift(2), labtrain.augment.Scale()]",
            )


def scalars_of(dataset: object) -> dict[str, object]:
    """Return the numbers and texts among a dataset's attributes, by name."""
    attributes = getattr(dataset, "__dict__", {})
    return {name: value for name, value in attributes.items() if type(value) in SCALARS}


def _place() -> tuple[int, int]:
    """Return (rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
