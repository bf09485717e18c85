"""What is trained in all ways: 1.3 million weights (16 MB with Adam's), random data, and a log of the steps."""

import hashlib
import itertools
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

import labtrain

BATCH, BATCHES, WIDTH = 256, 150, 128  # samples of a step, steps of an epoch, numbers of a sample


def network() -> nn.Sequential:
    """Return a network of (B, 128) to scores (B, 10), with dropout."""
    sizes = (WIDTH, 768, 768, 768)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(768, 10))


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """Return samples and labels."""
    draws = torch.Generator().manual_seed(0)
    samples = torch.randn(BATCH * BATCHES, WIDTH, generator=draws)
    return samples, torch.randint(0, 10, (BATCH * BATCHES,), generator=draws)


def digest(module: nn.Module) -> str:
    """Return the sha256 of the weights."""
    values = sorted(module.state_dict().items())
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for _, value in values)).hexdigest()


class Log:
    """Appends a line for each step of a rank, in one write: the time, the step, the process."""

    def __init__(self, rank: int) -> None:
        path = Path(f"{os.environ['STEP_LOG']}-{rank}")
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, step: int) -> None:
        os.write(self.file, f"{time.time()} {step} {os.getpid()}\n".encode())


LOGS: list[Log] = []  # of this process; not in the callback, since labtrain reports what no checkpoint holds


class StepLog(pl.Callback):
    """The same for Lightning and labtrain."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        LOGS[:] = [Log(trainer.global_rank)]

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        LOGS[0].add(trainer.global_step)


class Net(pl.LightningModule):
    """The network, its loss and Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        samples, labels = batch  # (B, 128), (B,)
        loss: torch.Tensor = nn.functional.cross_entropy(self.net(samples), labels)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4)


class Data(pl.LightningDataModule):
    """The data, for labtrain."""

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> Any:
        return labtrain.DataLoader(tensors(), self.batch_size, shuffle=True, num_workers=self.num_workers)
