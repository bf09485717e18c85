"""An autoregressive model fitted by LBFGS, whose closure Lightning calls several times a step."""

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def simulate(n=220, seed=0):
    rng = np.random.default_rng(seed)
    y = np.zeros(n)
    for t in range(3, n):
        y[t] = 0.6 * y[t - 1] - 0.3 * y[t - 2] + 0.2 * y[t - 3] + 0.3 * rng.standard_normal()
    return torch.tensor(y, dtype=torch.float32)


class Data(L.LightningDataModule):
    def __init__(self, lags=5, batch_size=32):
        super().__init__()
        self.lags, self.batch_size = lags, batch_size

    def setup(self, stage=None):
        windows = simulate().unfold(0, self.lags + 1, 1)
        x, y = windows[:, :-1], windows[:, -1:]
        self.train, self.val = TensorDataset(x[:141], y[:141]), TensorDataset(x[141:], y[141:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=False)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, lags=5, lr=0.2, ridge=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(lags, 1)

    def forward(self, x):
        return self.linear(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y) + self.hparams.ridge * self.linear.weight.pow(2).sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=self.hparams.lr, max_iter=6, history_size=5)
