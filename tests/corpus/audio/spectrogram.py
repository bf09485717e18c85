"""Classification of tones by their spectrograms, with SpecAugment in on_after_batch_transfer, in bfloat16."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import Accuracy

TRAINER = {"precision": "bf16-mixed"}


def make_tones(n=180, classes=4, length=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    t = torch.arange(length) / length
    pitch = 20 + 25 * y + 4 * torch.rand(n, generator=g)
    phase = torch.rand(n, 1, generator=g)
    wave = torch.sin(2 * torch.pi * (pitch[:, None] * t + phase)) + 0.5 * torch.randn(n, length, generator=g)
    return wave, y


class Model(L.LightningModule):
    def __init__(self, n_fft: int = 64, hop: int = 32, classes: int = 4, lr: float = 2e-3, mask: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("window", torch.hann_window(n_fft))
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.fc = nn.Linear(16, classes)
        self.accuracy = Accuracy(task="multiclass", num_classes=classes)

    def spectrogram(self, wave):
        spec = torch.stft(wave, self.hparams.n_fft, self.hparams.hop, window=self.window, return_complex=True)
        return torch.log1p(spec.abs().pow(2)).unsqueeze(1)  # (B, 1, F, T)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        wave, y = batch
        spec = self.spectrogram(wave)
        if self.trainer.training:
            start = int(torch.randint(0, spec.size(2) - self.hparams.mask, (1,)))
            spec[:, :, start : start + self.hparams.mask] = 0
            start = int(torch.randint(0, spec.size(3) - self.hparams.mask, (1,)))
            spec[..., start : start + self.hparams.mask] = 0
        return spec, y

    def forward(self, spec):
        return self.fc(self.conv(spec))

    def training_step(self, batch, batch_idx):
        spec, y = batch
        loss = F.cross_entropy(self(spec), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        spec, y = batch
        logits = self(spec)
        self.accuracy(logits, y)
        self.log("val_acc", self.accuracy)
        self.log("val_loss", F.cross_entropy(logits, y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        self.train, self.val = random_split(TensorDataset(*make_tones()), [0.75, 0.25])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)
