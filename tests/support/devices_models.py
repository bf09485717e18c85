"""Models and data that ask for the number of devices, and do something with it or not."""

import os
from typing import Any

import torch

import labtrain
from tests.support.exact_worker import Data
from tests.support.resume_models import Small


def learning_rate(trainer: Any) -> float:
    """Return a rate for so many devices."""
    return 0.02 * trainer.num_devices  # the line that is named


class Asks(Small):
    """Reads the number of devices in one of the ways there are.

    Args:
        kind: which.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.kind != "environment":
            self.log("train/loss", loss, sync_dist=self.trainer.world_size > 1)
        if self.kind == "penalty" and self.trainer.is_global_zero:
            return loss + sum(weight.square().sum() for weight in self.parameters())
        factors: dict[str, Any] = {
            "global rank": lambda: 1 + self.global_rank,
            "local rank": lambda: 1 + self.trainer.local_rank,
            "a division": lambda: 1 / self.trainer.world_size,
            "environment": lambda: 1 + int(os.environ.get("LOCAL_RANK", 0)),
        }
        return loss * factors[self.kind]() if self.kind in factors else loss

    def setup(self, stage: str) -> None:
        if self.kind == "setup":
            self.factor = 1.0 + self.trainer.global_rank  # the line that is named

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.kind == "hook":
            optimizer.param_groups[0]["lr"] = 0.02 * self.trainer.world_size  # the line that is named

    def on_validation_epoch_end(self) -> None:
        self.log("zero", 0.0, sync_dist=self.trainer.world_size > 1)

    def configure_optimizers(self) -> Any:
        rate = 0.02
        if self.kind == "world_size":
            rate *= self.trainer.world_size  # the line that is named
        elif self.kind == "strategy":
            rate *= self.trainer.strategy.world_size  # the line that is named
        elif self.kind == "num_devices":
            rate = learning_rate(self.trainer)
        optimizer = torch.optim.SGD(self.parameters(), lr=rate)
        if self.kind == "schedule":
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.scale)]
        return optimizer

    def scale(self, step: int) -> float:
        return 1.0 / self.trainer.world_size  # the line that is named


class Divides(Data):
    """Divides its batch size by the number of devices."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        size = self.batch_size // self.trainer.world_size  # the line that is named
        return labtrain.DataLoader(self.train, size, shuffle=True)
