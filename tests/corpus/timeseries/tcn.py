"""A temporal convolutional network with weight_norm, StochasticWeightAveraging, validation in mid-epoch, and Lightning's own gradient clipping."""

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset

TRAINER = {"gradient_clip_val": 0.5, "val_check_interval": 0.5}
CALLBACKS = {
    "swa": {
        "_target_": "lightning.pytorch.callbacks.StochasticWeightAveraging",
        "swa_lrs": 1e-3,
        "swa_epoch_start": 1,
        "annealing_epochs": 1,
    }
}


class Windows(Dataset):
    def __init__(self, start, stop, window=24):
        t = np.arange(400)
        rng = np.random.RandomState(0)
        y = np.sin(t / 6) + 0.5 * np.sin(t / 15) + 0.1 * rng.randn(400)
        self.y, self.window = torch.tensor(y[start:stop], dtype=torch.float32), window

    def __len__(self):
        return len(self.y) - self.window

    def __getitem__(self, i):
        return self.y[i : i + self.window].unsqueeze(0), self.y[i + self.window]


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(Windows(0, 159), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Windows(300, 371), batch_size=self.batch_size)


class TemporalBlock(nn.Module):
    def __init__(self, n_inputs, n_outputs, kernel_size, dilation, dropout=0.1):
        super().__init__()
        self.pad = nn.ConstantPad1d(((kernel_size - 1) * dilation, 0), 0.0)
        self.conv = weight_norm(nn.Conv1d(n_inputs, n_outputs, kernel_size, dilation=dilation))
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(dropout)
        self.downsample = nn.Conv1d(n_inputs, n_outputs, 1) if n_inputs != n_outputs else None

    def forward(self, x):
        out = self.dropout(self.relu(self.conv(self.pad(x))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Model(L.LightningModule):
    def __init__(self, channels=(8, 8, 8), kernel_size=3, lr=5e-3):
        super().__init__()
        self.save_hyperparameters()
        sizes = [1, *channels]
        self.network = nn.Sequential(
            *(TemporalBlock(i, o, kernel_size, 2**n) for n, (i, o) in enumerate(zip(sizes, channels, strict=False)))
        )
        self.head = nn.Linear(channels[-1], 1)

    def forward(self, x):
        return self.head(self.network(x)[:, :, -1]).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.huber_loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
