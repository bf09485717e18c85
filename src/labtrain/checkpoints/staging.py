"""Copies a training's state for a save into buffers on the host, which saves of the same form reuse.

The loop waits only for this copy. Values that a checkpoint cannot hold are refused here, where their key is known. The
copy has only tensors and plain values, so its file loads without running code.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from labtrain.base.console import full_name
from labtrain.base.contracts import State
from labtrain.base.errors import LabtrainError
from labtrain.checkpoints.memory import OwnMemory, SharedMemory, form_of

PLAIN = (type(None), bool, int, float, str, bytes)
MAPPINGS: tuple[type, ...] = (dict, OrderedDict, Counter)
SEQUENCES: tuple[type, ...] = (list, tuple, torch.Size)
PLAIN_KINDS = frozenset(PLAIN)
Keys = tuple[object, ...]  # the keys of a value, from the outermost: their joined text could be another's
LONG = 100  # for longer lists, check first whether all items are plain


class Staging:
    """Copies one training's state to memory on the host.

    Args:
        memory: where the copies are.
    """

    def __init__(self, memory: OwnMemory | SharedMemory | None = None) -> None:
        self.memory = memory if memory is not None else OwnMemory()
        self.buffers: dict[Keys, torch.Tensor] = {}

    def copy(self, state: dict[str, object]) -> State:
        """Return a copy of nested dicts, lists and tuples of tensors and plain values, good until the next call.

        Raises:
            LabtrainError: names the key of any other value.
        """
        tensors = dict(_dense(state, ("state",)))
        if not all(_is_like(self.buffers.get(key), tensor) for key, tensor in tensors.items()):
            pinned = any(tensor.is_cuda for tensor in tensors.values())
            made = self.memory.allocate(map(form_of, tensors.values()), pinned=pinned)
            self.buffers = dict(zip(tensors, made, strict=True))
        copied: dict[str, object] = self._copy(state, ("state",))
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, key: Keys) -> Any:
        kind = type(value)
        if isinstance(value, DTensor):  # this rank's part; `from_local` would move it to the mesh's device
            return DTensor(self._copy(value.to_local(), key), value._spec, requires_grad=False)
        if isinstance(value, torch.Tensor):
            tensor = value.detach()
            if tensor.layout != torch.strided:
                return tensor.cpu().clone()
            return self.buffers[key].copy_(tensor, non_blocking=True)
        if kind in MAPPINGS and all(map(_is_key, value)):
            return kind({name: self._copy(item, (*key, name)) for name, item in value.items()})
        if kind in SEQUENCES:
            if len(value) > LONG and PLAIN_KINDS.issuperset(map(type, value)):
                return kind(value)
            return kind([self._copy(item, (*key, index)) for index, item in enumerate(value)])
        if kind in PLAIN:
            return value
        name = ".".join(map(str, key))
        raise LabtrainError(
            f"{name} is a {described(value)}: a checkpoint can hold only tensors, numbers, strings, lists and dicts",
            hint="keep plain values in hyperparameters and state_dicts",
        )


def _dense(value: object, key: Keys) -> Iterator[tuple[Keys, torch.Tensor]]:
    """Yield the key and the tensor of each dense part of a state."""
    if isinstance(value, DTensor):
        yield from _dense(value.to_local(), key)
    elif isinstance(value, torch.Tensor):
        if value.layout == torch.strided:
            yield key, value.detach()
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _dense(item, (*key, name))
    elif isinstance(value, list | tuple) and not (len(value) > LONG and PLAIN_KINDS.issuperset(map(type, value))):
        for index, item in enumerate(value):
            yield from _dense(item, (*key, index))


def _is_like(buffer: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


def unsavable(value: Any, path: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    """Yield the path and the value of each part of a state that `Staging.copy` would refuse."""
    kind = type(value)
    if kind in MAPPINGS and all(map(_is_key, value)):
        for name, item in value.items():
            yield from unsavable(item, (*path, name))
    elif kind in SEQUENCES:
        for index, item in enumerate(value):
            yield from unsavable(item, (*path, index))
    elif kind not in PLAIN and not isinstance(value, torch.Tensor):
        yield path, value


def described(value: Any) -> str:
    """Return the type of a value, and of a dict's key that is the cause."""
    kind = type(value)
    keys = [type(key) for key in value if not _is_key(key)] if kind in MAPPINGS else []
    of = f" with a key of {full_name(keys[0])}" if keys else ""
    return f"{full_name(kind)}{of}"


def _is_key(key: object) -> bool:
    return type(key) in PLAIN or (type(key) is tuple and all(map(_is_key, key)))
