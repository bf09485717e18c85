"""Finds the optimizers of a training: the Trainer's, those that these hold, and those that the model holds.

Some optimizers hold another one that steps for them, such as SAM's `base_optimizer` and Lookahead's inner optimizer.
Others are attributes of the model, and the Trainer does not know them. They may share their groups of parameters or
their state.
"""

import inspect
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from labtrain.exact.attributes import attributes_of, holders
from labtrain.exact.plain_values import DICTS, LEAVES, is_own
from labtrain.training.lightning import lightning_optimizers

DEPTH = 4  # of containers and objects in an attribute
FEW = 1000  # items of a container that are looked at
_SGD = torch.optim.SGD([torch.zeros(1)], lr=1.0)
TORCHS = frozenset({*vars(_SGD), *vars(LightningOptimizer(_SGD)), "_opt_called"})  # attributes that are not people's


def optimizers_of(trainer: pl.Trainer) -> dict[str, Optimizer]:
    """Return all optimizers by name, such as `SAM`, `SAM.base_optimizer` and `model.inner`; the Trainer's come first.

    Of the model's, only those that update one of its parameters.
    """
    found: dict[str, Optimizer] = {}
    for index, optimizer in enumerate(trainer.optimizers):
        name = type(optimizer).__name__
        found[f"{name}-{index}" if index else name] = optimizer
    seen = {id(optimizer) for optimizer in found.values()}
    module = trainer.lightning_module
    parameters = {id(parameter) for parameter in module.parameters()}
    inner = [each for name, value in found.items() for each in _held(vars(value), name, seen)]
    for path, holder in holders(module).items():
        prefix = f"model.{path}" if path else "model"
        inner += [each for name, value in attributes_of(holder) for each in _inside(value, f"{prefix}.{name}", seen)]
    for name, optimizer in inner:
        if any(id(each) in parameters for group in optimizer.param_groups for each in group["params"]):
            found[name] = optimizer
    return found


def inner_of(trainer: pl.Trainer) -> dict[str, Optimizer]:
    """Return the optimizers that the Trainer does not have, by name."""
    known = set(map(id, trainer.optimizers))
    return {name: each for name, each in optimizers_of(trainer).items() if id(each) not in known}


def shares_groups(optimizer: Optimizer, trainer: pl.Trainer) -> bool:
    """Return whether an optimizer has a group of parameters of one of the Trainer's optimizers."""
    groups = {id(group) for each in trainer.optimizers for group in each.param_groups}
    return any(id(group) in groups for group in optimizer.param_groups)


def wrappers_of(trainer: pl.Trainer) -> dict[str, LightningOptimizer]:
    """Return what a model's `optimizers()` gives, by name: a method sets its attributes, not those of the optimizer."""
    wrappers = lightning_optimizers(trainer.strategy)
    return {f"{type(each).__name__}-{index}": each for index, each in enumerate(wrappers)}


def _held(table: Mapping[str, object], path: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Optimizer]]:
    for name, value in list(table.items()):
        if name not in TORCHS:
            yield from _inside(value, f"{path}.{name}", seen, depth)


def _inside(value: Any, path: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, Optimizer]]:
    """Yield each optimizer that a value is, or holds, with its name."""
    kind = type(value)
    if kind in LEAVES or depth > DEPTH or id(value) in seen or isinstance(value, LightningOptimizer):
        return
    if isinstance(value, Optimizer):
        seen.add(id(value))
        yield path, value
        yield from _held(vars(value), path, seen, depth + 1)
    elif kind in DICTS:
        if len(value) <= FEW:
            yield from _held({str(key): item for key, item in value.items()}, path, seen, depth + 1)
    elif kind in (list, tuple, deque):
        if len(value) <= FEW:
            yield from _held({str(index): item for index, item in enumerate(value)}, path, seen, depth + 1)
    elif is_own(kind) and hasattr(value, "__dict__"):
        seen.add(id(value))
        yield from _held(vars(value), path, seen, depth + 1)


def own_methods(optimizer: object) -> tuple[str, ...]:
    """Return the names of the public methods of an optimizer's class that torch and Lightning do not define.

    Not those with `yield`, such as context managers: their caller's code runs in the middle of them.
    """
    kind: Any = type(optimizer)
    return _own_methods(kind)


@cache
def _own_methods(kind: Any) -> tuple[str, ...]:
    names = dict.fromkeys(
        name
        for each in kind.__mro__
        if each.__module__.partition(".")[0] not in ("torch", "lightning", "builtins", "typing")
        for name, value in vars(each).items()
        if isinstance(value, types.FunctionType) and not name.startswith("_") and name != "step"
    )
    return tuple(name for name in names if not inspect.isgeneratorfunction(inspect.unwrap(getattr(kind, name))))


def held_values(optimizer: object) -> list[object]:
    """Return what an optimizer holds beside its groups: the values of its state, and those in its attributes."""
    found: list[object] = []
    for name, value in vars(optimizer).items():
        if name == "state" or (name not in TORCHS and not name.startswith("_") and not callable(value)):
            _flatten(value, found)
    return found


def _flatten(value: Any, found: list[object], depth: int = 0) -> None:
    kind = type(value)
    if kind in LEAVES or depth > DEPTH:
        found.append(value)
    elif kind in DICTS or kind in (list, tuple, deque):
        items = value.values() if kind in DICTS else value
        if LEAVES.issuperset(map(type, items)):
            found.extend(items)
            return
        for item in items:
            _flatten(item, found, depth + 1)
    elif is_own(kind) and hasattr(value, "__dict__"):
        _flatten(vars(value), found, depth + 1)
    else:
        found.append(value)


@contextmanager
def in_place(optimizers: Mapping[str, Optimizer]) -> Iterator[None]:
    """Let a block load states of optimizers into the groups and the dicts of state that they have.

    torch's `load_state_dict` makes new ones. An optimizer that shares its groups with the one that it holds would then
    no longer give it a new learning rate.
    """
    tables = [vars(each) for each in optimizers.values()]  # some have properties in place of these attributes
    before = [(table, dict(table), [*table.get("param_groups", ())]) for table in tables]
    yield
    for table, then, members in before:
        if "param_groups" in then and table["param_groups"] is not (groups := then["param_groups"]):
            loaded = table["param_groups"]
            for member, group in zip(members, [dict(group) for group in loaded], strict=False):
                member.clear()
                member.update(group)
            groups[:] = [*members[: len(loaded)], *loaded[len(members) :]]
            table["param_groups"] = groups
        if "state" in then and table["state"] is not (state := then["state"]):
            values = dict(table["state"])
            state.clear()
            state.update(values)
            table["state"] = state
