"""The batch and the outputs that hooks and callbacks get: those of the whole batch, the same on every rank.

`training_step` gets one shard at a time. Hooks such as on_train_batch_end run once a batch on every rank. The shards of
all ranks are sent to all (exchange.py) and joined (collate.py), so a hook computes the same on any number of devices.
labtrain does so only if a hook of the model or of a callback reads the batch or the outputs (reading.py).
"""

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
import torchmetrics

from labtrain.base.errors import ConfigError
from labtrain.data.sharded import Sharded
from labtrain.exact.collate import is_changed, joined, marks
from labtrain.training.sharded.exchange import of_all_ranks
from labtrain.training.sharded.reading import reads

PREFIXES = {"train": "train", "sanity_check": "validation", "validate": "validation", "test": "test",
            "predict": "predict"}  # fmt: skip
# What a shard's training_step has returned, in numbers that ranks exchange: only MORE has to be sent.
NOTHING, LOSS, LOSS_IN_DICT, MORE = range(4)
MOST_METRICS = 100  # of one list: a callback's list of outputs is longer


class Readers:
    """Tells whether hooks of the model or of callbacks read the batch or the outputs; labtrain's own do not.

    Attributes:
        trainer: with all callbacks.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self._known: dict[tuple[str, int], tuple[bool, bool]] = {}
        self._callbacks: list[pl.Callback] = []  # those that read
        self._when: tuple[str, int] | None = None

    @property
    def batch(self) -> bool:
        """Whether a hook of the current stage reads the batch."""
        return self._found()[0]

    @property
    def outputs(self) -> bool:
        """Whether a hook of the current stage reads the outputs."""
        return self._found()[1]

    def leave_metrics(self, when: tuple[str, int]) -> None:
        """Let the metrics of callbacks that read a whole batch compute without other ranks: each rank has all of it.

        Args:
            when: the stage, and the epoch of training or the step of an evaluation: a hook may make a metric for each.
        """
        if when != self._when:
            self._found()
            self._when = when
            for metric in (metric for callback in self._callbacks for metric in _metrics_of(callback)):
                metric.sync_on_compute = metric._to_sync = metric.dist_sync_on_step = False

    def _found(self) -> tuple[bool, bool]:
        stage, callbacks = _stage(self.trainer), self.trainer.callbacks  # type: ignore[attr-defined]
        key = stage, len(callbacks)
        if key not in self._known:
            others = [each for each in callbacks if not type(each).__module__.startswith("labtrain.")]
            found = {id(each): _read_by(each, stage, first=2) for each in others}
            self._callbacks += [each for each in others if any(found[id(each)])]
            both = [_read_by(self.trainer.lightning_module, stage, first=0), *found.values()]
            self._known[key] = any(batch for batch, _ in both), any(outputs for _, outputs in both)
        return self._known[key]


class Handed:
    """A batch as hooks get it, and the shards that it was joined from.

    Args:
        sharded: this rank's; its parts are on the device.
        batch: the whole one.
    """

    def __init__(self, sharded: Sharded, batch: object) -> None:
        self.sharded, self.batch = sharded, batch
        self._marks = marks(batch)

    def check(self, trainer: pl.Trainer) -> None:
        """Raise ConfigError if a hook has changed the batch: the step gets the shards, which have not changed."""
        if is_changed(self.batch, self._marks):
            raise ConfigError(
                f"a hook changed its batch (on_{PREFIXES[_stage(trainer)]}_batch_start): the step gets the batch's"
                " shards, without that change",
                hint="change it in on_after_batch_transfer of the model, which gets each shard; or"
                " determinism.shards=null",
            )


def whole(parts: list[tuple[int, object]], device: torch.device, *, average: bool, what: str) -> object:
    """Return the data of a batch, of the shards of all ranks; every rank calls it.

    Args:
        parts: (samples, data) of this rank's shards.
        device: of this rank.
        average: whether numbers are averaged over samples.
        what: the data is, for an error.

    Raises:
        ConfigError: it cannot be sent.
    """
    found = of_all_ranks(parts, device, what=what)
    return joined([data for _, data in found], [samples for samples, _ in found], average=average)


def content(output: object) -> int:
    """Return what a shard's training_step has returned: NOTHING, LOSS, LOSS_IN_DICT or MORE."""
    if output is None or isinstance(output, torch.Tensor):
        return NOTHING if output is None else LOSS
    return LOSS_IN_DICT if isinstance(output, dict) and output.keys() == {"loss"} else MORE


def _read_by(owner: object, stage: str, *, first: int) -> tuple[bool, bool]:
    """Return whether the hooks of a stage read the batch and the outputs.

    Args:
        owner: of the hooks.
        stage: of the trainer.
        first: the place of the outputs among a hook's arguments.
    """
    hook = f"on_{PREFIXES[stage]}_batch"
    start, end = getattr(owner, f"{hook}_start"), getattr(owner, f"{hook}_end")
    return reads(start, first) or reads(end, first + 1), reads(end, first)


def _metrics_of(callback: pl.Callback) -> Iterator[torchmetrics.Metric]:
    """Yield the metrics among a callback's attributes, and in lists and dicts there."""
    for value in vars(callback).values():
        items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for item in items[:MOST_METRICS]:
            if isinstance(item, torch.nn.Module):
                yield from (part for part in item.modules() if isinstance(part, torchmetrics.Metric))


def _stage(trainer: pl.Trainer) -> str:
    stage = trainer.state.stage
    assert stage is not None
    return str(stage.value)
