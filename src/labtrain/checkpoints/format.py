"""The files of a checkpoint: the state of a training, whole or one part a rank.

::

    weights.safetensors                     the state dict, if every rank has all of it; a sparse tensor as its
                                            components (digests.components)
    shard-00001-model-00001-of-00001....    if it is spread over the ranks (FSDP): rank 0's part of weights and
    shard-00002-...                         moments, rank 1's, ...; each tensor named by its path in the state
    state.pt                                the rest; loads with weights_only=True

torch.distributed.checkpoint plans, writes and joins the parts, in its safetensors format. Its reader finds the tensors
from the files' headers; the default format keeps their places in a pickle. So any number of ranks can read a state that
four ranks saved, each its own part, and a single process can read it whole.
https://docs.pytorch.org/docs/2.9/distributed.checkpoint.html
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from labtrain.base import untrusted
from labtrain.base.console import quoted
from labtrain.base.contracts import SavedFile, State
from labtrain.base.errors import DamagedError, LabtrainError, StoreError
from labtrain.base.files import file_sha256, sync, write_hashed
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
    write_safetensors,
)
from labtrain.stores.store import STATE, WEIGHTS, Manifest

TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
PARTS = "parts"  # in state.pt: the paths of the tensors that are in the parts

Keys = tuple[object, ...]
T = TypeVar("T")


def is_spread(weights: State) -> bool:
    """Return whether a state dict is spread over the ranks: each holds only a part of some tensor."""
    return any(isinstance(tensor, DTensor) for tensor in weights.values())


def write_files(folder: Path, state: State, group: "dist.ProcessGroup | None" = None) -> Manifest:
    """Write a state to a new folder; return its files' sha256 and size, and the weights digest.

    The files are then on the disk. The caller syncs the folder when it writes the manifest.

    Args:
        folder: must be empty.
        state: tensors and plain values, the weights under `state_dict`; must not change meanwhile.
        group: if the state is spread, the ranks that hold it; all of them call this, and rank 0 gets the result.
    """
    together(group, lambda: folder.mkdir(parents=True, exist_ok=True))  # empty if a crash came right after this line
    return _write_whole(folder, state) if group is None else _write_part(folder, state, group)


def together(group: "dist.ProcessGroup | None", action: Callable[[], T]) -> list[T]:
    """Run an action on every rank of a group and return all results; if one fails, fail on all ranks.

    Raises:
        LabtrainError: another rank has failed; with its number and the reason.
    """
    if group is None:
        return [action()]
    result, failure, said = None, None, None
    try:
        result = action()
    except Exception as error:  # the other ranks wait for the result, whatever the error
        failure, said = error, (_words(error), getattr(error, "hint", ""))
    all_of_them: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_of_them, (result, said), group=group)
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(all_of_them):
        if failed is not None:
            raise LabtrainError(
                f"rank {rank}: {failed[0]}", hint=failed[1] or "the same command resumes from the newest checkpoint"
            )
    return [result for result, _ in all_of_them]


def _words(error: BaseException) -> str:
    """Return an exception in a line, without its hint."""
    if isinstance(error, LabtrainError):
        return str(error.args[0])
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def load_folder(folder: Path, like: State | None = None) -> State:
    """Return Lightning's checkpoint dictionary, without its loops, from a verified folder.

    Args:
        folder: of a checkpoint.
        like: the current state, spread over the ranks: each rank then reads its own parts to the devices of `like`,
            and all ranks call this. Otherwise read the whole state on the CPU, optimizers' states by number.

    Raises:
        DamagedError: loading it would run code, or a part is missing.
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
    """Check that a training can resume from a checkpoint whose files fit its manifest; reads little.

    Raises:
        DamagedError: it cannot be loaded, or its step, epoch or batch differs from the manifest.
    """
    state = load_plain(folder / STATE, mapped=True)
    with damage_of(folder / STATE, hint=_ask(folder)):
        for path in state.get(PARTS, []):
            _put(state, path, torch.empty(0))  # a placeholder for the part
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
    """Return the dictionary that torch.save wrote to a file, on the CPU, without running code from it.

    Args:
        path: of the file.
        mapped: leave its tensors on the disk until they are read.

    Raises:
        DamagedError: the file holds something else, or would be larger in memory than on the disk.
        FileNotFoundError: the file does not exist.
    """
    with damage_of(path, hint=_ask(path.parent)):
        with untrusted.open_plain(path, MOST_BYTES) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) == b"PK\x03\x04":
                _check_archive(file, size)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns about the file's format
                loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        except MemoryError:
            raise ValueError("it does not fit into memory") from None
        # Any error of torch for bytes that it has not written. Its own message advises to run the code in the file.
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
    """Refuse a tensor that is not plain, or is larger than its file."""
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
    """Return a state dict from its file, with its sparse tensors joined (`digests.components`)."""
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
        DamagedError: it is not such a file.
    """
    check_safetensors(path)
    with damage_of(path, hint=_ask(path.parent)):
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(str(error)) from error


def in_parts(folder: Path) -> bool:
    """Return whether a checkpoint was saved in parts, one a rank."""
    return not (folder / WEIGHTS).exists()


def _write_whole(folder: Path, state: State) -> Manifest:
    weights = state["state_dict"]
    rest = {key: value for key, value in state.items() if key != "state_dict"}
    with ThreadPoolExecutor(4) as pool:  # two files are written and hashed, while this thread takes the digest
        sums = {
            WEIGHTS: pool.submit(
                write_hashed, folder / WEIGHTS, lambda file: write_safetensors(file, dense_entries(weights)), pool
            ),
            STATE: pool.submit(_write_rest, folder, rest, pool),
        }
        manifest: Manifest = {"weights_digest": digest(weights)}
        manifest["files"] = {
            name: {"sha256": sha.result(), "size_bytes": (folder / name).stat().st_size} for name, sha in sums.items()
        }
    return manifest


def _write_part(folder: Path, state: State, group: "dist.ProcessGroup | None") -> Manifest:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank = dist.get_rank(group)
    paths: list[Keys] = []
    rest = _without_parts(state, (), paths)
    # Tensors that are not sharded come from rank 0. Other ranks' buffers are in the resume point (epoch_loop.py).
    tensors = {_name(path): _get(state, path) for path in paths}
    tensors = {
        name: tensor if isinstance(tensor, DTensor) else tensor.contiguous()
        for name, tensor in tensors.items()
        if rank == 0 or isinstance(tensor, DTensor)
    }
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # not an Exception, and raised on all ranks
        failed, (cause, _) = next(iter(error.failures.items()))
        raise StoreError(
            f"{folder}: rank {failed} could not write its part: {_words(cause)}", hint=f"df -h {quoted(folder.parent)}"
        ) from error

    def hashed() -> dict[str, SavedFile]:
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


def _write_rest(folder: Path, rest: State, hasher: ThreadPoolExecutor) -> str:
    try:
        return write_hashed(folder / STATE, partial(torch.save, rest), hasher)
    except RuntimeError as error:  # of torch's own writer, which follows from that of the file
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _load_parts(folder: Path, names: Collection[str] | None, now: State, *, alone: bool) -> State:
    """Return the tensors of these names, by default the weights: in the layout of `now` if it has them, else whole."""
    # Imported here: takes 0.1 s, and only sharded trainings need it
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
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # torch warns that it loads in one process
        try:
            load(tensors, storage_reader=reader, no_dist=alone)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise LabtrainError(
                f"{folder} does not fit the model: {cause}",
                hint="use the model that it was saved from; or resume=never",
            ) from error
    return tensors


def _without_parts(node: object, path: Keys, paths: list[Keys]) -> Any:
    """Return a state with None for weights and DTensors, which are in the parts; append their paths to `paths`."""
    if isinstance(node, dict):
        kind = type(node)  # for example a Counter
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


def _name(path: Keys) -> str:
    return "/".join(map(str, path))


def _get(state: Any, path: Keys) -> Any:
    for key in path:
        state = state[key]
    return state


def _put(state: object, path: Keys, value: object) -> None:
    _get(state, path[:-1])[path[-1]] = value


def _numbered(optimizer: State) -> State:
    """Return an optimizer's state by parameter numbers, as optimizers use it; the file has it by names."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    return {"state": {number[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}
