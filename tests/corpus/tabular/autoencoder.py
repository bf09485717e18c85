"""Anomaly detection: an autoencoder with swap noise, the threshold from outputs that are gathered over the validation."""

import lightning as L
import numpy as np
import torch
import torch.nn as nn
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import MinMaxScaler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset


class Model(L.LightningModule):
    def __init__(self, n_features: int = 8, bottleneck: int = 3, swap: float = 0.1, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(n_features, 16), nn.ELU(), nn.Linear(16, bottleneck))
        self.decoder = nn.Sequential(nn.Linear(bottleneck, 16), nn.ELU(), nn.Linear(16, n_features), nn.Sigmoid())
        self.register_buffer("threshold", torch.tensor(0.0))
        self.val_outputs = []

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        mask = torch.rand_like(x) < self.hparams.swap
        swapped = x[torch.randperm(len(x), device=x.device)]
        loss = nn.functional.mse_loss(self(torch.where(mask, swapped, x)), x)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, is_anomaly = batch
        errors = (self(x) - x).pow(2).mean(dim=1)
        self.val_outputs.append((errors, is_anomaly))
        return errors

    def on_validation_epoch_end(self):
        outputs = self.val_outputs
        errors, truth = (torch.cat(each).cpu().numpy() for each in zip(*outputs))
        self.threshold.fill_(float(np.quantile(errors, 0.9)))
        self.log("val_auc", roc_auc_score(truth, errors), prog_bar=True)
        self.log("val_threshold", self.threshold.item())
        self.val_outputs.clear()  # free memory

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=3, power=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 32, num_workers: int = 0):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str):
        rng = np.random.RandomState(0)
        normal = rng.normal(size=(280, 3)) @ rng.normal(size=(3, 8)) + 0.1 * rng.normal(size=(280, 8))
        odd = rng.normal(scale=2, size=(12, 8))
        scaler = MinMaxScaler().fit(normal)
        train, val = (torch.tensor(scaler.transform(part)).float() for part in (normal[:215], np.r_[normal[215:], odd]))
        self.train_ds = TensorDataset(train)
        self.val_ds = TensorDataset(val, torch.cat([torch.zeros(65), torch.ones(12)]))

    def train_dataloader(self):
        sampler = RandomSampler(self.train_ds, replacement=True, num_samples=200)
        return DataLoader(self.train_ds, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self):
        return DataLoader(self.val_ds, batch_size=self.batch_size, sampler=SequentialSampler(self.val_ds))
