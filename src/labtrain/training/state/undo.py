"""Undo what code did to objects: attributes, containers, tensors, arrays, random generators."""

import array
import copy
import logging
import random
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from labtrain.exact.attributes import RANDOM
from labtrain.training.state.object_graph import Items, View, reach

LARGEST_BYTES = 1 << 30  # limit for saved content, without the tensors in `free`
OBJECT_BYTES = 1 << 10  # estimated size of one object or container

# Objects of these types are not saved.
LEFT_OUT = (
    type(None), bool, int, float, complex, str, bytes, Enum, types.BuiltinFunctionType, weakref.ReferenceType,
    torch.dtype, torch.device, pl.Trainer, Logger, Strategy, logging.Logger,
)  # fmt: skip
# Only their own attributes are saved. What the attributes hold may be a dataset, or as large as the weights.
SHALLOW = (
    torch.utils.data.Dataset, torch.utils.data.DataLoader, pl.LightningDataModule, torch.optim.Optimizer,
)  # fmt: skip


class TooLargeError(Exception):
    """The objects need more than LARGEST_BYTES."""


class Undo:
    """Saves what can be reached from some objects; each call restores all of it.

    The objects keep their identity, so that other references see the change. It does not save what functions, classes
    and modules of libraries hold, positions of iterators, or the content of objects that are not written in Python.

    Args:
        roots: where to start.
        shallow: objects of which only their own attributes are saved.
        free: tensors that do not count for LARGEST_BYTES.

    Raises:
        TooLargeError: the objects are too large.
    """

    def __init__(self, roots: Iterable[object], *, shallow: Iterable[object] = (), free: Iterable[Tensor] = ()) -> None:
        self._restore: list[Callable[[], object]] = []
        self._generators: list[_Generator] = []
        self._kept: list[object] = []
        self._free, left_bytes = set(map(id, free)), LARGEST_BYTES
        shallow = list(shallow)
        only = {id(each) for each in shallow}

        def enter(holder: object, name: object, value: object) -> bool:
            if isinstance(holder, SHALLOW) or id(holder) in only:
                return isinstance(value, RANDOM)
            return id(value) not in only and not isinstance(value, LEFT_OUT)

        for _, each, held in reach({str(index): each for index, each in enumerate([*shallow, *roots])}, enter):
            if id(each) not in self._free:
                left_bytes -= each.nbytes if isinstance(each, Tensor | np.ndarray) else OBJECT_BYTES
            if left_bytes < 0:
                raise TooLargeError
            self._kept.append(each)
            self._keep(each)
            self._restore += [partial(_put, view, items) for view, items in held if view.put is not None]

    def __call__(self) -> None:
        """Put everything back."""
        for restore in self._restore:
            restore()

    def seed(self, seed: int) -> None:
        """Give the random generators among those objects another seed."""
        for generator in self._generators:
            generator.seed(seed)

    def _keep(self, each: object) -> None:
        if isinstance(each, Tensor):
            self._restore.append(_tensor_restorer(each))
        elif isinstance(each, np.ndarray | array.array | bytearray):
            self._restore.append(_array_restorer(each))
        elif (found := _generator(each)) is not None:
            self._generators.append(found)
            self._restore.append(found.restore)


def _put(view: View, saved: Items) -> None:
    """Make an object hold what it held."""
    now = view.get()
    same = len(now) == len(saved) and all(
        value is then and (name is then_name or type(name) is int)
        for (name, value), (then_name, then) in zip(now, saved, strict=True)
    )
    if not same and view.put is not None:
        view.put(saved)


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    """Save a tensor's content and memory, its gradient and requires_grad."""
    memory, saved, wants = tensor.data, tensor.detach().clone(), tensor.requires_grad
    gradient = tensor.grad if tensor.is_leaf else None

    def restore() -> None:
        if tensor.is_leaf:
            tensor.requires_grad_(wants)
            tensor.grad = None
        if tensor.dtype != memory.dtype or tensor.shape != memory.shape or tensor.data_ptr() != memory.data_ptr():
            tensor.data = memory
        if not same_bits(memory, saved):  # write only if it changed: the memory may be a read-only map of a file
            memory.copy_(saved)
        if tensor.is_leaf:
            tensor.grad = gradient

    return restore


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same bits; false for those that are sparse."""
    if left.layout != torch.strided:
        return False
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    if left.is_floating_point():
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
        left, right = left.view(bits), right.view(bits)
    return torch.equal(left, right)


def _array_restorer(each: Any) -> Callable[[], None]:
    saved = copy.copy(each)

    def restore() -> None:
        if not isinstance(each, np.ndarray):
            each[:] = saved
        elif each.flags.writeable:
            each[...] = saved

    return restore


@dataclass(frozen=True, kw_only=True, slots=True)
class _Generator:
    """Two operations on a random generator: restore its state, set a seed."""

    restore: Callable[[], object]
    seed: Callable[[int], object]


def _generator(each: object) -> _Generator | None:
    """Save a random generator's state; None if it is not a generator."""
    if isinstance(each, torch.Generator):
        return _Generator(restore=partial(each.set_state, each.get_state()), seed=each.manual_seed)
    if isinstance(each, random.Random):
        return _Generator(restore=partial(each.setstate, each.getstate()), seed=each.seed)
    if isinstance(each, np.random.RandomState):
        return _Generator(restore=partial(each.set_state, each.get_state(legacy=True)), seed=each.seed)
    if isinstance(each, np.random.Generator):
        bits = each.bit_generator
        return _Generator(
            restore=partial(setattr, bits, "state", bits.state),
            seed=lambda seed: setattr(bits, "state", type(bits)(seed).state),
        )
    return None
