"""Checkpoints of a training: what is written where `EpochLoop` saves, what is kept, and how it is read."""

import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import load_file, save_file

from labtrain.digests import digest, digest_tree
from labtrain.errors import LabtrainError
from labtrain.loggers import log_positions
from labtrain.loop import PLACE, EpochLoop
from labtrain.receipt import write_atomically
from labtrain.store import (
    MANIFEST,
    SCHEMA,
    STATE,
    WEIGHTS,
    Manifest,
    file_sha256,
    list_checkpoints,
    remove_checkpoint,
    verify_checkpoint,
)


class Checkpoints(pl.Callback):
    """Writes the training's state where the epoch loop says, gives it back on a resume, keeps the last and the best.

    Args:
        folder: below which the checkpoints lie.
        run_id: written in each manifest.
        keep_last: how many of the newest are kept.
        keep_best: how many of the best by `monitor` are kept beside them.
        monitor: a metric's name.
        mode: max or min: which value of it is better.
        resumed: the checkpoint that this training goes on from, where it is one of these.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        keep_last: int,
        keep_best: int = 0,
        monitor: str | None = None,
        mode: str = "max",
        resumed: tuple[Path, Manifest] | None = None,
    ) -> None:
        self.folder, self.run_id = folder, run_id
        self.keep_last, self.keep_best, self.monitor, self.mode = keep_last, keep_best, monitor, mode
        self.newest = resumed

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop_of(trainer).loaded = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if loop_of(trainer).loaded is not None:
            loop_of(trainer).restore()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.score(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.score(trainer)
        every = trainer.check_val_every_n_epoch
        found = trainer.callback_metrics
        validated = every is None or trainer.current_epoch + 1 >= every
        if self.keep_best and self.monitor not in found and validated:
            raise LabtrainError(
                f"checkpoint.monitor={self.monitor}: no such metric; logged are {', '.join(sorted(found)) or 'none'}",
                hint="checkpoint.keep_best=0, or name one of these",
            )

    def save(self, trainer: pl.Trainer) -> None:
        """Write the training's state as it is now; called on every rank, rank 0 writes."""
        step = trainer.global_step
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        del state["loops"]
        state[PLACE] = loop_of(trainer).place()
        if trainer.is_global_zero:
            target = self.folder / f"step-{step:010d}"
            manifest = {
                "run_id": self.run_id,
                "step": step,
                "epoch": state[PLACE]["epoch"],
                "batch": state[PLACE]["batch"],
                "finished": False,
                "metrics": as_floats(trainer.callback_metrics),
                "logs": log_positions(trainer.loggers),
            }
            self.newest = target, write_checkpoint(target, state, manifest)
            self.prune()
        loop_of(trainer).wishes.saved = time.monotonic()
        # Without it rank 0 could be killed before its own save, and the others go on.
        trainer.strategy.barrier("labtrain.checkpoint")

    def finish(self, module: pl.LightningModule, weights_digest: str, *, step: int) -> None:
        """Write the weights that the training ended with, where something changed them after the last step; on rank 0.

        An average of weights that a callback puts in at the end, say. Nothing goes on from these.
        """
        found = list_checkpoints(self.folder)
        if found and found[-1][1]["weights_digest"] != weights_digest:
            manifest = {**found[-1][1], "finished": True}
            write_checkpoint(self.folder / f"step-{step:010d}-end", {"state_dict": module.state_dict()}, manifest)

    def score(self, trainer: pl.Trainer) -> None:
        """Write the metrics of a validation beside the checkpoint that was saved before it."""
        if self.newest is None or self.newest[1]["step"] != trainer.global_step:
            return
        path, manifest = self.newest
        manifest["metrics"] = as_floats(trainer.callback_metrics)
        write_manifest(path, manifest)
        self.prune()

    def prune(self) -> None:
        """Remove the checkpoints that are neither among the last nor among the best."""
        found = [(path, manifest) for path, manifest in list_checkpoints(self.folder) if not manifest["finished"]]
        kept = {path for path, _ in found[-self.keep_last :]}
        if self.keep_best:
            name = self.monitor
            scored = [(manifest["metrics"][name], path) for path, manifest in found if name in manifest["metrics"]]
            scored.sort(key=lambda entry: entry[0], reverse=self.mode == "max")
            kept |= {path for _, path in scored[: self.keep_best]}
        for path, _ in found:
            if path not in kept:
                remove_checkpoint(path)


def as_floats(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return metrics as numbers, by name."""
    return {name: float(value) for name, value in sorted(metrics.items())}


def loop_of(trainer: pl.Trainer) -> EpochLoop:
    """Return the training's epoch loop, which is labtrain's."""
    assert isinstance(trainer.fit_loop.epoch_loop, EpochLoop)
    return trainer.fit_loop.epoch_loop


class FolderIO(TorchCheckpointIO):
    """Lets the Trainer load a checkpoint folder; a file is Lightning's own format."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)


def write_checkpoint(target: Path, state: dict[str, Any], manifest: Manifest) -> Manifest:
    """Write a checkpoint folder, which exists once its manifest does; return the manifest.

    Args:
        target: the folder; what an interrupted save left there is removed.
        state: Lightning's checkpoint dictionary, its weights under `state_dict`.
        manifest: run id, step, place and metrics; files and digests are added.
    """
    state_digest = digest_tree(state)  # before anything is written: it refuses what is no plain value
    # safetensors refuses tensors that share memory, and tied weights do: clone
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state["state_dict"].items()}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save_file(weights, target / WEIGHTS)
    torch.save({key: value for key, value in state.items() if key != "state_dict"}, target / STATE)
    refuse_unloadable(target / STATE)
    files = {
        name: {"sha256": file_sha256(target / name), "size_bytes": (target / name).stat().st_size}
        for name in (WEIGHTS, STATE)
    }
    digests = {"weights_digest": digest(weights), "state_digest": state_digest}
    manifest = {**manifest, "schema": SCHEMA, **digests, "files": files}
    write_manifest(target, manifest)
    return manifest


def write_manifest(target: Path, manifest: Manifest) -> None:
    """Write or replace a checkpoint's manifest, in one step."""
    write_atomically(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def refuse_unloadable(path: Path) -> None:
    """Refuse a state that could only be loaded by running code from the file.

    Raises:
        LabtrainError: names the class.
    """
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        shutil.rmtree(path.parent)
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise LabtrainError(
            f"the training state holds what a checkpoint cannot: {found.group(1) if found else error}",
            hint="keep numbers, strings, tensors, lists and dicts in hyperparameters and state_dicts",
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return Lightning's checkpoint dictionary, on the CPU, without its loops.

    Raises:
        DamagedError: a file is missing or is not what the manifest says.
    """
    verify_checkpoint(path)
    state: dict[str, Any] = torch.load(path / STATE, weights_only=True, map_location="cpu")
    return state | {"state_dict": load_file(path / WEIGHTS)}
