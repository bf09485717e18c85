"""Copies a training's state for a save into buffers on the host, which all saves reuse.

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

PLAIN = (type(None), bool, int, float, str, bytes)
MAPPINGS: tuple[type, ...] = (dict, OrderedDict, Counter)
SEQUENCES: tuple[type, ...] = (list, tuple, torch.Size)
PLAIN_KINDS = frozenset(PLAIN)
LONG = 100  # for longer lists, check first whether all items are plain


class Staging:
    """Buffers for one training's state; for CUDA they are pinned, so that the device copies on its own."""

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def copy(self, state: dict[str, object]) -> State:
        """Return a copy of nested dicts, lists and tuples of tensors and plain values, good until the next call.

        Raises:
            LabtrainError: names the key of any other value.
        """
        copied: dict[str, object] = self._copy(state, "state")
        if any(buffer.is_pinned() for buffer in self.buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, key: str) -> Any:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), key)
        if kind in MAPPINGS and all(map(_is_key, value)):
            return kind({name: self._copy(item, f"{key}.{name}") for name, item in value.items()})
        if kind in SEQUENCES:
            if len(value) > LONG and PLAIN_KINDS.issuperset(map(type, value)):
                return kind(value)
            return kind([self._copy(item, f"{key}.{index}") for index, item in enumerate(value)])
        if kind in PLAIN:
            return value
        raise LabtrainError(
            f"{key} is a {described(value)}: a checkpoint can hold only tensors, numbers, strings, lists and dicts",
            hint="keep plain values in hyperparameters and state_dicts",
        )

    def _copy_tensor(self, tensor: torch.Tensor, key: str) -> torch.Tensor:
        if isinstance(tensor, DTensor):  # this rank's part; `from_local` would move it to the mesh's device
            part = self._copy_tensor(tensor.to_local(), key)
            return DTensor(part, tensor._spec, requires_grad=False)
        if tensor.layout != torch.strided:
            return tensor.cpu().clone()
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


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
