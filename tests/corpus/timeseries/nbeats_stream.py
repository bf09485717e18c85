"""N-BEATS on a stream of windows: an IterableDataset with state_dict, cut by limit_train_batches; OneCycleLR by step."""

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

TRAINER = {"limit_train_batches": 6, "log_every_n_steps": 1}


class WindowStream(IterableDataset):
    """Draw windows from a long series, without an end."""

    def __init__(self, backcast=16, forecast=4, seed=0):
        t = np.arange(1000)
        self.series = (np.sin(t / 5) + 0.3 * np.cos(t / 17) + 0.001 * t).astype(np.float32)
        self.backcast, self.forecast = backcast, forecast
        self.rng = np.random.default_rng(seed)

    def __iter__(self):
        while True:
            i = self.rng.integers(0, len(self.series) - self.backcast - self.forecast)
            window = self.series[i : i + self.backcast + self.forecast]
            yield window[: self.backcast], window[self.backcast :]

    def state_dict(self):
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.rng.bit_generator.state = state["rng"]


class Data(L.LightningDataModule):
    def __init__(self, batch_size=21):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        self.stream = WindowStream()

    def train_dataloader(self):
        return DataLoader(self.stream, batch_size=self.batch_size)


class Block(nn.Module):
    def __init__(self, backcast, forecast, hidden):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(backcast, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.backcast, self.forecast = nn.Linear(hidden, backcast), nn.Linear(hidden, forecast)

    def forward(self, x):
        theta = self.fc(x)
        return self.backcast(theta), self.forecast(theta)


class Model(L.LightningModule):
    def __init__(self, backcast=16, forecast=4, hidden=32, blocks=3, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.blocks = nn.ModuleList(Block(backcast, forecast, hidden) for _ in range(blocks))

    def forward(self, x):
        forecast = 0
        for block in self.blocks:
            b, f = block(x)
            x, forecast = x - b, forecast + f
        return forecast

    def smape(self, y_hat, y):
        return 200 * ((y_hat - y).abs() / (y_hat.abs() + y.abs() + 1e-8)).mean()

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = nn.functional.l1_loss(y_hat, y)
        self.log_dict({"loss": loss, "smape": self.smape(y_hat, y)}, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=18)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
