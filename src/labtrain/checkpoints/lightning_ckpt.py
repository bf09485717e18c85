"""Converts checkpoints to and from Lightning's .ckpt files. Reading one runs no code from it."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from labtrain.base import untrusted
from labtrain.base.console import quoted
from labtrain.base.contracts import Manifest, State
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError, StoreError
from labtrain.base.files import atomic
from labtrain.checkpoints.format import load_folder, load_plain, write_files
from labtrain.checkpoints.locate import found_checkpoint
from labtrain.checkpoints.staging import Staging
from labtrain.record.digests import WEIGHT_DTYPE_NAMES
from labtrain.stores.layout import free_name
from labtrain.stores.store import SCHEMA, Store


def export_checkpoint(target: str, file: Path) -> None:
    """Write a checkpoint as a Lightning .ckpt, for `load_from_checkpoint` and other people's tools.

    Args:
        target: a run, or a checkpoint's folder or URL.
        file: must not exist yet.
    """
    if file.exists():
        raise ConfigError(f"{file} already exists", hint=f"choose another name, or rm {quoted(file)}")
    with found_checkpoint(target) as (folder, _), atomic(file) as scratch:
        torch.save(load_folder(folder), scratch)


def import_checkpoint(file: Path, url: str) -> str:
    """Write a Lightning .ckpt as a checkpoint below `url` and return its URL.

    Its place in the training is unknown. So it gives weights (`labtrain.load_weights`), but cannot be resumed.

    Raises:
        DamagedError: it is not a checkpoint, or loading it would run code.
        StoreError: a training, or another import, writes there; or labtrain cannot write there.
    """
    state = _read(file)
    store = Store(url)
    step: int = state.get("global_step", 0)
    manifest: Manifest = {
        "run_id": "imported",
        "step": step,
        "epoch": state.get("epoch", 0),
        "batch": 0,
        "finished": True,
    }
    token = store.enter()  # as a training does, so that other processes do not treat the unfinished files as leftovers
    name = free_name(step, {checkpoint.name for checkpoint in store.find()}, finished=True)
    path = store.writing(name, token)
    try:
        with TemporaryDirectory() as scratch:
            folder = Path(store.root if store.local else scratch, path)
            manifest |= {"schema": SCHEMA, "metrics": {}, "logs": {}, "scores": {}, **write_files(folder, state)}
            if not store.local:
                store.upload(folder, manifest, path)
            store.publish(name, manifest, token)
    except BaseException as error:
        store.check_writer(token)  # if this fails, the folder belongs to another writer
        with suppress(Exception):
            store.remove(path)
        if isinstance(error, LabtrainError) or not isinstance(error, Exception):
            raise
        # safetensors and torch have their own errors for a full disk
        raise StoreError(f"{store}/{name} could not be written: {error}", hint=f"df -h {store}") from error
    finally:
        with suppress(StoreError):
            store.leave(token)
    return f"{store.url}/{name}"


def read_weights(file: Path) -> State:
    """Return the state dict in a Lightning .ckpt, or in a file with a state dict. This runs no code from it.

    Raises:
        ConfigError: there is no such file.
        DamagedError: it holds something else, or loading it would run code.
    """
    weights: State = _read(file)["state_dict"]
    return weights


def _read(file: Path) -> State:
    """Return what a .ckpt holds, without its loops."""
    try:
        loaded = load_plain(Path(os.path.realpath(file)))  # a link is fine, because the user typed the path
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{file} does not exist", hint=f"ls {quoted(file.parent)}") from error
    except DamagedError as error:
        hint = "in the program that made it: torch.save(model.state_dict(), FILE)"
        raise DamagedError(str(error.args[0]), hint=hint) from error
    state: State = loaded if "state_dict" in loaded else {"state_dict": loaded}
    _check(file, state)
    return Staging().copy({key: value for key, value in state.items() if key != "loops"})


def _check(file: Path, state: State) -> None:
    """Check that a checkpoint can hold the content of a .ckpt, before anything is written.

    Raises:
        DamagedError: names what it cannot hold.
    """
    with untrusted.damage_of(file, hint="in the program that made it: torch.save(model.state_dict(), FILE)"):
        weights = state["state_dict"]
        if not isinstance(weights, dict):
            raise ValueError(f"its state_dict is a {type(weights).__name__}")
        for name, tensor in weights.items():
            if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, torch.Tensor):
                raise ValueError(
                    f"its state_dict holds a {type(tensor).__name__} under {name!r}: expected strings and tensors"
                )
            name.encode()
            if str(tensor.dtype).removeprefix("torch.") not in WEIGHT_DTYPE_NAMES:
                raise ValueError(f"{name} is of {tensor.dtype}, which safetensors does not support")
        for key in ("global_step", "epoch"):
            if not untrusted.is_count(state.get(key, 0)) or state.get(key, 0) >= 10**10:
                raise ValueError(f"its {key} is {state[key]!r}")
