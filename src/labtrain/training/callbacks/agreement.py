"""Check that hooks log the same values on every rank: otherwise they depend on the number of devices.

labtrain combines what a step logs over its shards (step_log.py), but not what a hook logs. Hooks that run once a batch
get the whole batch (hooks.py). But a value that a hook computes from what steps have left, such as a count, covers this
rank's shards only. So labtrain compares the values of hooks once an epoch, after the last hook and before Lightning
reduces or writes them, in one small exchange.

Lightning 2.6: trainer/connectors/logger_connector/logger_connector.py, `on_epoch_end`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import STRICT_MODES
from labtrain.training.lightning import ResultCollection, active_results, before_epoch_metrics, being_logged
from labtrain.training.sharded import gathering
from labtrain.training.sharded.step_log import is_global
from labtrain.training.sharded.strategy import Exact

HINT = (
    "compute it with a torchmetrics metric, or from a list to which each step appends one item, without sync_dist"
    " (docs/guides/data.md); for a value of one rank, such as a time: self.log(..., rank_zero_only=True)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A value that a hook has logged: a mean is total / weight.

    Attributes:
        synced: how the ranks are reduced; empty without sync_dist.
    """

    name: str
    hook: str
    synced: str
    total: float
    weight: float


class Agreement(pl.Callback):
    """Compares what hooks log; and gives the trainer to `labtrain.gather_outputs`.

    Args:
        mode: strict and portable refuse, warn logs, off skips.
        say: called with each warning, which is printed and goes into the receipt.

    Raises:
        ConfigError: in strict mode, for the first value that differs.
    """

    def __init__(self, *, mode: str, say: Callable[[str], None]) -> None:
        self.mode, self.say = mode, say
        self.known: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        gathering.enter(trainer)
        strategy = trainer.strategy
        if self.mode == "off" or not isinstance(strategy, Exact) or trainer.world_size == 1:
            return
        strategy.on_reduce = self._in_step
        before_epoch_metrics(trainer, partial(self._compare, trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        gathering.enter(None)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        gathering.enter(None)

    def _compare(self, trainer: pl.Trainer) -> None:
        ranks: list[dict[str, Value]] = [{}] * trainer.world_size
        results = active_results(trainer)
        assert results is not None  # a loop is running
        dist.all_gather_object(ranks, values_of(results))
        for key in dict.fromkeys(key for of_rank in ranks for key in of_rank):
            found = {rank: of_rank[key] for rank, of_rank in enumerate(ranks) if key in of_rank}
            first = next(iter(found.values()))
            equal = len({repr((each.total, each.weight)) for each in found.values()}) == 1
            numbers = {rank: each.total / (each.weight or 1.0) for rank, each in found.items()}
            self._judge(f"{first.name}, logged in {first.hook},", numbers, equal=equal, synced=first.synced)
            if first.synced and len(found) < len(ranks):
                raise ConfigError(
                    f"{first.name} is logged with sync_dist on rank {', '.join(map(str, found))} only",
                    hint="log it on every rank, or without sync_dist",
                )

    def _in_step(self, values: list[torch.Tensor], equal: bool, operation: str) -> None:
        """Judge a value that a hook logs with sync_dist in each step."""
        name = being_logged()
        if name is not None:
            numbers = {rank: value.item() for rank, value in enumerate(values)}
            self._judge(f"{name}, logged with sync_dist,", numbers, equal=equal, synced=operation)

    def _judge(self, what: str, numbers: dict[int, float], *, equal: bool, synced: str) -> None:
        if not equal:
            shown = ", ".join(f"{number:.6g} on rank {rank}" for rank, number in numbers.items())
            text = f"{what} differs between the ranks ({shown}): it is computed from a part of the outputs"
        elif synced == "sum" and any(numbers.values()):
            text = f"{what} is summed over the ranks (sync_dist, reduce_fx=sum): each rank has all of it, or a part"
        else:
            return
        if self.mode in STRICT_MODES:
            raise ConfigError(text, hint=HINT)
        if what not in self.known:
            self.known.add(what)
            self.say(f"{text}; it depends on the number of devices")


def values_of(results: ResultCollection) -> dict[str, Value]:
    """Return the values that hooks have logged for the end of this epoch, by Lightning's key."""
    found = {}
    for key, entry in results.items():
        meta = entry.meta
        if entry.is_tensor and meta.on_epoch and not (entry.has_reset or is_global(entry) or meta.sync.rank_zero_only):
            found[key] = Value(
                name=meta.name,
                hook=meta.fx.partition(".")[0],
                synced=meta.reduce_fx.__name__ if meta.sync.should else "",
                total=float(entry.value),
                weight=float(entry.cumulated_batch_size) if meta.is_mean_reduction else 1.0,
            )
    return found
