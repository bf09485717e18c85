"""Checkpoints to and from Lightning's own .ckpt files. What comes in is read without running code from it."""

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from labtrain.base.errors import ConfigError, DamagedError
from labtrain.checkpoints.format import load_folder, write_files
from labtrain.checkpoints.locate import found_checkpoint
from labtrain.checkpoints.staging import Staging
from labtrain.stores.layout import free_name
from labtrain.stores.store import SCHEMA, Store


def export_checkpoint(target: str, file: Path) -> None:
    """Write a checkpoint as a Lightning .ckpt, for `load_from_checkpoint` and other people's tools.

    Args:
        target: a run, or a checkpoint's folder or URL.
        file: must not exist yet.
    """
    if file.exists():
        raise ConfigError(f"{file} is there already", hint=f"another name, or rm {file}")
    with found_checkpoint(target) as (folder, _):
        scratch = file.with_name(f".{file.name}.part")
        torch.save(load_folder(folder), scratch)
        scratch.replace(file)


def import_checkpoint(file: Path, url: str) -> str:
    """Write a Lightning .ckpt as a checkpoint below `url` and return its URL.

    Its place in the training is not known, so it gives weights (`labtrain.load_weights`) and is not gone on from.

    Raises:
        DamagedError: it is no checkpoint, or loading it would run code.
    """
    try:
        loaded: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        state: dict[str, Any] = loaded if "state_dict" in loaded else {"state_dict": loaded}
        state["state_dict"].keys()
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is not there", hint=f"ls {file.parent}") from error
    except (pickle.UnpicklingError, RuntimeError, AttributeError, TypeError, ValueError, EOFError) as error:
        first = " ".join(str(error).split())[:300]
        raise DamagedError(
            f"{file} cannot be read without running code from it: {first}",
            hint="in the program that made it: torch.save(model.state_dict(), FILE)",
        ) from error
    state = Staging().copy({key: value for key, value in state.items() if key != "loops"})
    store = Store(url)
    step: int = state.get("global_step", 0)
    name = free_name(step, {checkpoint.name for checkpoint in store.find()}, finished=True)
    manifest = {"run_id": "imported", "step": step, "epoch": state.get("epoch", 0), "batch": 0, "finished": True}
    with TemporaryDirectory() as scratch:
        folder = Path(store.root if store.local else scratch, name)
        manifest |= {"schema": SCHEMA, "metrics": {}, "logs": {}, "scores": {}, **write_files(folder, state)}
        if not store.local:
            store.upload(folder, manifest, name)
        store.commit(name, manifest)
    return f"{store.url}/{name}"
