"""Checkpoints of a training: written at the end of each epoch, and taken up where they were written.

Lightning's own loop state is left out: a checkpoint saved in its `on_train_epoch_end` misses what the epoch's end still
does (plateau schedulers), and its restart stages skip or repeat work in some places. Instead the position (epoch, step)
is saved where an epoch has really ended, before the next begins, and put back into the loops in `on_train_start`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import load_file, save_file

from labtrain.digests import digest, digest_tree
from labtrain.errors import LabtrainError
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
    """Saves at the end of each epoch and of the training, and takes up the loops where a checkpoint left them.

    Args:
        folder: below which the checkpoints lie.
        run_id: written in each manifest.
        keep_last: how many of the newest are kept.
        keep_best: how many of the best by `monitor` are kept beside them.
        monitor: a metric's name.
        mode: max or min: which value of it is better.
        resumed: the manifest of the checkpoint that this training goes on from.
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
        resumed: Manifest | None = None,
    ) -> None:
        self.folder, self.run_id = folder, run_id
        self.keep_last, self.keep_best, self.monitor, self.mode = keep_last, keep_best, monitor, mode
        self.resumed = resumed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.resumed is None:
            return
        at = self.resumed["position"]
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        optimizer = loop.automatic_optimization.optim_progress.optimizer
        for progress, done in (
            (fit.epoch_progress.total, at["epoch"]),
            (fit.epoch_progress.current, at["epoch"]),
            (loop.batch_progress.total, at["batches"]),
            (loop.scheduler_progress.total, at["scheduler_steps"]),
            (optimizer.step.total, at["optimizer_steps"]),
            (optimizer.zero_grad.total, at["optimizer_steps"]),
            (loop.manual_optimization.optim_step_progress.total, at["optimizer_steps"]),
        ):
            for field in vars(progress):
                setattr(progress, field, done)
        loop._batches_that_stepped = at["batches_that_stepped"]
        trainer.should_stop = at["finished"]  # an early stop, say: nothing is left to train

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self.save(trainer, finished=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, finished=True)

    def save(self, trainer: pl.Trainer, *, finished: bool) -> None:
        """Write the training's state as it is now; called on every rank, rank 0 writes."""
        target = self.folder / f"step-{trainer.global_step:010d}"
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        already_there = self.resumed is not None and self.resumed["step"] == trainer.global_step
        if trainer.is_global_zero and not already_there:
            del state["loops"]
            loop = trainer.fit_loop.epoch_loop
            position = {
                "epoch": trainer.current_epoch,
                "batches": loop.batch_progress.total.completed,
                "scheduler_steps": loop.scheduler_progress.total.completed,
                "optimizer_steps": trainer.global_step,
                "batches_that_stepped": loop._batches_that_stepped,
                "finished": finished,
            }
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            manifest = {
                "run_id": self.run_id,
                "step": trainer.global_step,
                "epoch": position["epoch"],
                "position": position,
                "metrics": metrics,
            }
            write_checkpoint(target, state, manifest)
            every = trainer.check_val_every_n_epoch
            self.prune(validated=finished or (every is not None and trainer.current_epoch >= every))
        # Without it rank 0 could be killed before its own save, and the others go on.
        trainer.strategy.barrier("labtrain.checkpoint")

    def prune(self, *, validated: bool) -> None:
        """Remove the checkpoints that are neither among the last nor among the best.

        Raises:
            LabtrainError: a validation has been run, and no checkpoint has the monitored metric.
        """
        found = list_checkpoints(self.folder)
        kept = {path for path, _ in found[-self.keep_last :]}
        if self.keep_best and self.monitor is not None:
            name = self.monitor
            scored = [(manifest["metrics"][name], path) for path, manifest in found if name in manifest["metrics"]]
            if not scored and validated:
                names = ", ".join(sorted(found[-1][1]["metrics"])) or "none"
                raise LabtrainError(
                    f"checkpoint.monitor={name}: no such metric; logged are {names}",
                    hint="checkpoint.keep_best=0, or name one of these",
                )
            scored.sort(key=lambda entry: entry[0], reverse=self.mode == "max")
            kept |= {path for _, path in scored[: self.keep_best]}
        for path, _ in found:
            if path not in kept:
                remove_checkpoint(path)


class FolderIO(TorchCheckpointIO):
    """Lets the Trainer load a checkpoint folder; a file is Lightning's own format."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)


def write_checkpoint(target: Path, state: dict[str, Any], manifest: Manifest) -> None:
    """Write a checkpoint folder; it exists once its manifest does.

    Args:
        target: the folder; what an interrupted save left there is removed.
        state: Lightning's checkpoint dictionary, its weights under `state_dict`.
        manifest: run id, step, epoch, position and metrics; files and digests are added.
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
    manifest = {"schema": SCHEMA, **manifest, **digests, "files": files}
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
