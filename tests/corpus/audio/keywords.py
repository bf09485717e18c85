"""Keyword spotting with clean and noisy recordings: CombinedLoader in training, a list of loaders in validation."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

KEYWORDS = ["yes", "no", "stop", "go", "left"]


def recordings(n, noise, seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, len(KEYWORDS), (n,), generator=g)
    shapes = torch.randn(len(KEYWORDS), 8, 24, generator=torch.Generator().manual_seed(99))
    return TensorDataset(shapes[y] + noise * torch.randn(n, 8, 24, generator=g), y)


class DSConv(nn.Sequential):
    def __init__(self, channels):
        super().__init__(
            nn.Conv1d(channels, channels, 5, padding=2, groups=channels), nn.BatchNorm1d(channels), nn.ReLU(),
            nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels), nn.ReLU(),
        )  # fmt: skip


class Model(L.LightningModule):
    def __init__(self, channels: int = 16, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv1d(8, channels, 3, padding=1), DSConv(channels), DSConv(channels), nn.AdaptiveAvgPool1d(1),
            nn.Flatten(), nn.Linear(channels, len(KEYWORDS)),
        )  # fmt: skip
        self.train_loss = MeanMetric()
        self.val_acc = nn.ModuleList([MulticlassAccuracy(len(KEYWORDS)) for _ in range(2)])

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        (clean_x, clean_y), (noisy_x, noisy_y) = batch["clean"], batch["noisy"]
        loss = F.cross_entropy(self(clean_x), clean_y) + 0.5 * F.cross_entropy(self(noisy_x), noisy_y)
        self.train_loss.update(loss)
        return loss

    def on_train_epoch_end(self):
        self.log("train_loss", self.train_loss.compute())
        self.train_loss.reset()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.val_acc[dataloader_idx](self(x), y)
        self.log("val_acc", self.val_acc[dataloader_idx], on_epoch=True, add_dataloader_idx=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adagrad(self.parameters(), lr=self.hparams.lr * 10)
        return [optimizer], [torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.8)]


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.clean, self.noisy = recordings(85, 0.5, 0), recordings(60, 2.0, 1)
        self.vals = [recordings(30, 0.5, 2), recordings(25, 2.0, 3)]

    def train_dataloader(self):
        loaders = {
            "clean": DataLoader(self.clean, batch_size=self.batch_size, shuffle=True),
            "noisy": DataLoader(self.noisy, batch_size=self.batch_size // 2, shuffle=True),
        }
        return CombinedLoader(loaders, mode="max_size_cycle")

    def val_dataloader(self):
        return [DataLoader(val, batch_size=self.batch_size) for val in self.vals]
