"""Lets the hooks at an epoch's end see the outputs of all ranks.

Since Lightning 2.0, models append the outputs of their steps to a list of their own, and use it in
`on_train_epoch_end`, `on_validation_epoch_end` or `on_test_epoch_end`. With several devices, each has the items of its
shards. This callback fills such lists with the items of all ranks before these hooks, in the order of one device, and
afterwards puts back what the hooks have left. Lists that hooks append to are complete: each rank has whole batches.
"""

import lightning.pytorch as pl

from labtrain.training.sharded.gathering import Filled, Path, fill, lists_of
from labtrain.training.sharded.strategy import Exact


class WholeOutputs(pl.Callback):
    """Fills the model's lists of outputs at the end of each epoch. It comes before the experiment's callbacks."""

    def __init__(self) -> None:
        self.filled: Filled | None = None
        self.empty: set[Path] = set()  # the lists that were empty at the start of an evaluation

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, Exact):
            self._fill(trainer, {path for path in lists_of(pl_module) if path[0] in trainer.strategy.grown()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._note(pl_module, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fill_evaluated(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._note(pl_module, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fill_evaluated(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_back()

    def _note(self, module: pl.LightningModule, batch: int, loader: int) -> None:
        if not batch and not loader:
            self.empty = {path for path, items in lists_of(module).items() if not items}

    def _fill_evaluated(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, Exact):
            self._fill(trainer, self.empty & trainer.strategy.appended.paths)

    def _fill(self, trainer: pl.Trainer, paths: set[Path]) -> None:
        self._put_back()
        if isinstance(trainer.strategy, Exact) and trainer.world_size > 1:
            self.filled = fill(trainer, paths)

    def _put_back(self) -> None:
        if self.filled is not None:
            self.filled.put_back()
            self.filled = None
