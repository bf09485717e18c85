"""Sends values of any kind from each rank to all ranks.

pickle writes a value without its tensors. The tensors of a rank travel as the bytes of one buffer on the training's
device, so those of a GPU pass neither through the CPU nor through pickle. Each arrives with the strides that it has on
its own rank, because the order in which an operation adds depends on them.
"""

import io
import itertools
import pickle
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from labtrain.base.errors import ConfigError

T = TypeVar("T")

ALIGNMENT = 16  # bytes; that of complex128


@dataclass(frozen=True, kw_only=True, slots=True)
class Like:
    """A tensor on its way, without its content."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool

    @property
    def size_bytes(self) -> int:
        """What it takes in the buffer."""
        size = int(torch.Size(self.shape).numel()) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


def of_all_ranks(mine: list[T], device: torch.device, *, what: str) -> list[T]:
    """Return copies of the items of all ranks, in the order of ranks; every rank calls it.

    One rank copies its items, too: a tensor of an output may be the model's own, and change before hooks see it.

    Args:
        mine: of this rank.
        device: of the training; tensors of other ranks' devices arrive on it.
        what: the items are, for an error.

    Raises:
        ConfigError: on every rank of several, if an item cannot be pickled on one of them.
    """
    data, tensors, error = _packed(mine)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine if error else _unpacked(data, tensors)
    ranks = [(data, [_like(each) for each in tensors], error)] * dist.get_world_size()
    dist.all_gather_object(ranks, ranks[0])
    if error := next((error for *_, error in ranks if error), ""):
        raise ConfigError(
            f"{what} cannot be sent to the other devices ({error}), and a hook reads it",
            hint="use tensors, numbers, strings, or lists, tuples and dicts of those; or trainer.devices=1",
        )
    found: list[T] = []
    for rank, (data, likes, _) in enumerate(ranks):
        arrived = _broadcast(tensors if rank == dist.get_rank() else None, likes, device, source=rank)
        found += _unpacked(data, arrived)
    return found


class _Pickler(pickle.Pickler):
    """Puts tensors aside, at any depth and in objects of any class."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, Tensor) or not _is_simple(value):
            return None
        kind = Tensor if isinstance(value, torch.nn.Parameter) else type(value)
        value = value.resolve_conj().resolve_neg() if value.is_conj() or value.is_neg() else value
        self.tensors.append(value.detach().clone())  # without gaps and overlaps in its memory
        return len(self.tensors) - 1, kind, vars(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: tuple[int, type[Tensor], dict[str, object]]) -> Tensor:
        place, kind, attributes = number
        tensor = self.tensors[place].as_subclass(kind)
        vars(tensor).update(attributes)
        return tensor


def _is_simple(tensor: Tensor) -> bool:
    """Return whether a tensor is its shape, its strides and its bytes."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_meta
        and not (tensor.is_nested or tensor.is_quantized or is_traceable_wrapper_subclass(tensor))
    )


def _packed(items: list[T]) -> tuple[bytes, list[Tensor], str]:
    """Return pickled items, their tensors, and an error that stopped it."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(items)
    except Exception as error:  # of any class: pickle calls methods of the items
        return b"", [], f"{type(error).__name__}: {error}"
    return file.getvalue(), pickler.tensors, ""


def _unpacked(data: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(data), tensors).load()


def _like(tensor: Tensor) -> Like:
    return Like(shape=tuple(tensor.shape), strides=tensor.stride(), dtype=tensor.dtype, on_cpu=tensor.is_cpu)


def _broadcast(tensors: list[Tensor] | None, likes: list[Like], device: torch.device, *, source: int) -> list[Tensor]:
    """Send the tensors of one rank to all; return them."""
    ends = list(itertools.accumulate(like.size_bytes for like in likes))
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, device=device)
    for tensor, like, end in zip(tensors or (), likes, ends, strict=tensors is not None):
        flat = tensor.as_subclass(Tensor).as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        start = end - like.size_bytes
        buffer[start : start + len(flat)] = flat
    if len(buffer):
        dist.broadcast(buffer, src=source)
    if tensors is not None:
        return tensors
    return [_taken(buffer, end - like.size_bytes, like) for like, end in zip(likes, ends, strict=True)]


def _taken(buffer: Tensor, start: int, like: Like) -> Tensor:
    """Return a tensor from its bytes, in memory of its own."""
    numel = torch.Size(like.shape).numel()
    flat = buffer[start : start + numel * like.dtype.itemsize].view(like.dtype).clone()
    tensor = flat.as_strided(like.shape, like.strides)
    return tensor.cpu() if like.on_cpu else tensor
