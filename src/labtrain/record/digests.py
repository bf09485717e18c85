"""The weights digest: one sha256 over a state dict, the same from memory, from a checkpoint and in any language.

It covers the entries sorted by key: key, NUL, dtype, NUL, shape joined by commas, NUL, the raw little-endian bytes in C
order. The dtype is torch's name without its prefix (``float32``, ``bfloat16``, ``int64``). A sparse tensor counts as
its dense components (`components`). This module does not import torch: it uses a tensor's methods, and reads a
``.safetensors`` file as bytes.
"""

import hashlib
import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from labtrain.base import untrusted
from labtrain.base.contracts import Options, State
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.base.untrusted import damage_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# safetensors' dtype names, in its order: a file has the last dtype first. https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

BYTES = {
    name: 8 if name.endswith("64") else 4 if name.endswith("32") else 2 if name.endswith("16") else 1
    for name in _DTYPES.values()
}
MOST_BYTES = 1 << 50  # maximum size of a weights file
PIECE_BYTES = 1 << 20  # maximum size of a copy of a part of a tensor
WHAT = "is not a complete safetensors file"
HINT = "copy it again from the machine that wrote it; labtrain store ls URL lists all checkpoints"

WEIGHT_DTYPE_NAMES = tuple(_DTYPES.values())

SPREAD_WEIGHTS = "state_dict/"  # prefix of weights' names in a checkpoint in several files (format.py)

PLACE = "labtrain"  # labtrain's own key in Lightning's checkpoint dictionary (epoch_loop.py)

Entry = tuple[str, str, tuple[int, ...], bytes | memoryview]


class Hash(Protocol):
    """What the hashes of hashlib and xxhash have in common."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def digest(weights: "nn.Module | Mapping[str, Tensor]") -> str:
    """Return the weights digest of a module or of a state dict.

    Args:
        weights: a ``torch.nn.Module``, or a mapping from names to tensors, on any device.

    Returns:
        64 hex digits.

    Raises:
        LabtrainError: an entry is not a tensor.
    """
    state = weights if isinstance(weights, Mapping) else weights.state_dict()
    entries = dense_entries(state)
    return _digest((name, *_parts(name, entries[name])) for name in sorted(entries))


def digest_file(path: Path) -> str:
    """Return the weights digest of a ``.safetensors`` file, reading one tensor at a time."""
    return _digest((name, dtype, shape, [raw]) for name, dtype, shape, raw in read_safetensors(path))


def digest_folder(folder: Path) -> str:
    """Return the weights digest of a checkpoint's folder, in one file or several, reading one tensor at a time."""
    return _digest((name, dtype, shape, [raw]) for name, dtype, shape, raw in read_weights(folder))


def state_digest(state: State) -> str:
    """Return the sha256 over a whole training state: tensors, plain values, and the weights' digest.

    Plain attributes of the model and of other objects are left out: a duration, for example, differs in each training.
    The optimizers' initial values, which follow from the configuration, and names of changed objects are left out too.
    """
    state = {**state, "state_dict": digest(state["state_dict"])}
    if PLACE in state:
        left = "attributes", "outputs"
        ranks = [{key: value for key, value in rank.items() if key not in left} for rank in state[PLACE]["ranks"]]
        place = {key: value for key, value in state[PLACE].items() if key not in ("initial", "lost", "made", "outside")}
        state[PLACE] = {**place, "ranks": ranks}
    return digest_tree(state)


def components(tensor: "Tensor") -> dict[str, "Tensor"]:
    """Return a sparse tensor's dense components, by name; for a dense tensor itself, under an empty name.

    Duplicate entries are not added up, because that would round.
    """
    layout = str(getattr(tensor, "layout", "torch.strided")).removeprefix("torch.")
    if layout in ("strided", "_mkldnn"):
        return {"": tensor}
    torch = sys.modules["torch"]
    tensor = tensor.detach()
    size = [*tensor.shape, int(layout == "sparse_coo" and tensor.is_coalesced())]
    if layout == "sparse_coo":
        found = {"indices": tensor._indices(), "values": tensor._values()}
    elif layout in ("sparse_csr", "sparse_bsr"):
        found = {"indptr": tensor.crow_indices(), "indices": tensor.col_indices(), "values": tensor.values()}
    else:
        found = {"indptr": tensor.ccol_indices(), "indices": tensor.row_indices(), "values": tensor.values()}
    return {f".{layout}.{name}": part for name, part in (found | {"size": torch.tensor(size)}).items()}


def dense_entries(state: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return a state dict with sparse tensors replaced by their components: `table.sparse_coo.values`, ..."""
    return {name + part: tensor for name in state for part, tensor in components(state[name]).items()}


def _digest(entries: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes | memoryview]]]) -> str:
    sha = hashlib.sha256()
    for name, dtype, shape, pieces in entries:
        sha.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        for piece in pieces:
            sha.update(piece)
    return sha.hexdigest()


def tensor_bytes(tensor: "Tensor") -> memoryview:
    """Return a tensor's raw bytes in C order; copies only from a device or a strided view."""
    torch = sys.modules["torch"]  # imported by the tensor's creator
    plain = tensor.detach()
    if not plain.is_cpu or not plain.is_contiguous():
        plain = plain.cpu().contiguous()
    if plain.dtype in (torch.float32, torch.int64, torch.float64) and plain.numel():
        return plain.numpy().data.cast("B")  # half the time of the general way
    return plain.view(-1).view(torch.uint8).numpy().data


def tensor_pieces(tensor: "Tensor") -> Iterator[memoryview]:
    """Yield a tensor's raw bytes in C order; copies at most PIECE_BYTES of a strided view at a time."""
    if tensor.is_contiguous() or tensor.nbytes <= PIECE_BYTES:
        yield tensor_bytes(tensor)
    elif rows := len(tensor) * PIECE_BYTES // tensor.nbytes:
        yield from map(tensor_bytes, tensor.detach().split(rows))
    else:
        for row in tensor.detach():
            yield from tensor_pieces(row)


def write_safetensors(file: IO[bytes], entries: Mapping[str, "Tensor"]) -> None:
    """Write dense tensors as the same bytes as safetensors' own `save_file`, straight from their memory.

    `save_file` makes a file of its own at once, so nothing can be hashed, or sent to the disk, while it writes.

    Args:
        file: is new and open for writing.
        entries: by name; their dtypes are in `WEIGHT_DTYPE_NAMES`.
    """
    order = {dtype: (rank, name) for rank, (name, dtype) in enumerate(reversed(_DTYPES.items()))}
    dtypes = {name: order[str(tensor.dtype).removeprefix("torch.")] for name, tensor in entries.items()}
    names = sorted(entries, key=lambda name: (dtypes[name], name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + entries[name].nbytes
        header[name] = {
            "dtype": dtypes[name][1],
            "shape": list(entries[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        for piece in tensor_pieces(entries[name]):
            file.write(piece)


def read_weights(folder: Path) -> Iterator[Entry]:
    """Yield (name, dtype, shape, bytes) of each tensor of a checkpoint's weights, by name.

    Raises:
        DamagedError: a file is truncated or not a safetensors file, or a part is missing.
    """
    parts = sorted(folder.glob("shard-*.safetensors"))
    if not parts:
        yield from read_safetensors(folder / "weights.safetensors")
        return
    found = _tensors_of(parts)
    for name in sorted(found):
        if name.startswith(SPREAD_WEIGHTS):
            yield name.removeprefix(SPREAD_WEIGHTS), *_whole(name, found[name])


def _tensors_of(parts: list[Path]) -> dict[str, list[tuple["_Part", list[int]]]]:
    """Return the parts of each tensor from several files, with each part's offset in the tensor."""
    found: dict[str, list[tuple[_Part, list[int]]]] = {}
    for path in parts:
        metadata, tensors = _header(path)
        with damage_of(path, hint=HINT, what=WHAT):
            offsets = untrusted.loads(metadata["DCP_SHARDING_INFO"])
            for name, part in tensors.items():
                place = offsets[name]["saved_offsets"]
                if len(place) != len(part.shape) or not all(map(untrusted.is_count, place)):
                    raise ValueError(f"{name} at {place}")
                found.setdefault(name, []).append((part, place))
    return found


def check_weights(folder: Path) -> None:
    """Check the headers of a checkpoint's weights files against the files; read nothing else.

    Raises:
        DamagedError: a file is truncated or not a safetensors file, or a part is missing.
    """
    if not (parts := sorted(folder.glob("*.safetensors"))):
        raise DamagedError(f"{folder} contains no weights", hint=HINT)
    if parts == [folder / "weights.safetensors"]:
        check_safetensors(parts[0])
        return
    for name, found in _tensors_of(parts).items():
        _shape_of(name, found)


def read_safetensors(path: Path) -> Iterator[Entry]:
    """Yield (name, dtype, shape, bytes) of each tensor of a ``.safetensors`` file, by name.

    Raises:
        DamagedError: the file is truncated or not a safetensors file.
    """
    for name, part in sorted(_header(path)[1].items()):
        yield name, part.dtype, part.shape, part.read()


@dataclass(frozen=True, slots=True)
class _Part:
    """The place of a tensor, or of a part of it, in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    def read(self) -> bytes:
        with damage_of(self.path, hint=HINT, what=WHAT), untrusted.open_plain(self.path) as file:
            file.seek(self.first)
            raw = file.read(self.last - self.first)
            if len(raw) != self.last - self.first:
                raise ValueError("truncated")
        return raw


def check_safetensors(path: Path) -> None:
    """Check the header of a ``.safetensors`` file against the file's size, before reading the rest.

    Raises:
        DamagedError: it is not a regular file, truncated, or not a safetensors file.
    """
    _header(path)


def _header(path: Path) -> tuple[dict[str, str], dict[str, _Part]]:
    """Return a ``.safetensors`` file's metadata and its tensors' places: within the file, without overlap."""
    try:
        with damage_of(path, hint=HINT, what=WHAT), untrusted.open_plain(path, MOST_BYTES) as file:
            (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            room = os.fstat(file.fileno()).st_size - 8 - size
            if room < 0 or size > untrusted.RECORD_BYTES:
                raise ValueError("header longer than the file")
            header = untrusted.loads(file.read(size))
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("metadata that is not text")
            found = {name: _part(path, 8 + size, room, entry) for name, entry in header.items()}
            end = 8 + size
            for part in sorted(found.values(), key=lambda each: (each.first, each.last)):
                if part.first < end:
                    raise ValueError("two tensors overlap")
                end = part.last
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{path}: no such file", hint=HINT) from error
    return metadata, found


def _part(path: Path, begin: int, room: int, entry: Options) -> _Part:
    """Return a tensor's place.

    Raises:
        ValueError: it is not within the file, or its size is wrong.
    """
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > 64 or not all(map(untrusted.is_count, (first, last, *shape))) or not first <= last <= room:
        raise ValueError(f"{shape} at {first} to {last}, of {room} bytes")
    if math.prod(shape) * BYTES[dtype] != last - first:
        raise ValueError(f"{shape} of {dtype} in {last - first} bytes")
    return _Part(path, dtype, shape, begin + first, begin + last)


def _shape_of(name: str, parts: list[tuple[_Part, list[int]]]) -> tuple[int, ...]:
    """Return the shape of a tensor from its parts.

    Raises:
        DamagedError: a part is missing.
    """
    folder = parts[0][0].path.parent
    if len({(len(part.shape), part.dtype) for part, _ in parts}) > 1:
        raise DamagedError(f"{folder}: the parts of {name} have different types", hint=HINT)
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
        raise DamagedError(f"{folder}: {name} is incomplete: {filled} of {math.prod(shape)} values", hint=HINT)
    return shape


def _whole(name: str, parts: list[tuple[_Part, list[int]]]) -> tuple[str, tuple[int, ...], memoryview]:
    """Join a tensor's parts at their offsets."""
    import numpy as np

    shape = _shape_of(name, parts)
    item = next(((part.last - part.first) // math.prod(part.shape) for part, _ in parts if math.prod(part.shape)), 1)
    whole = np.zeros((*shape, item), np.uint8)
    for part, offsets in parts:
        place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, part.shape, strict=True))
        whole[place] = np.frombuffer(part.read(), np.uint8).reshape(*part.shape, item)
    return parts[0][0].dtype, shape, whole.reshape(-1).data


def _parts(name: str, tensor: "Tensor") -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
    if not hasattr(tensor, "detach"):
        raise LabtrainError(f"cannot digest {name}: must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):  # sharded over the ranks; all of them must call this
        tensor = tensor.full_tensor()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor_pieces(tensor)


def digest_tree(tree: object, *, algorithm: Callable[[], Hash] = hashlib.sha256) -> str:
    """Return the sha256 over nested dicts, lists and tuples of tensors and plain values: a training state.

    Args:
        tree: the state.
        algorithm: a faster one than sha256, for comparisons within one process.

    Raises:
        LabtrainError: a leaf is neither a tensor nor a plain value.
    """
    sha = algorithm()
    _walk(tree, sha, "state")
    return sha.hexdigest()


def digest_content(node: object) -> str:
    """Return the sha256 over nested tensors, arrays and plain values; other objects count only by their type."""
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

            array = np.asarray(each)  # also for PIL images
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


def _walk(node: Any, sha: Hash, where: str) -> None:
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
        dtype, shape, pieces = _parts(where, node)
        sha.update(f"{dtype}{shape}".encode())
        for piece in pieces:
            sha.update(piece)
    elif node is None or isinstance(node, bool | int | float | str | bytes):
        sha.update(repr(node).encode())
    else:
        raise LabtrainError(
            f"{where} is a {type(node).__name__}; checkpoints hold only tensors, numbers, strings, lists and dicts",
            hint="keep plain values in hyperparameters and state_dicts",
        )
