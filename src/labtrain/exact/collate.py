"""Joins the parts of a batch: gives what collate would have made of all its samples.

A value has rows if its first dimension, or its length, is the number of samples of its part, in every part. Rows are
concatenated; numbers in outputs are averaged. Values that cannot be joined, such as rows padded to different lengths,
become a list of the parts.
"""

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

T = TypeVar("T")

COMPLEX = (torch.complex64, torch.complex128, np.dtype(np.complex64), np.dtype(np.complex128))


def joined(parts: list[object], sizes: list[int], *, average: bool = False) -> object:
    """Join the values of several parts into one.

    Args:
        parts: one a shard, in order; at least one.
        sizes: the samples of each.
        average: numbers become their mean, weighted by the samples; otherwise equal numbers stay.
    """
    with torch.no_grad():
        return parts[0] if len(parts) == 1 else _Joiner(sizes, average=average)(parts, top=True)


def rows_of(batch: object) -> int | None:
    """Return the number of rows of a batch: the first dimension of its first tensor or array; None if it has none."""
    for each in _nodes(batch):
        if isinstance(each, Tensor | np.ndarray) and each.ndim > 0:
            return each.shape[0]
        if isinstance(each, PackedSequence):
            return len(each.batch_sizes) and int(each.batch_sizes[0])
    return None


def cut(batch: object, size: int, part: slice) -> object:
    """Return some rows of a batch; what has no rows stays whole. `joined` is the inverse.

    Args:
        batch: made from samples.
        size: their number.
        part: the rows.
    """

    def taken(value: object) -> object:
        if isinstance(value, PackedSequence):
            return pack_sequence(unpack_sequence(value)[part], enforce_sorted=False)
        return type(value)(value[part]) if isinstance(value, list | tuple) else cast(Tensor, value)[part]

    return _by_rows(batch, size, taken, lambda value: value, top=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A tensor on its way to another rank, in its own memory: a view would send all of its base."""

    tensor: Tensor
    on_cpu: bool


def to_send(data: object) -> object:
    """Return a value in a form that can be sent to other ranks."""
    return _mapped(data, Tensor, lambda tensor: Sent(tensor.detach().cpu().clone(), tensor.is_cpu))


def received(data: object, device: torch.device) -> Any:
    """Return a value from `to_send`; tensors of another rank's device go to this rank's device."""
    return _mapped(data, Sent, lambda sent: sent.tensor if sent.on_cpu else sent.tensor.to(device))


def marks(data: object) -> list[tuple[object, int]]:
    """Return marks that show later changes of a value: its objects and the versions of tensors."""
    return [(each, _version(each)) for each in _nodes(data)]


def is_changed(data: object, before: list[tuple[object, int]]) -> bool:
    """Return whether a value has changed since its `marks`."""
    now = marks(data)
    return len(now) != len(before) or any(
        each is not old or version != older for (each, version), (old, older) in zip(now, before, strict=True)
    )


class _Joiner:
    def __init__(self, sizes: list[int], *, average: bool) -> None:
        self.sizes, self.average = sizes, average

    def __call__(self, parts: list[Any], *, top: bool = False) -> object:
        first = parts[0]
        if any(type(part) is not type(first) for part in parts):
            return parts
        if isinstance(first, Tensor | np.ndarray):
            return self._arrays(parts)
        if isinstance(first, PackedSequence):
            rows = [row for part in parts for row in unpack_sequence(part)]
            return pack_sequence(rows, enforce_sorted=False)
        if isinstance(first, Mapping):
            if any(part.keys() != first.keys() for part in parts):
                return parts
            return _like(first, [(key, self([part[key] for part in parts])) for key in first])
        if _is_record(first):
            return _record(first, lambda name: self([getattr(part, name) for part in parts]))
        if isinstance(first, list | tuple):
            return self._sequences(parts, top=top)
        if self.average and isinstance(first, int | float | np.number):
            return self._mean(parts)
        return first if all(_equal(part, first) for part in parts) else parts

    def _arrays(self, parts: list[Any]) -> object:
        first = parts[0]
        if self._have_rows(parts) and all(part.shape[1:] == first.shape[1:] for part in parts):
            try:
                return torch.cat(parts) if isinstance(first, Tensor) else np.concatenate(parts)
            except (RuntimeError, TypeError, NotImplementedError):  # of a layout that torch cannot concatenate
                return parts
        if self.average and all(not part.ndim and part.dtype not in COMPLEX for part in parts):
            return self._mean(parts)
        return first if all(_equal(part, first) for part in parts) else parts

    def _have_rows(self, parts: Sequence[object]) -> bool:
        return all(_has_rows(part, size) for part, size in zip(parts, self.sizes, strict=True))

    def _mean(self, parts: list[Any]) -> object:
        """Return the mean, weighted by the samples; equal numbers stay."""
        if isinstance(parts[0], Tensor):
            total = torch.stack([part.double() * size for part, size in zip(parts, self.sizes, strict=True)]).sum()
            mean = total / sum(self.sizes)
            return mean.to(parts[0].dtype if parts[0].is_floating_point() else torch.get_default_dtype())
        if all(part == parts[0] for part in parts):
            return parts[0]
        return sum(part * size for part, size in zip(parts, self.sizes, strict=True)) / sum(self.sizes)

    def _sequences(self, parts: list[list[object] | tuple[object, ...]], *, top: bool) -> object:
        first = parts[0]
        if self._have_rows(parts):
            fields = all(_are_fields(part, size) for part, size in zip(parts, self.sizes, strict=True))
            if not fields:
                return type(first)([row for part in parts for row in part])
            if not top:
                return parts  # as many tensors as samples, each with as many rows: ambiguous
        if any(len(part) != len(first) for part in parts):
            return parts
        return type(first)([self(list(each)) for each in zip(*parts, strict=True)])


def _by_rows(
    data: object, size: int, change: Callable[[object], object], rest: Callable[[object], object], *, top: bool = False
) -> object:
    """Change each value in a batch that has a row for each sample, and the other values in another way.

    Args:
        data: a batch, or a value in it.
        size: the samples.
        change: of a tensor, an array, a list or tuple of rows, or a packed sequence.
        rest: of a value without rows that is no container.
        top: `data` is the whole batch.
    """

    def inner(value: object) -> object:
        return _by_rows(value, size, change, rest)

    if isinstance(data, Tensor | np.ndarray):
        return change(data) if _has_rows(data, size) else rest(data)
    if isinstance(data, PackedSequence):
        return change(data)
    if isinstance(data, Mapping):
        return _like(data, [(key, inner(value)) for key, value in data.items()])
    if _is_record(data):
        return _record(data, lambda name: inner(getattr(data, name)))
    if isinstance(data, list | tuple):
        if _has_rows(data, size) and not (top and _are_fields(data, size)):
            return change(data)
        return type(data)([inner(value) for value in data])
    return rest(data)


def _has_rows(part: object, size: int) -> bool:
    if isinstance(part, Tensor | np.ndarray):
        return part.ndim > 0 and part.shape[0] == size
    return (
        isinstance(part, list | tuple) and len(part) == size and len({_kind(row) for row in part} - {_kind(None)}) <= 1
    )


def _are_fields(part: Sequence[object], size: int) -> bool:
    """Return whether a sequence with as many items as samples may be (inputs, targets) rather than rows."""
    found = [_has_rows(value, size) for value in part if isinstance(value, Tensor | np.ndarray | list | tuple)]
    return bool(found) and all(found)


def _kind(value: object) -> tuple[type[object], int]:
    return type(value), value.ndim if isinstance(value, Tensor | np.ndarray) else 0


def _is_record(value: object) -> bool:
    return (isinstance(value, tuple) and hasattr(value, "_fields")) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )


def _record(like: Any, value_of: Callable[[str], Any]) -> object:
    """Return a named tuple or a dataclass with other values."""
    if isinstance(like, tuple):
        return type(like)(*(value_of(name) for name in like._fields))  # type: ignore[attr-defined]
    made = copy.copy(like)
    for field in dataclasses.fields(like):
        object.__setattr__(made, field.name, value_of(field.name))  # also if frozen
    return made


def _mapped(data: object, kind: type[T], function: Callable[[T], object]) -> object:
    def inner(value: object) -> object:
        return _mapped(value, kind, function)

    if isinstance(data, kind):
        return function(data)
    if isinstance(data, Mapping):
        return _like(data, [(key, inner(value)) for key, value in data.items()])
    if _is_record(data):
        return _record(data, lambda name: inner(getattr(data, name)))
    return type(data)([inner(value) for value in data]) if isinstance(data, list | tuple) else data


def _like(mapping: Mapping[object, object], items: list[tuple[object, object]]) -> object:
    if isinstance(mapping, defaultdict):
        return defaultdict(mapping.default_factory, items)
    kind: Any = type(mapping)
    return kind(OrderedDict(items)) if kind is not dict else dict(items)


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.layout == two.layout == torch.strided and torch.equal(one, two)
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return np.array_equal(one, two)
    return one is two or (isinstance(one, str | bytes | int | float | complex) and one == two)


def _nodes(data: object) -> Iterator[object]:
    yield data
    inside: Iterable[object] = ()
    if isinstance(data, Mapping):
        inside = data.values()
    elif isinstance(data, list | tuple):
        inside = data
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        inside = (getattr(data, field.name) for field in dataclasses.fields(data))
    for value in inside:
        yield from _nodes(value)


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
