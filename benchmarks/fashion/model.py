"""The measured experiment: the network, its data and the clock, as Lightning has them."""

from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import numpy as np
import torch
from common import EPOCH, MEAN, SIZES, STD, Clock, load
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import labtrain
from labtrain.augment import Scale


class FashionNet(pl.LightningModule):
    """Trains one of common.network, as templates do."""

    def __init__(self, network: str = "mlp") -> None:
        super().__init__()
        self.net = common.network(network)
        self.train_acc, self.val_acc = (MulticlassAccuracy(10, average="micro") for _ in range(2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self._step(batch, "train", self.train_acc)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self._step(batch, "val", self.val_acc)

    def _step(self, batch: list[torch.Tensor], stage: str, accuracy: MulticlassAccuracy) -> torch.Tensor:
        images, labels = batch  # (B, 1, 28, 28), (B,)
        scores = self.net(images)
        loss = nn.functional.cross_entropy(scores, labels)
        accuracy(scores, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.001)


class FashionData(pl.LightningDataModule):
    """Bytes, whose rows are taken and scaled a batch at a time."""

    scale = Scale(MEAN, STD)

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str) -> None:
        self.train, self.val = (load(part) for part in SIZES)

    def train_dataloader(self) -> labtrain.DataLoader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> labtrain.DataLoader:
        return self._loader(self.val)

    def _loader(self, arrays: Any, *, shuffle: bool = False) -> labtrain.DataLoader:
        return labtrain.DataLoader(
            arrays, self.batch_size, shuffle=shuffle, num_workers=self.num_workers, transform=self.scale
        )


class GrowingData(FashionData):
    """As many rows of 16 bytes as one likes: a memory map of a file that is all holes, one label for all."""

    def __init__(self, rows: int, folder: str, batch_size: int, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.rows, self.folder = rows, Path(folder)

    def setup(self, stage: str) -> None:
        path = self.folder / f"{self.rows}.bytes"
        with path.open("wb") as file:
            file.truncate(self.rows * 16)
        images = np.memmap(path, np.uint8, "r", shape=(self.rows, 16))
        self.train = self.val = images, np.broadcast_to(np.int64(0), self.rows)


class StepClock(pl.Callback):
    """The clock inside Lightning's Trainer."""

    def __init__(self, steps: int = EPOCH) -> None:
        self.clock = Clock(steps)

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.tick()
