"""Takes rows of arrays, memory maps and tensors of any size, a batch at a time.

labtrain reads a shuffled memory map that is larger than half of the memory by the page, since the kernel would
otherwise read 128 KiB around each row. It asks the kernel for all rows of a batch at once, during the training on the
batch before. For a smaller map the kernel's default is good: the rows that it reads around a row are needed soon.
"""

import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from labtrain.base.errors import ConfigError
from labtrain.exact.permutation import Indices
from labtrain.record.provenance import memory_bytes

ADVISED_SHARE = 0.5  # of the memory: a larger map does not stay in it during a training


class Arrays(Dataset[object]):
    """A tuple of arrays of one length as a dataset: a sample is a row of each.

    Raises:
        ConfigError: their lengths differ, or one is not an array.
    """

    def __init__(self, arrays: tuple[Any, ...]) -> None:
        others = [type(array).__name__ for array in arrays if not _is_array(array)]
        if others:
            raise ConfigError(
                f"dataset is a tuple of arrays and a {others[0]}: each must be an array, a memory map or a tensor",
                hint="numpy.asarray(values)",
            )
        lengths = [len(array) for array in arrays]
        if len(set(lengths)) > 1:
            raise ConfigError(
                f"dataset is a tuple of arrays with {', '.join(map(str, lengths))} rows: all must have the same number",
                hint="for array in dataset: print(array.shape)",
            )
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> tuple[object, ...]:
        return tuple(array[index] for array in self.arrays)


def is_arrays(dataset: object) -> bool:
    """Return whether a dataset is a tuple of arrays."""
    return type(dataset) is tuple and any(map(_is_array, dataset))


class Rows:
    """Takes rows of a tensor, an array, `Arrays` or a TensorDataset; gives what torch's collation of single rows gives.

    Args:
        arrays: each of the same length.
        single: the rows of the only one, instead of a list of one.
    """

    def __init__(self, arrays: Sequence[Any], *, single: bool) -> None:
        self.single, self.sources = single, arrays
        self.tensors = [_tensor(array) for array in arrays]
        self.whole = [_lays_out_alike(tensor) for tensor in self.tensors]
        self.advised: list[tuple[mmap.mmap, int, int]] = []  # the map, where its first row begins, bytes a row

    @classmethod
    def of(cls, dataset: object) -> "Rows | None":
        """Return the rows of a dataset; None if it has samples instead."""
        if _is_array(dataset):
            return cls([dataset], single=True)
        if type(dataset) is TensorDataset:
            return cls(dataset.tensors, single=False)
        return cls(dataset.arrays, single=False) if type(dataset) is Arrays else None

    def __call__(self, indices: Indices) -> object:
        """Return the rows at indices (B,): a tensor (B, ...), or a list of them."""
        if self.advised:
            self._ask(indices)
        places = torch.from_numpy(indices)
        taken = [
            tensor.index_select(0, places) if whole else tensor[places]
            for tensor, whole in zip(self.tensors, self.whole, strict=True)
        ]
        return taken[0] if self.single else taken

    def advise(self, *, shuffle: bool) -> bool:
        """Tell the kernel in which order large memory maps will be read; return whether there is a memory map."""
        self.advised = []
        maps = [(array, found) for array in self.sources if (found := _map_of(array)) is not None]
        for array, found in maps:
            if array.nbytes <= ADVISED_SHARE * usable_bytes():
                continue
            found.madvise(mmap.MADV_RANDOM if shuffle else mmap.MADV_SEQUENTIAL)
            if shuffle:
                start = array.ctypes.data - np.frombuffer(found, np.uint8).ctypes.data
                self.advised.append((found, start, array.nbytes // len(array)))
        return bool(maps)

    def _ask(self, indices: Indices) -> None:
        """Make the kernel fetch rows at once: otherwise it reads them one by one."""
        for found, start, size in self.advised:
            begins = start + indices * size
            pages = begins & -mmap.PAGESIZE
            for page, length in zip(pages.tolist(), (begins + size - pages).tolist(), strict=True):
                found.madvise(mmap.MADV_WILLNEED, page, length)


def usable_bytes() -> int:
    """Return this machine's memory, or the container's limit."""
    found = memory_bytes()
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return found if text == "max" else min(found, int(text))


def _is_array(each: object) -> bool:
    return isinstance(each, Tensor | np.ndarray) and each.ndim > 0


def _tensor(array: object) -> Tensor:
    """Return a tensor with an array's memory, if torch can."""
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
        try:
            return torch.from_numpy(np.asarray(array))
        except ValueError:  # strides that torch does not have: backwards, or of a field of records
            return torch.from_numpy(np.ascontiguousarray(array))


def _lays_out_alike(tensor: Tensor) -> bool:
    """Return whether index_select, which is faster, gives the same strides as an index.

    torch chooses kernels by strides, so they can change bits.
    """
    one = torch.zeros(min(1, len(tensor)), dtype=torch.int64)
    return tensor.device.type == "cpu" and tensor.index_select(0, one).stride() == tensor[one].stride()


def _map_of(array: object) -> mmap.mmap | None:
    """Return the memory map that an array is a view of, row after row."""
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        return None
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) else None
