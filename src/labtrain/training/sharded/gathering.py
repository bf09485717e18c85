"""Gathers lists of outputs, one item a call of a step, from all ranks at an epoch's end.

Each rank's list has the items of its shards. Their number in each batch follows from the loader and the number of
batches, so steps count nothing. A checkpoint holds the items of all ranks, and a resumed training gives each rank those
of its shards.

Lightning 2.6: loops/training_epoch_loop.py and loops/evaluation_loop.py, for the number of batches.
"""

import operator
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from labtrain.base.errors import ConfigError
from labtrain.data.sharded import Loader
from labtrain.exact.attributes import plain_attributes
from labtrain.exact.collate import received, to_send
from labtrain.exact.plain_values import is_plain
from labtrain.training.lightning import eval_loaders, evaluation_loop, train_loaders

Path = tuple[object, ...]  # an attribute's dotted name, then the keys that lead to a list
Calls = list[list[int]]  # calls[loader][batch]: how often this rank's step was called

_filled: set[int] = set()  # ids of lists that have the items of all ranks now
_trainer: weakref.ref[pl.Trainer] | None = None


def enter(trainer: pl.Trainer | None) -> None:
    """Remember the trainer in whose epochs `gather_outputs` is called; None forgets it."""
    global _trainer
    _trainer = None if trainer is None else weakref.ref(trainer)


def gather_outputs(outputs: list[object]) -> list[object]:
    """Return the items of all ranks, in the order of batches and shards; call it on every rank at an epoch's end.

    Args:
        outputs: of this rank: one item for each call of the epoch's step, or for each call with one of several
            loaders. Tensors, numbers, strings, and lists, tuples and dicts of those.

    Returns:
        A new list, the same on every rank.

    Raises:
        ConfigError: the number of items is not the number of calls.
    """
    if id(outputs) in _filled:
        return list(outputs)
    trainer = _trainer() if _trainer is not None else None
    calls = calls_of(trainer) if trainer is not None else [[1] * len(outputs)]
    if trainer is not None and trainer.training and trainer.world_size > 1:
        _check_resumed(trainer)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        _order([len(outputs)], [calls], trainer)
        return list(outputs)
    device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
    mine = calls, len(outputs), to_send(outputs)
    ranks = [mine] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    order = _order([length for _, length, _ in ranks], [calls for calls, _, _ in ranks], trainer)
    own = dist.get_rank()
    items = [outputs if rank == own else received(sent, device) for rank, (*_, sent) in enumerate(ranks)]
    return [items[rank][number] for rank, number in order]


@contextmanager
def made_whole(trainer: pl.Trainer, grown: set[str]) -> Iterator[list[Path]]:
    """Fill the model's lists of this epoch's outputs with the items of all ranks, during a save; on every rank.

    Args:
        trainer: in the middle of a training epoch, with shards.
        grown: the attributes with lists that steps append to.

    Yields:
        the paths of these lists: those of rank 0 with one item a call.
    """
    filled = fill(trainer, {path for path in lists_of(trainer.lightning_module) if path[0] in grown})
    try:
        yield list(filled.own)
    finally:
        filled.put_back()


class Appended:
    """Tells which lists of a model the steps of an evaluation append to: hooks append items of whole batches.

    Attributes:
        paths: of these lists.
    """

    def __init__(self) -> None:
        self.paths: set[Path] = set()
        self._loaders: set[int] = set()

    @contextmanager
    def watch(self, module: torch.nn.Module, *, loader: int, batch: int) -> Iterator[None]:
        """Compare the lists around the first step of each loader.

        Args:
            module: the model.
            loader: of the batch.
            batch: its number in the evaluation.
        """
        if not batch:
            self.paths, self._loaders = set(), set()
        if loader in self._loaders:
            yield
            return
        self._loaders.add(loader)
        before = {path: len(items) for path, items in lists_of(module).items()}
        yield
        self.paths |= {path for path, items in lists_of(module).items() if len(items) > before.get(path, 0)}


class Filled:
    """Lists that have the items of all ranks for a while.

    Args:
        lists: the lists, by path.
        own: the items of this rank.
    """

    def __init__(self, lists: dict[Path, list[object]], own: dict[Path, list[object]]) -> None:
        self.lists, self.own = lists, own
        self.whole = {path: list(items) for path, items in lists.items()}
        _filled.update(map(id, lists.values()))

    def put_back(self) -> None:
        """Leave this rank's items in the lists that still have those of all ranks."""
        for path, items in self.lists.items():
            _filled.discard(id(items))
            if len(items) == len(self.whole[path]) and all(map(operator.is_, items, self.whole[path])):
                items[:] = self.own[path]


def fill(trainer: pl.Trainer, paths: Collection[Path]) -> Filled:
    """Fill lists with the items of all ranks; on every rank.

    Only lists of plain values and tensors, with one item for each call of the step on each rank, or for
    each call with one of several loaders.

    Args:
        trainer: in or at the end of an epoch, with shards.
        paths: of lists that steps of this rank append to; those of rank 0 count.
    """
    lists = lists_of(trainer.lightning_module)
    mine = paths, calls_of(trainer), {path: len(items) for path, items in lists.items() if is_plain(items)}
    ranks = [mine] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(ranks, mine)
    by_loader = [[sum(of_loader) for of_loader in of_rank] for _, of_rank, _ in ranks]
    calls = [list(map(sum, by_loader)), *map(list, zip(*by_loader, strict=True))]  # of all loaders, and of each
    found = [path for path in ranks[0][2] if path in ranks[0][0] and [each.get(path) for *_, each in ranks] in calls]
    own: dict[Path, list[object]] = {}
    for path in found:
        with suppress(ConfigError):  # several loaders fit the number of items: gather_outputs in the hook says so
            whole = gather_outputs(lists[path])
            own[path], lists[path][:] = list(lists[path]), whole
    return Filled({path: lists[path] for path in own}, own)


def leave_own(trainer: pl.Trainer, paths: list[Path]) -> None:
    """Keep only this rank's items in lists that hold the items of all ranks; called on every rank."""
    if trainer.world_size == 1 or not paths:
        return
    calls: list[Calls] = [[]] * trainer.world_size
    dist.all_gather_object(calls, calls_of(trainer))
    order = _order([sum(map(sum, of_rank)) for of_rank in calls], calls, trainer)
    lists = lists_of(trainer.lightning_module)
    for path in paths:
        items = lists[path]
        items[:] = [item for item, (rank, _) in zip(items, order, strict=True) if rank == trainer.global_rank]


def lists_of(module: torch.nn.Module) -> dict[Path, list[object]]:
    """Return the lists among a model's plain attributes, and those in dicts there."""
    found: dict[Path, list[object]] = {}
    waiting: list[tuple[Path, object]] = [((name,), value) for name, value in plain_attributes(module).items()]
    for path, value in waiting:
        if type(value) is list:
            found[path] = value
        elif isinstance(value, dict):
            waiting += [((*path, key), item) for key, item in value.items()]
    return found


def calls_of(trainer: pl.Trainer) -> Calls:
    """Return how often this rank's step has been called in the epoch that a trainer is in."""
    if trainer.training:
        loaders = [*train_loaders(trainer)][:1]  # several loaders give one combined batch
        limits, done = [float("inf")], trainer.fit_loop.epoch_loop.batch_progress.current.ready
    elif trainer.sanity_checking or trainer.validating or trainer.testing:
        loop = evaluation_loop(trainer)
        loaders = [*eval_loaders(trainer)]
        limits, done = loop.max_batches, loop.batch_progress.current.ready
    else:
        raise ConfigError(
            f"labtrain.gather_outputs was called while the trainer was {trainer.state.stage}: no step has been called",
            hint="call it in on_train_epoch_end, on_validation_epoch_end or on_test_epoch_end",
        )
    calls = []
    for loader, limit in zip(loaders, limits, strict=True):
        batches = int(min(limit, done))
        done -= batches
        calls.append([loader.calls(batch) if isinstance(loader, Loader) else 1 for batch in range(batches)])
    return calls


def _check_resumed(trainer: pl.Trainer) -> None:
    """Raise ConfigError if the checkpoint lacks the outputs of this epoch's first batches."""
    if getattr(trainer.fit_loop.epoch_loop, "epoch_without_outputs", None) == trainer.current_epoch:
        raise ConfigError(
            "labtrain.gather_outputs: this epoch was resumed in the middle, and its checkpoint lacks the"
            " outputs of earlier batches",
            hint="append them to a list that is an attribute of the model: checkpoints hold such lists",
        )


def _order(lengths: list[int], calls: list[Calls], trainer: pl.Trainer | None) -> list[tuple[int, int]]:
    """Return the order of all items, as (rank, number in its list).

    Args:
        lengths: of each rank's list.
        calls: of each rank.
        trainer: named in an error.

    Raises:
        ConfigError: the lengths do not fit the calls, or fit two loaders that give two orders.
    """
    whole = [list(zip(*calls, strict=True))]  # for each loader, the calls of each rank
    found = []
    for loaders in whole + [[loader] for loader in whole[0]]:
        expected = [sum(sum(of_rank) for of_rank in ranks) for ranks in zip(*loaders, strict=True)]
        if expected == lengths and (order := _interleaved(loaders, len(lengths))) not in found:
            found.append(order)
    if len(found) == 1:
        return found[0]
    expected = [sum(map(sum, of_rank)) for of_rank in calls]
    step = "the step"
    if trainer is not None:
        step = f"{'training' if trainer.training else 'test' if trainer.testing else 'validation'}_step"
    raise ConfigError(
        f"labtrain.gather_outputs: the list has {_each(lengths)} items, but {step} was called {_each(expected)} times",
        hint="append exactly one item in each call of the step, not in a hook, and clear the list at the epoch's end",
    )


def _interleaved(loaders: list[tuple[list[int], ...]], world: int) -> list[tuple[int, int]]:
    done, order = [0] * world, []
    for ranks in loaders:
        for batch in range(max(map(len, ranks))):
            for rank, of_rank in enumerate(ranks):
                for _ in range(of_rank[batch] if batch < len(of_rank) else 0):
                    order.append((rank, done[rank]))
                    done[rank] += 1
    return order


def _each(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return ", ".join(f"{number} (rank {rank})" for rank, number in enumerate(numbers))
