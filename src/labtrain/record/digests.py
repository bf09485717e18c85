"""The weights digest: one sha256 over a state dict, the same from memory, from a checkpoint and from any language.

Over the entries sorted by key: key, NUL, dtype, NUL, shape joined by commas, NUL, the raw little-endian bytes in C
order. The dtype is torch's name without its prefix (``float32``, ``bfloat16``, ``int64``). A sparse tensor counts as
the dense ones that it is made of (`components`). No torch is imported here: a tensor is used through its own methods,
and a ``.safetensors`` file is read as bytes.
"""

import hashlib
import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labtrain.base.errors import DamagedError, LabtrainError

# safetensors' dtype names; https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}

WEIGHT_DTYPE_NAMES = tuple(_DTYPES.values())

SPREAD_WEIGHTS = "state_dict/"  # before the names of weights in the parts of a checkpoint (files.py)

PLACE = "labtrain"  # labtrain's own key in Lightning's checkpoint dictionary (loop.py)

Entry = tuple[str, str, tuple[int, ...], bytes | memoryview]


def digest(weights: Any) -> str:
    """Return the weights digest of a module or of a state dict.

    Args:
        weights: a ``torch.nn.Module``, or a mapping from names to tensors, on any device.

    Returns:
        64 hex digits.

    Raises:
        LabtrainError: an entry is no tensor.
    """
    state = weights if isinstance(weights, Mapping) else weights.state_dict()
    entries = dense_entries(state)
    return _digest((name, *_parts(name, entries[name])) for name in sorted(entries))


def digest_file(path: Path) -> str:
    """Return the weights digest of a ``.safetensors`` file, reading one tensor at a time."""
    return _digest(read_safetensors(path))


def digest_folder(folder: Path) -> str:
    """Return the weights digest of a checkpoint's folder, whole or in parts, reading one tensor at a time."""
    return _digest(read_weights(folder))


def state_digest(state: Mapping[str, Any]) -> str:
    """Return the sha256 over a whole training state: tensors, plain values, and the weights by their digest.

    Plain attributes are left out, the model's and those outside of it: a time that it took, say, is another in each
    training. And so are how optimizers began, which the configuration says, and the names of what code has changed.
    """
    state = {**state, "state_dict": digest(state["state_dict"])}
    if PLACE in state:
        left = "attributes", "outputs"
        ranks = [{key: value for key, value in rank.items() if key not in left} for rank in state[PLACE]["ranks"]]
        place = {key: value for key, value in state[PLACE].items() if key not in ("initial", "lost", "made", "outside")}
        state[PLACE] = {**place, "ranks": ranks}
    return digest_tree(state)


def components(tensor: Any) -> dict[str, Any]:
    """Return the dense tensors that a sparse one is made of, by name; of a dense one itself, under an empty name.

    They are as they are: entries that occur twice are not added up, since that would round.
    """
    layout = str(getattr(tensor, "layout", "torch.strided")).removeprefix("torch.")
    if layout in ("strided", "_mkldnn"):
        return {"": tensor}
    torch: Any = sys.modules["torch"]
    tensor = tensor.detach()
    size = [*tensor.shape, int(layout == "sparse_coo" and tensor.is_coalesced())]
    if layout == "sparse_coo":
        found = {"indices": tensor._indices(), "values": tensor._values()}
    elif layout in ("sparse_csr", "sparse_bsr"):
        found = {"indptr": tensor.crow_indices(), "indices": tensor.col_indices(), "values": tensor.values()}
    else:
        found = {"indptr": tensor.ccol_indices(), "indices": tensor.row_indices(), "values": tensor.values()}
    return {f".{layout}.{name}": part for name, part in (found | {"size": torch.tensor(size)}).items()}


def dense_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with what sparse tensors are made of in their place: `table.sparse_coo.values`, ..."""
    return {name + part: tensor for name in state for part, tensor in components(state[name]).items()}


def _digest(entries: Iterable[Entry]) -> str:
    sha = hashlib.sha256()
    for name, dtype, shape, raw in entries:
        sha.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        sha.update(raw)
    return sha.hexdigest()


def tensor_bytes(tensor: Any) -> memoryview:
    """Return a tensor's raw bytes in C order; copies only from a device or a strided view."""
    torch: Any = sys.modules["torch"]  # imported by whoever made it
    plain = tensor.detach()
    if not plain.is_cpu or not plain.is_contiguous():
        plain = plain.cpu().contiguous()
    if plain.dtype in (torch.float32, torch.int64, torch.float64) and plain.numel():
        return memoryview(plain.numpy()).cast("B")  # half the time of what takes every dtype
    return memoryview(plain.view(-1).view(torch.uint8).numpy())


def read_weights(folder: Path) -> Iterator[Entry]:
    """Yield (name, dtype, shape, bytes) of each tensor of a checkpoint's weights, by name.

    Raises:
        DamagedError: a file is cut short or is no safetensors file, or a part is missing.
    """
    parts = sorted(folder.glob("shard-*.safetensors"))
    if not parts:
        yield from read_safetensors(folder / "weights.safetensors")
        return
    found: dict[str, list[tuple[_Part, list[int]]]] = {}
    for path in parts:
        metadata, tensors = _header(path)
        with _damage_of(path):
            offsets = json.loads(metadata["DCP_SHARDING_INFO"])
            for name, part in tensors.items():
                if name.startswith(SPREAD_WEIGHTS):
                    found.setdefault(name, []).append((part, offsets[name]["saved_offsets"]))
    for name in sorted(found):
        yield name.removeprefix(SPREAD_WEIGHTS), *_whole(name, found[name])


def read_safetensors(path: Path) -> Iterator[Entry]:
    """Yield (name, dtype, shape, bytes) of each tensor of a ``.safetensors`` file, by name.

    Raises:
        DamagedError: the file is cut short or is no safetensors file.
    """
    for name, part in sorted(_header(path)[1].items()):
        yield name, part.dtype, part.shape, part.read()


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a tensor, or a part of one, lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.first)
            raw = file.read(self.last - self.first)
        if len(raw) != self.last - self.first:
            raise DamagedError(f"{self.path}: not a whole safetensors file (cut short)")
        return raw


def _header(path: Path) -> tuple[dict[str, str], dict[str, _Part]]:
    """Return a ``.safetensors`` file's metadata, and where its tensors lie."""
    with _damage_of(path), path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > path.stat().st_size:
            raise ValueError("header longer than the file")
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        return metadata, {
            name: _Part(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]),
                        *(8 + size + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }  # fmt: skip


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DamagedError(f"{path}: not a whole safetensors file ({error})") from error


def _whole(name: str, parts: list[tuple[_Part, list[int]]]) -> tuple[str, tuple[int, ...], memoryview]:
    """Put a tensor's parts together, each at its offsets."""
    import numpy as np

    shape = tuple(
        max(offset + size for offset, size in zip(sides, sizes, strict=True))
        for sides, sizes in zip(
            zip(*(offsets for _, offsets in parts), strict=True),
            zip(*(part.shape for part, _ in parts), strict=True),
            strict=True,
        )
    )
    filled = sum(math.prod(part.shape) for part, _ in parts)
    if filled != math.prod(shape):
        raise DamagedError(f"{parts[0][0].path.parent}: {name} is not whole: {filled} of {math.prod(shape)} values")
    item = next(((part.last - part.first) // math.prod(part.shape) for part, _ in parts if math.prod(part.shape)), 1)
    whole = np.empty((*shape, item), np.uint8)
    for part, offsets in parts:
        place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, part.shape, strict=True))
        whole[place] = np.frombuffer(part.read(), np.uint8).reshape(*part.shape, item)
    return parts[0][0].dtype, shape, whole.reshape(-1).data


def _parts(name: str, tensor: Any) -> tuple[str, tuple[int, ...], memoryview]:
    if not hasattr(tensor, "detach"):
        raise LabtrainError(f"cannot digest {name}: {type(tensor).__name__} is no tensor")
    if hasattr(tensor, "full_tensor"):  # spread over the ranks: brought together, by all of them at once
        tensor = tensor.full_tensor()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor_bytes(tensor)


def digest_tree(tree: Any, *, algorithm: Any = hashlib.sha256) -> str:
    """Return the sha256 over nested dicts, lists and tuples of tensors and plain values: a training state.

    Args:
        tree: what is digested.
        algorithm: another than sha256: a faster one, of what is compared in one process.

    Raises:
        LabtrainError: a leaf is neither a tensor nor a plain value.
    """
    sha = algorithm()
    _walk(tree, sha, "state")
    digits: str = sha.hexdigest()
    return digits


def digest_content(node: Any) -> str:
    """Return the sha256 over nested tensors, arrays and plain values; over other objects by their type alone."""
    sha = hashlib.sha256()

    def walk(each: Any) -> None:
        sha.update(f"{type(each).__qualname__}(".encode())
        if isinstance(each, Mapping):
            for key, value in each.items():
                walk(key)
                walk(value)
        elif isinstance(each, list | tuple):
            for value in each:
                walk(value)
        elif hasattr(each, "detach") and hasattr(each, "is_sparse"):
            if str(each.layout) == "torch.strided" and not each.is_nested and each.device.type != "meta":
                sha.update(f"{each.dtype}{tuple(each.shape)}".encode())
                sha.update(tensor_bytes(each))
        elif hasattr(each, "__array_interface__"):
            import numpy as np

            array = np.asarray(each)  # an image of PIL's too
            sha.update(f"{array.dtype}{array.shape}".encode())
            if array.dtype.hasobject:
                walk(array.tolist())
            else:
                sha.update(array.tobytes())
        elif each is None or isinstance(each, bool | int | float | complex | str | bytes):
            sha.update(repr(each).encode())
        sha.update(b")")

    walk(node)
    return sha.hexdigest()


def _walk(node: Any, sha: Any, where: str) -> None:
    if isinstance(node, Mapping):
        sha.update(b"{")
        for key in sorted(node, key=repr):
            sha.update(f"{key!r}:".encode())
            _walk(node[key], sha, f"{where}.{key}")
        sha.update(b"}")
    elif isinstance(node, list | tuple):
        sha.update(b"[")
        for index, item in enumerate(node):
            _walk(item, sha, f"{where}.{index}")
            sha.update(b",")
        sha.update(b"]")
    elif hasattr(node, "detach") and "" not in (parts := components(node)):
        _walk(parts, sha, where)
    elif hasattr(node, "detach"):
        dtype, shape, raw = _parts(where, node)
        sha.update(f"{dtype}{shape}".encode())
        sha.update(raw)
    elif node is None or isinstance(node, bool | int | float | str | bytes):
        sha.update(repr(node).encode())
    else:
        raise LabtrainError(
            f"{where} is a {type(node).__name__}: no tensor, number, string, list or dict, so no part of a checkpoint",
            hint="keep plain values in hyperparameters and state_dicts",
        )
