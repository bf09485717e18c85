"""The batch and the outputs that hooks and callbacks get: this rank's shards, joined.

`training_step` gets one shard at a time. Hooks such as on_train_batch_end run once a batch, so they get the rank's
shards joined (collate.py), as under DDP. labtrain joins them only if a hook of the model or a callback takes a batch.
"""

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from labtrain.base.errors import ConfigError
from labtrain.data.sharded import Sharded
from labtrain.exact.collate import emptied, is_changed, joined, marks, received, to_send

PREFIXES = {"train": "train", "sanity_check": "validation", "validate": "validation", "test": "test",
            "predict": "predict"}  # fmt: skip


class Takers:
    """Tells which hooks of a training take a batch or outputs: those that the model or a callback overrides."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self._known: dict[tuple[str, int], tuple[bool, bool]] = {}

    @property
    def batch(self) -> bool:
        """Whether a hook of the current stage takes the batch."""
        return any(self._found())

    @property
    def outputs(self) -> bool:
        """Whether a hook of the current stage takes the outputs."""
        return self._found()[1]

    def _found(self) -> tuple[bool, bool]:
        stage, callbacks = _stage(self.trainer), self.trainer.callbacks  # type: ignore[attr-defined]
        key = stage, len(callbacks)
        if key not in self._known:
            prefix = f"on_{PREFIXES[stage]}_batch"
            others = [each for each in callbacks if not type(each).__module__.startswith("labtrain.")]
            start, end = (
                _has_own(self.trainer.lightning_module, pl.LightningModule, hook)
                or any(_has_own(callback, pl.Callback, hook) for callback in others)
                for hook in (f"{prefix}_start", f"{prefix}_end")
            )
            self._known[key] = start, end
        return self._known[key]


class Handed:
    """A batch as hooks get it, and the shards that it was joined from.

    Args:
        sharded: its parts are on the device.
        like: an empty part, for a rank without a shard.
    """

    def __init__(self, sharded: Sharded, like: object = None) -> None:
        self.sharded = sharded
        sizes = [samples for _, samples, _ in sharded.parts]
        self.batch = joined([data for _, _, data in sharded.parts], sizes) if sizes else like
        self._marks = marks(self.batch)

    def check(self, trainer: pl.Trainer) -> None:
        """Raise ConfigError if a hook has changed the batch: the step gets the shards, which have not changed."""
        if is_changed(self.batch, self._marks):
            raise ConfigError(
                f"a hook changed its batch (on_{PREFIXES[_stage(trainer)]}_batch_start): the step gets the batch's"
                " shards, without that change",
                hint="change it in on_after_batch_transfer of the model, which gets each shard; or"
                " determinism.shards=null",
            )


def joined_outputs(outputs: list[object], sizes: list[int]) -> object:
    """Return what the steps of this rank's shards returned, as one."""
    return joined(outputs, sizes, average=True) if outputs else None


def of_no_shard(parts: list[tuple[int, object]], *, average: bool, device: torch.device) -> object:
    """Return an empty part for a rank without a shard: rank 0's first part without its rows. Every rank calls it.

    Args:
        parts: (samples, data) of this rank's shards; rank 0 has one in every batch.
        average: whether numbers are averaged over samples.
        device: of this rank.
    """
    like = [to_send(emptied(parts[0][1], parts[0][0], average=average)) if parts else None]
    dist.broadcast_object_list(like, src=0)
    return received(like[0], device)


def _stage(trainer: pl.Trainer) -> str:
    stage = trainer.state.stage
    assert stage is not None
    return str(stage.value)


def _has_own(owner: object, base: type[object], hook: str) -> bool:
    found = getattr(owner, hook)
    return getattr(found, "__func__", found) is not getattr(base, hook)
