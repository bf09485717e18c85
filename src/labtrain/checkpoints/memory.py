"""Memory for the copy of a state: this process's own, or memory that a process forked from it reads too.

Shared memory is a file without a name (memfd_create(2)), and not one in /dev/shm, which has 64 MB in most containers.
"""

import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch

ALIGNED_BYTES = 64


@dataclass(frozen=True, slots=True)
class Form:
    """A dense tensor's shape, strides in items, and type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """The bytes from its first item to its last."""
        if 0 in self.shape:
            return 0
        last = sum((count - 1) * step for count, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


def form_of(tensor: torch.Tensor) -> Form:
    """Return the form of a copy: as dense as the tensor, with its order of dimensions."""
    like = torch.empty_like(tensor, device="meta")
    return Form(tuple(like.shape), tuple(like.stride()), tensor.dtype)


class OwnMemory:
    """Memory of this process; if the tensors are on CUDA it is pinned, so that the device copies on its own."""

    def allocate(self, forms: Iterable[Form], *, pinned: bool) -> list[torch.Tensor]:
        """Return uninitialised tensors."""
        return [torch.empty_strided(each.shape, each.stride, dtype=each.dtype, pin_memory=pinned) for each in forms]


class SharedMemory:
    """Memory that a process which is forked later sees too."""

    def __init__(self) -> None:
        self.file = os.memfd_create("labtrain-state")
        self.size_bytes = 0
        self.map: mmap.mmap | None = None
        self.places: dict[int, tuple[int, Form]] = {}  # of each tensor by id: bytes from the beginning, and its form

    def allocate(self, forms: Iterable[Form], *, pinned: bool) -> list[torch.Tensor]:
        """Return uninitialised tensors, in place of all earlier ones.

        Raises:
            OSError: there is not enough memory.
        """
        wanted, starts, end = list(forms), [], 0
        for each in wanted:
            starts.append(end)
            end += -(-each.size_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
        if end > self.size_bytes:
            os.ftruncate(self.file, end)
            self.show(end)
            if pinned:
                self._pin()
        made = [self.tensor(start, each) for start, each in zip(starts, wanted, strict=True)]
        self.places = {id(tensor): place for tensor, place in zip(made, zip(starts, wanted, strict=True), strict=True)}
        return made

    def show(self, size_bytes: int) -> None:
        """Map the file, as long as it is by now."""
        if size_bytes > self.size_bytes:
            self.map, self.size_bytes = mmap.mmap(self.file, size_bytes), size_bytes

    def tensor(self, start: int, form: Form) -> torch.Tensor:
        """Return the tensor at a place; each has a storage of its own."""
        if not form.size_bytes:
            return torch.empty_strided(form.shape, form.stride, dtype=form.dtype)
        assert self.map is not None
        flat = torch.frombuffer(self.map, dtype=torch.uint8, count=form.size_bytes, offset=start)
        return flat.view(form.dtype).as_strided(form.shape, form.stride)

    def _pin(self) -> None:
        """Let the device copy on its own; without it a copy takes longer."""
        assert self.map is not None
        with suppress(RuntimeError):
            address = torch.frombuffer(self.map, dtype=torch.uint8).data_ptr()
            torch.cuda.cudart().cudaHostRegister(address, self.size_bytes, 0)
