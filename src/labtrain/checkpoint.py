"""Checkpoints of a training: what is saved where `EpochLoop` says, what is kept, and how it is read."""

import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import load_file

from labtrain.catalog import kept
from labtrain.errors import DamagedError, LabtrainError
from labtrain.loggers import log_positions
from labtrain.loop import PLACE, EpochLoop
from labtrain.saver import Saver, state_digest
from labtrain.store import STATE, WEIGHTS, Manifest


class Checkpoints(pl.Callback):
    """Saves the training's state where the epoch loop says, and gives it back on a resume.

    Args:
        run_dir: the run's folder.
        place: where its checkpoints lie: a folder or a URL.
        run_id: written in each manifest.
        options: the keys of `checkpoint` in the configuration.
        resumed: the manifest that this training goes on from, where it is one of this place, and its name.
    """

    def __init__(
        self,
        run_dir: Path,
        place: str,
        *,
        run_id: str,
        options: dict[str, Any],
        resumed: tuple[str, Manifest] | None = None,
    ) -> None:
        self.run_id = run_id
        self.monitor, self.keep_best = options["monitor"], options["keep_best"]
        keep = partial(
            kept,
            last=options["keep_last"],
            best=options["keep_best"],
            every=options["keep_every_n_steps"],
            mode=options["mode"],
        )
        self.saver = Saver(run_dir, place, keep=keep, spool_bytes=options["spool_bytes"])
        self.newest = (resumed[0], int(resumed[1]["step"])) if resumed else None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop_of(trainer).loaded = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaded = loop_of(trainer).loaded
        step = loaded["global_step"] if loaded is not None else 0
        if (first := trainer.strategy.broadcast(step)) != step:
            raise LabtrainError(
                f"rank {trainer.global_rank} goes on from step {step}, rank 0 from {first}: they do not see the same"
                " checkpoints",
                hint="paths.runs on a folder that all nodes share",
            )
        if loaded is not None:
            loop_of(trainer).restore()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.saver.check()

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

    def save(self, trainer: pl.Trainer, *, required: bool) -> None:
        """Save the training's state as it is now; called on every rank, rank 0 writes.

        Args:
            trainer: whose state it is.
            required: wait for the save before, and where the training stops for this one too. Else a save that
                comes while the one before is being written is made up for as soon as that is done.
        """
        wishes = loop_of(trainer).wishes
        if not required and not self.keep_best and trainer.strategy.broadcast(self.saver.busy):
            wishes.owed = trainer.is_global_zero
            return
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        del state["loops"]
        state[PLACE] = loop_of(trainer).place()
        if trainer.is_global_zero:
            manifest = {
                "run_id": self.run_id,
                "step": trainer.global_step,
                "epoch": state[PLACE]["epoch"],
                "batch": state[PLACE]["batch"],
                "metrics": as_floats(trainer.callback_metrics),
                "logs": log_positions(trainer.loggers),
            }
            self.newest = self.saver.save(state, manifest), trainer.global_step
        wishes.keep_time()
        if wishes.agreed_stop:
            if trainer.is_global_zero:
                self.saver.wait()
            trainer.strategy.barrier("labtrain.checkpoint")  # else others end, and what started them ends rank 0

    def finish(self, module: pl.LightningModule, weights_digest: str, *, resumed: Path | None) -> str | None:
        """Save the weights that the training ended with, where something changed them after the last save; on rank 0.

        An average of weights that a callback puts in at the end, say. Nothing goes on from these.

        Args:
            module: the model.
            weights_digest: of its weights.
            resumed: the folder of the checkpoint that the training went on from.

        Returns:
            the digest of the state that is saved last; None where nothing is.
        """
        self.saver.wait()
        if self.newest is None:
            return None
        manifest = self.saver.manifests[self.newest[0]]
        if manifest["weights_digest"] == weights_digest:
            state = self.saver.staged
            if state is None and resumed is not None:  # it was complete, and only its delivery was missing
                state = load_folder(resumed)
            return state_digest(state) if state is not None else None
        ended = [other for other in self.saver.manifests.values() if other["finished"]]
        if all(other["weights_digest"] != weights_digest for other in ended):
            self.saver.save({"state_dict": module.state_dict()}, manifest, finished=True)
            self.saver.wait()
        return state_digest({"state_dict": module.state_dict()})

    def score(self, trainer: pl.Trainer) -> None:
        """Note the monitored metric for the checkpoint that was saved before the validation."""
        if self.newest is None or self.newest[1] != trainer.global_step or not trainer.is_global_zero:
            return
        if self.keep_best and self.monitor in trainer.callback_metrics:
            self.saver.score(self.newest[0], float(trainer.callback_metrics[self.monitor]))


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
            return load_folder(Path(path))
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)


def load_folder(folder: Path) -> dict[str, Any]:
    """Return Lightning's checkpoint dictionary from a folder that was verified, on the CPU, without its loops.

    Raises:
        DamagedError: loading it would run code.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        first = " ".join(str(error).split())[:300]
        raise DamagedError(
            f"{folder / STATE} cannot be read without running code from it, so labtrain has not written it: {first}",
            hint=f"rm -r {folder}, and ask who wrote it",
        ) from error
    return state | {"state_dict": load_file(folder / WEIGHTS)}
