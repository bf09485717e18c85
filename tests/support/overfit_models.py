"""Data and callbacks for the tests of Lightning's keys and callbacks."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from torch.utils.data import DataLoader, WeightedRandomSampler

from tests.support.exact_worker import Data, Images


class Weighted(Data):
    """Torch's loader with a sampler that draws."""

    def __init__(self, batch_size: int) -> None:
        super().__init__("images", 40, batch_size)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, sampler=WeightedRandomSampler(torch.arange(1.0, 41.0), 40))


class NotedImages(Images):
    """Notes which samples were loaded."""

    def __init__(self, size: int, folder: str) -> None:
        super().__init__(size)
        self.file = Path(folder, "seen")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with self.file.open("a") as file:
            file.write(f"{index} ")
        return super().__getitem__(index)


class Noted(Data):
    """Torch's shuffled loader over samples that are noted."""

    def __init__(self, folder: str, batch_size: int) -> None:
        super().__init__("images", 40, batch_size)
        self.train, self.val = NotedImages(40, folder), Images(40)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, shuffle=True)


class Throughput(ThroughputMonitor):
    """Counts the samples of a batch as a person would."""

    def __init__(self, window_size: int) -> None:
        super().__init__(batch_size_fn=lambda batch: len(batch[0]), window_size=window_size)


class Remembers(pl.Callback):
    """Sums up the steps, and saves the sum."""

    def __init__(self) -> None:
        self.total = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.total += trainer.global_step
        pl_module.log("remembered", float(self.total), on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]
