"""Denoising: each sample draws a crop and a signal-to-noise ratio; requires_grad is switched in on_train_epoch_start."""

import lightning as L
import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.audio import ScaleInvariantSignalDistortionRatio


class NoisySpeech(Dataset):
    def __init__(self, n, seed, crop=128, train=True):
        rng = np.random.default_rng(seed)
        t = np.arange(400) / 400
        f = rng.uniform(5, 30, (n, 3, 1))
        self.clean = np.sin(2 * np.pi * f * t).sum(1).astype(np.float32) / 3
        self.crop, self.train = crop, train

    def __len__(self):
        return len(self.clean)

    def __getitem__(self, index):
        start = np.random.randint(0, 400 - self.crop) if self.train else 100
        clean = self.clean[index, start : start + self.crop]
        snr = np.random.uniform(0.1, 0.5) if self.train else 0.3
        noise = np.random.randn(self.crop) if self.train else np.random.RandomState(index).randn(self.crop)
        noisy = (clean + snr * noise).astype(np.float32)
        return torch.from_numpy(noisy)[None], torch.from_numpy(clean.copy())[None]


def worker_init_fn(worker_id):
    np.random.seed(np.random.get_state()[1][0] + worker_id)


class Model(L.LightningModule):
    def __init__(self, channels: int = 12, lr: float = 5e-3, freeze_encoder_epochs: int = 1):
        super().__init__()
        self.save_hyperparameters(ignore=["channels"])
        self.encoder = nn.Sequential(
            nn.Conv1d(1, channels, 8, stride=4, padding=2), nn.PReLU(), nn.Conv1d(channels, channels, 3, padding=1),
            nn.GroupNorm(1, channels), nn.PReLU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv1d(channels, channels, 3, padding=1), nn.PReLU(),
            nn.ConvTranspose1d(channels, 1, 8, stride=4, padding=2),
        )  # fmt: skip
        self.sisdr = ScaleInvariantSignalDistortionRatio()

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def on_train_epoch_start(self):
        frozen = self.current_epoch < self.hparams.freeze_encoder_epochs
        for p in self.encoder.parameters():
            p.requires_grad = not frozen

    def training_step(self, batch, batch_idx):
        noisy, clean = batch
        estimate = self(noisy)
        loss = nn.functional.l1_loss(estimate, clean)
        self.log("train_loss", loss)
        return {"loss": loss, "estimate": estimate.detach()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("energy", outputs["estimate"].pow(2).mean(), on_step=False, on_epoch=True)

    def validation_step(self, batch, batch_idx):
        noisy, clean = batch
        self.log("val_sisdr", self.sisdr(self(noisy), clean), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, num_workers: int = 2):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage):
        self.train, self.val = NoisySpeech(100, 0), NoisySpeech(24, 1, train=False)

    def train_dataloader(self):
        return DataLoader(
            self.train, batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers,
            worker_init_fn=worker_init_fn, prefetch_factor=4,
        )  # fmt: skip

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)
