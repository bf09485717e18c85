"""An autoencoder for anomalies in sensor windows: training errors gathered in a list, and a threshold from them in on_train_epoch_end."""

import lightning as L
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size=24, num_workers=0):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage=None):
        rng = np.random.default_rng(5)
        t = np.arange(20)
        x = np.sin(t / 3 + rng.uniform(0, 6, (240, 1))) + 0.1 * rng.standard_normal((240, 20))
        y = np.zeros(240)
        bad = rng.choice(np.arange(160, 240), 20, replace=False)
        x[bad, 8:12] += 1.5
        y[bad] = 1
        x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.long)
        self.mean, self.std = x[:160].mean(), x[:160].std()
        x = (x - self.mean) / self.std
        self.train, self.val = TensorDataset(x[:155]), TensorDataset(x[160:], y[160:])

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, num_workers=self.hparams.num_workers)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size, sampler=SequentialSampler(self.val))


class Model(L.LightningModule):
    def __init__(self, latent=4, lr=5e-3, quantile=0.9):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(20, 16), nn.ELU(), nn.Linear(16, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 16), nn.ELU(), nn.Linear(16, 20))
        self.register_buffer("threshold", torch.tensor(float("inf")))
        self.val_auc = torchmetrics.AUROC(task="binary")
        self.training_step_outputs = []

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noisy = x + 0.1 * torch.randn_like(x)
        error = (self(noisy) - x).pow(2).mean(1)
        self.training_step_outputs.append(error.detach())
        self.log("train_loss", error.mean())
        return error.mean()

    def on_train_epoch_end(self):
        outputs = self.training_step_outputs
        errors = torch.cat(outputs)
        self.threshold = torch.quantile(errors, self.hparams.quantile)
        self.log("threshold", self.threshold)
        self.training_step_outputs.clear()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = (self(x) - x).pow(2).mean(1)
        self.val_auc.update(scores, y)
        self.log("val_flagged", (scores > self.threshold).float().mean(), on_step=False, on_epoch=True)
        self.log("val_auc", self.val_auc, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "name": "lr"}]
