"""The same training as an experiment of labtrain."""

from typing import Any

import lightning.pytorch as pl
import networks
import torch

import labtrain
from labtrain.augment import Scale


class Large(pl.LightningModule):
    """One of networks.network."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.net = networks.network(network)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        loss = networks.loss_of(self.net(inputs), targets)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(targets))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return networks.optimizer_of(self)


class LargeData(pl.LightningDataModule):
    """Rows in memory: bytes are scaled on the device."""

    def __init__(self, network: str, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.network, self.batch_size, self.num_workers = network, batch_size, num_workers

    def train_dataloader(self) -> labtrain.DataLoader:
        return labtrain.DataLoader(
            networks.rows(self.network),
            self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            transform=Scale(networks.MEAN, networks.STD) if self.network != "gpt" else None,
        )


class StepClock(pl.Callback):
    """The clock inside Lightning's Trainer."""

    def __init__(self, batch_size: int) -> None:
        self.clock = networks.Clock(batch_size)

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.tick()
