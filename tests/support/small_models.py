"""Callbacks and data of the tests of small things."""

from typing import Any

import lightning.pytorch as pl

from labtrain.callbacks import Progress


class Boom(pl.Callback):
    """Raises in a hook, two calls deep."""

    def __init__(self, hook: str = "on_train_batch_end", made: bool = False) -> None:
        if made:
            self.helper()
        self.hook = hook

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.hook == "on_train_start":
            self.helper()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook == "on_train_batch_end":
            self.helper()

    def helper(self) -> None:
        raise KeyError("missing")  # the line that an error must name


class InTerminal(pl.Callback):
    """Has labtrain's progress draw as in a terminal, after each step."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bar = trainer.progress_bar_callback
        assert isinstance(bar, Progress)
        bar.terminal = True

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        bar = trainer.progress_bar_callback
        assert isinstance(bar, Progress)
        bar.printed = 0.0
