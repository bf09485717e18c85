"""Outputs gathered in a list, one item a call of a step, brought together for an epoch's end.

Each rank's list has the items of its shards. How many those are of each batch is a function of the loader and of the
number of batches, so nothing is counted in a step.

Lightning 2.6: loops/training_epoch_loop.py and loops/evaluation_loop.py, for the number of batches.
"""

import weakref
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from labtrain.errors import ConfigError
from labtrain.joining import received, to_send
from labtrain.loader import DataLoader, loaders_of

Calls = list[list[int]]  # of each loader: of each batch, how often this rank's step was called

_trainer: weakref.ref[pl.Trainer] | None = None


def enter(trainer: pl.Trainer | None) -> None:
    """Remember the trainer whose epochs `gather_outputs` is called in; None: no one."""
    global _trainer
    _trainer = None if trainer is None else weakref.ref(trainer)


def gather_outputs(outputs: list[Any]) -> list[Any]:
    """Return the items of all ranks, in the order of batches and shards. Every rank calls it, at an epoch's end.

    Args:
        outputs: of this rank: one item for each call of the epoch's step, or for each call with one of several
            loaders. Tensors, numbers, strings, and lists, tuples and dicts of those.

    Returns:
        A new list, the same on every rank.

    Raises:
        ConfigError: a list has another length.
    """
    trainer = _trainer() if _trainer is not None else None
    calls = calls_of(trainer) if trainer is not None else [[1] * len(outputs)]
    if not dist.is_initialized() or dist.get_world_size() == 1:
        _order([len(outputs)], [calls])
        return list(outputs)
    device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (calls, len(outputs), to_send(outputs)))
    order = _order([length for _, length, _ in ranks], [calls for calls, _, _ in ranks])
    items = [received(sent, device) for _, _, sent in ranks]
    items[dist.get_rank()] = outputs
    return [items[rank][number] for rank, number in order]


def calls_of(trainer: pl.Trainer) -> Calls:
    """Return how often this rank's step has been called in the epoch that a trainer is in."""
    if trainer.training:
        loaders = [*loaders_of(trainer.fit_loop._combined_loader)][:1]  # several give one batch together
        limits, done = [float("inf")], trainer.fit_loop.epoch_loop.batch_progress.current.ready
    elif trainer.sanity_checking or trainer.validating or trainer.testing:
        loop: Any = trainer._evaluation_loop
        loaders = [*loaders_of(loop._combined_loader)]
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
        calls.append([loader.calls(batch) if isinstance(loader, DataLoader) else 1 for batch in range(batches)])
    return calls


def _order(lengths: list[int], calls: list[Calls]) -> list[tuple[int, int]]:
    """Return the order of all items, as (rank, number in its list).

    Args:
        lengths: of each rank's list.
        calls: of each rank.

    Raises:
        ConfigError: the lengths are not those of the calls, or they fit two loaders that give two orders.
    """
    whole = [list(zip(*calls, strict=True))]  # of each loader: the calls of each rank
    found = []
    for loaders in whole + [[loader] for loader in whole[0]]:
        expected = [sum(sum(of_rank) for of_rank in ranks) for ranks in zip(*loaders, strict=True)]
        if expected == lengths and (order := _interleaved(loaders, len(lengths))) not in found:
            found.append(order)
    if len(found) == 1:
        return found[0]
    expected = [sum(map(sum, of_rank)) for of_rank in calls]
    raise ConfigError(
        f"labtrain.gather_outputs: the list has {_each(lengths)} items, the step was called {_each(expected)} times",
        hint="append exactly one item in each call of the step, and clear the list at the epoch's end",
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
