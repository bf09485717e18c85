"""Callbacks and data of the tests of small things."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch

import labtrain
from labtrain.training.callbacks.steps import Progress
from tests.support.exact_worker import MLP, Images


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


class Here(pl.Callback):
    """Says how this process makes files, before it makes any; local:// is then a remote store of this machine.

    Args:
        umask: of the process, in octal digits.
    """

    def __init__(self, umask: str = "022") -> None:
        os.umask(int(umask, 8))
        fsspec.config.conf["local"] = {"auto_mkdir": True}  # as an object store makes folders


class Split(pl.LightningDataModule):
    """Splits its data at random in each setup, as people do, and writes what each stage got to a folder."""

    def __init__(self, folder: str, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.folder, self.batch_size, self.num_workers = Path(folder), batch_size, num_workers

    def setup(self, stage: Any) -> None:
        order = torch.randperm(30).tolist()
        (self.folder / f"{stage.value}-{os.environ['LOCAL_RANK']}").write_text(json.dumps(order))
        images = Images(30)
        self.train, self.held = (torch.utils.data.Subset(images, part) for part in (order[:20], order[20:]))

    def train_dataloader(self) -> Any:
        return labtrain.DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return labtrain.DataLoader(self.held, self.batch_size)

    def test_dataloader(self) -> Any:
        return labtrain.DataLoader(self.held, self.batch_size)


class Tested(MLP):
    """Has a test."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("test/loss", torch.nn.functional.cross_entropy(self(inputs), targets))
