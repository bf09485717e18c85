"""The files of a checkpoint: one training's state, whole, or a part a rank.

::

    weights.safetensors                     the state dict, where every rank has all of it; a sparse tensor as what
                                            it is made of (digests.components)
    shard-00001-model-00001-of-00001....    where it is spread over the ranks (FSDP): rank 0's part of weights and
    shard-00002-...                         moments, rank 1's, ...; each tensor named by its path in the state
    state.pt                                the rest; loads with weights_only=True

Parts are planned, written and put together by torch.distributed.checkpoint, in its safetensors format, whose reader
finds what lies where in the files' own headers: the default format keeps that in a pickle. So a state that was saved by
four ranks is read by any number of them, each its own part, or whole by one process without the others.
https://docs.pytorch.org/docs/2.9/distributed.checkpoint.html
"""

import ctypes
import hashlib
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from labtrain.base import untrusted
from labtrain.base.console import quoted
from labtrain.base.errors import DamagedError, LabtrainError, StoreError
from labtrain.base.files import file_sha256, sync
from labtrain.base.untrusted import damage_of
from labtrain.checkpoints import structure
from labtrain.record.digests import (
    MOST_BYTES,
    PLACE,
    SPREAD_WEIGHTS,
    check_safetensors,
    check_weights,
    components,
    dense_entries,
    digest,
    digest_folder,
)
from labtrain.stores.store import STATE, WEIGHTS, Manifest

HASHED_BYTES = 1 << 20
TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
PARTS = "parts"  # in state.pt: the paths of the tensors that lie in the parts

State = dict[str, Any]
Keys = tuple[Any, ...]
T = TypeVar("T")


def is_spread(weights: State) -> bool:
    """Return whether a state dict is spread over the ranks: whether each holds but a part of some tensor."""
    return any(isinstance(tensor, DTensor) for tensor in weights.values())


def write_files(folder: Path, state: State, group: Any = None) -> Manifest:
    """Write a state to a new folder; return its files' sha256 and size, and the weights digest.

    The files are on the disk then; that the folder names them is for who gives it its manifest.

    Args:
        folder: must hold nothing yet.
        state: tensors and plain values, the weights under `state_dict`; must not change meanwhile.
        group: where the state is spread, the ranks that hold it; all of them call this, and rank 0 has the answer.
    """
    together(group, lambda: folder.mkdir(parents=True, exist_ok=True))  # empty where a crash came right after this line
    return _write_whole(folder, state) if group is None else _write_part(folder, state, group)


def together(group: Any, action: Callable[[], T]) -> list[T]:
    """Run an action on every rank of a group and return what each returned; where one fails, fail on all.

    Raises:
        LabtrainError: another rank has failed; says which, and why.
    """
    if group is None:
        return [action()]
    result, failure, said = None, None, None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others wait to hear of it
        failure, said = error, (_words(error), getattr(error, "hint", ""))
    all_of_them: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_of_them, (result, said), group=group)
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(all_of_them):
        if failed is not None:
            raise LabtrainError(
                f"rank {rank}: {failed[0]}", hint=failed[1] or "the same command resumes from the newest"
            )
    return [result for result, _ in all_of_them]


def _words(error: BaseException) -> str:
    """Return an exception in a line, without its hint."""
    if isinstance(error, LabtrainError):
        return str(error.args[0])
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def load_folder(folder: Path, like: State | None = None) -> State:
    """Return Lightning's checkpoint dictionary from a folder that was verified, without its loops.

    Args:
        folder: of a checkpoint.
        like: the state as it is spread over the ranks now: each then reads its own parts, to where those of `like`
            are, and all ranks call this. Else the whole is read, on the CPU, optimizers' states by number.

    Raises:
        DamagedError: loading it would run code, or its parts are not there.
    """
    state = load_plain(folder / STATE)
    if PLACE in state:
        with damage_of(folder / STATE, hint=_ask(folder)):
            structure.check(state[PLACE], {"ranks": [dict]}, PLACE)
    if not in_parts(folder):
        return state | {"state_dict": _load_weights(folder)}
    with damage_of(folder / STATE, hint=_ask(folder)):
        paths: dict[str, Keys] = {_name(path): tuple(path) for path in state.pop(PARTS)}
    now = {} if like is None else _flat(like)
    tensors = _load_parts(folder, paths, now, alone=like is None)
    with damage_of(folder / STATE, hint=_ask(folder)):
        for name, path in paths.items():
            _put(state, path, tensors[name])
        if like is None:
            state["optimizer_states"] = [_numbered(optimizer) for optimizer in state.get("optimizer_states", [])]
    return state


def check_loads(folder: Path, manifest: Manifest) -> None:
    """Hold a checkpoint, whose files are as its manifest says, against what a training goes on from; reads little.

    Raises:
        DamagedError: it cannot be loaded, or is the state of another place.
    """
    state = load_plain(folder / STATE, mapped=True)
    with damage_of(folder / STATE, hint=_ask(folder)):
        for path in state.get(PARTS, []):
            _put(state, path, torch.empty(0))  # which stands for what lies there
        structure.check(state)
        place = state[PLACE]
        if not place["ranks"]:
            raise ValueError(f"its {PLACE}.ranks is empty")
        said = [manifest[key] for key in ("step", "epoch", "batch")]
        found = [place[key] for key in ("global_step", "epoch", "batch")]
        if said != found:
            raise ValueError(f"its step, epoch and batch are {found}, but its manifest says {said}")
    check_weights(folder)


def load_plain(path: Path, *, mapped: bool = False) -> State:
    """Return the dictionary that torch.save wrote to a file, on the CPU. No code is run from it.

    Args:
        path: of the file.
        mapped: leave its tensors on the disk until they are read.

    Raises:
        DamagedError: that is not what it holds, or it would be larger in memory than the file is.
        FileNotFoundError: it is not there.
    """
    with damage_of(path, hint=_ask(path.parent)):
        with untrusted.open_plain(path, MOST_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) == b"PK\x03\x04":
                _check_archive(file, size)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch's, of how the file was written
                loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        except MemoryError:
            raise ValueError("it does not fit into memory") from None
        # Whatever torch makes of bytes that it has not written. Its words advise to run the code in the file.
        except Exception as error:
            if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
                raise DamagedError(
                    f"{path} cannot be read without running code from it: it holds {found[1]}", hint=_ask(path.parent)
                ) from error
            raise ValueError("not a complete file of torch.save, or not only plain values") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"a {type(loaded).__name__}, expected a dict")
        for leaf in untrusted.leaves(loaded):
            if isinstance(leaf, torch.Tensor):
                _check_tensor(leaf, size)
    return loaded


def _check_archive(file: IO[bytes], size: int) -> None:
    """Refuse an archive whose files are larger than itself: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    declared = sum(entry.file_size for entry in entries)
    if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"it declares parts of {declared:,} bytes, but has {size:,}")


def _check_tensor(tensor: torch.Tensor, size: int) -> None:
    """Refuse a tensor that is no plain one, or larger than the file that it came from."""
    layout = str(tensor.layout).removeprefix("torch.")
    if type(tensor) not in TENSORS or tensor.device.type != "cpu" or tensor.is_quantized or layout not in LAYOUTS:
        raise ValueError(f"holds a {type(tensor).__name__} on {tensor.device}, {layout}: expected a plain tensor")
    for part in components(tensor).values():
        if part.numel() * part.element_size() > max(size, 1 << 10):
            raise ValueError(f"a tensor of {tuple(part.shape)} in a file of {size:,} bytes")


def _ask(folder: Path) -> str:
    return f"rm -r {quoted(folder)}, and ask who wrote it"


def load_weights_of(folder: Path) -> State:
    """Return a checkpoint's state dict, whole, on the CPU."""
    if not in_parts(folder):
        return _load_weights(folder)
    tensors = _load_parts(folder, None, {}, alone=True)
    return {name.removeprefix(SPREAD_WEIGHTS): tensor for name, tensor in tensors.items()}


def _load_weights(folder: Path) -> State:
    """Return a state dict from its file, its sparse tensors put together (`digests.components`)."""
    entries = load_tensors(folder / WEIGHTS)
    found = {}
    for name, tensor in entries.items():
        whole, _, part = name.rpartition(".")
        owner, _, layout = whole.rpartition(".")
        if f"{whole}.size" not in entries or f"{whole}.values" not in entries or not layout.startswith("sparse_"):
            found[name] = tensor
        elif part == "size":
            with damage_of(folder / WEIGHTS, hint=_ask(folder)):
                *size, coalesced = tensor.tolist()
                values, indices = entries[f"{whole}.values"], entries[f"{whole}.indices"]
                if layout == "sparse_coo":
                    found[owner] = torch.sparse_coo_tensor(indices, values, size, is_coalesced=bool(coalesced))
                else:
                    made = getattr(torch, f"{layout}_tensor")
                    found[owner] = made(entries[f"{whole}.indptr"], indices, values, size, check_invariants=True)
    return found


def load_tensors(path: Path) -> State:
    """Return the tensors of a ``.safetensors`` file, on the CPU.

    Raises:
        DamagedError: it is none.
    """
    check_safetensors(path)
    with damage_of(path, hint=_ask(path.parent)):
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(str(error)) from error


def in_parts(folder: Path) -> bool:
    """Return whether a checkpoint was saved by ranks that each held a part."""
    return not (folder / WEIGHTS).exists()


def _write_whole(folder: Path, state: State) -> Manifest:
    weights = state["state_dict"]
    rest = {key: value for key, value in state.items() if key != "state_dict"}

    def write_weights() -> str:
        (folder / WEIGHTS).touch()
        mode = (folder / WEIGHTS).stat().st_mode  # as umask and folder say; safetensors replaces it by one of 0600
        save_file({name: tensor.contiguous() for name, tensor in dense_entries(weights).items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(mode)
        hashed = pool.submit(file_sha256, folder / WEIGHTS)
        sync(folder / WEIGHTS)
        return hashed.result()

    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter's lock, and so does the disk
        rest_sha, weights_sha = pool.submit(_write_rest, folder, rest, pool), pool.submit(write_weights)
        files = {WEIGHTS: weights_sha, STATE: rest_sha}
        manifest: Manifest = {"weights_digest": digest(weights)}
        manifest["files"] = {
            name: {"sha256": sha.result(), "size_bytes": (folder / name).stat().st_size} for name, sha in files.items()
        }
    return manifest


def _write_part(folder: Path, state: State, group: Any) -> Manifest:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank = dist.get_rank(group)
    paths: list[Keys] = []
    rest = _without_parts(state, (), paths)
    # What is no DTensor is rank 0's; the others' buffers are in the place of the training (epoch_loop.py).
    tensors = {_name(path): _get(state, path) for path in paths}
    tensors = {
        name: tensor if isinstance(tensor, DTensor) else tensor.contiguous()
        for name, tensor in tensors.items()
        if rank == 0 or isinstance(tensor, DTensor)
    }
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # no Exception, and raised on all ranks
        failed, (cause, _) = next(iter(error.failures.items()))
        raise StoreError(
            f"{folder}: rank {failed} could not write its part: {_words(cause)}", hint=f"df -h {quoted(folder.parent)}"
        ) from error

    def hashed() -> Manifest:
        mine = {path.name: file_sha256(path) for path in folder.glob(f"shard-{rank + 1:05d}-*")}
        if rank == 0:
            with ThreadPoolExecutor(1) as pool:
                mine[STATE] = _write_rest(folder, {**rest, PARTS: [list(path) for path in paths]}, pool)
        sync(folder)
        return {name: {"sha256": sha, "size_bytes": (folder / name).stat().st_size} for name, sha in mine.items()}

    files = {name: entry for part in together(group, hashed) for name, entry in part.items()}

    def summary() -> Manifest:
        if rank != 0:
            return {}
        if hidden := [name for name in files if not (folder / name).exists()]:
            raise StoreError(
                f"{folder}/{hidden[0]} was written by another rank, and rank 0 does not see it",
                hint="set paths.runs to a folder that all nodes share",
            )
        return {"files": files, "weights_digest": digest_folder(folder)}

    return together(group, summary)[0]


def _write_rest(folder: Path, rest: State, pool: ThreadPoolExecutor) -> str:
    with (folder / STATE).open("wb") as file:  # torch's own has no words for a full disk
        complete = threading.Event()
        hashed = pool.submit(_hash_behind, folder / STATE, complete)
        try:
            torch.save(rest, file)
            file.flush()
        finally:
            complete.set()
        os.fsync(file.fileno())
    return hashed.result()


def _hash_behind(path: Path, complete: threading.Event) -> str:
    """Return the sha256 of a file that is being written from its beginning to its end, and have it go to the disk.

    Linux: sync_file_range(2), SYNC_FILE_RANGE_WRITE. Else all of it would begin with the fsync, when all is written.
    """
    begin_writeback = ctypes.CDLL(None).sync_file_range
    begin_writeback.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    sha, buffer, done = hashlib.sha256(), memoryview(bytearray(HASHED_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while True:
            last = complete.is_set()
            while size := file.readinto(buffer):
                sha.update(buffer[:size])
                begin_writeback(file.fileno(), done, size, 2)
                done += size
            if last:
                return sha.hexdigest()
            complete.wait(0.002)


def _load_parts(folder: Path, names: Any, now: State, *, alone: bool) -> State:
    """Return the tensors of these names, of the weights by default: to the like of what is in `now`, else whole."""
    # 0.1 s, which a training without parts need not pay
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    check_weights(folder)
    reader = HuggingFaceStorageReader(str(folder))
    with damage_of(folder, hint=_ask(folder)):
        known: Any = reader.read_metadata().state_dict_metadata
    if names is None:
        names = [name for name in known if name.startswith(SPREAD_WEIGHTS)]
    if missing := [name for name in names if name not in known]:
        raise DamagedError(
            f"{folder}: {missing[0]} is in none of its parts", hint=f"labtrain store check {quoted(folder.parent)}"
        )
    tensors = {
        name: torch.empty_like(now[name])
        if name in now
        else torch.empty(known[name].size, dtype=known[name].properties.dtype)
        for name in names
    }
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # that it does so in one process
        try:
            load(tensors, storage_reader=reader, no_dist=alone)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise LabtrainError(
                f"{folder} does not fit: {cause}", hint="use the model that it was saved from; or resume=never"
            ) from error
    return tensors


def _without_parts(node: Any, path: Keys, paths: list[Keys]) -> Any:
    """Return a state with None for what lies in the parts, the weights and each DTensor; note the paths of those."""
    if isinstance(node, dict):
        kind: Any = type(node)  # a Counter, say
        return kind({key: _without_parts(value, (*path, key), paths) for key, value in node.items()})
    if isinstance(node, list | tuple) and type(node) in (list, tuple):
        return type(node)(_without_parts(value, (*path, index), paths) for index, value in enumerate(node))
    if isinstance(node, DTensor) or (path[0] == "state_dict" and isinstance(node, torch.Tensor)):
        paths.append(path)
        return None
    return node


def _flat(state: State) -> State:
    paths: list[Keys] = []
    _without_parts(state, (), paths)
    return {_name(path): _get(state, path) for path in paths}


def _name(path: Any) -> str:
    return "/".join(map(str, path))


def _get(state: Any, path: Keys) -> Any:
    for key in path:
        state = state[key]
    return state


def _put(state: Any, path: Keys, value: Any) -> None:
    _get(state, path[:-1])[path[-1]] = value


def _numbered(optimizer: State) -> State:
    """Return an optimizer's state by the parameters' numbers, as an optimizer itself has it; saved is it by names."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {number[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}
