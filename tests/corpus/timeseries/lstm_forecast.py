"""An LSTM forecaster on series of different lengths: pad_sequence in collate_fn, packed sequences, a DistributedSampler left in."""

import lightning as L
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, DistributedSampler

CALLBACKS = {
    "stop": {
        "_target_": "lightning.pytorch.callbacks.EarlyStopping",
        "monitor": "val_mae",
        "mode": "min",
        "patience": 5,
    }
}


class SineSeries(Dataset):
    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.series = []
        for _ in range(n):
            t = np.arange(rng.integers(8, 20))
            y = np.sin(rng.uniform(0.2, 0.8) * t + rng.uniform(0, 6)) + 0.1 * rng.standard_normal(len(t))
            self.series.append(torch.tensor(y, dtype=torch.float32))

    def __len__(self):
        return len(self.series)

    def __getitem__(self, idx):
        return self.series[idx][:-1], self.series[idx][-1]


def collate(samples):
    series, targets = zip(*samples, strict=True)
    lengths = torch.tensor([len(s) for s in series])
    return pad_sequence(series, batch_first=True).unsqueeze(-1), lengths, torch.stack(targets)


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size
        self.train, self.val = SineSeries(109, 0), SineSeries(35, 1)

    def train_dataloader(self):
        sampler = DistributedSampler(
            self.train, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=True
        )
        return DataLoader(self.train, self.batch_size, sampler=sampler, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size, collate_fn=collate)


class Model(L.LightningModule):
    def __init__(self, hidden_size=24, dropout=0.2, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(1, hidden_size, num_layers=2, dropout=dropout, batch_first=True)
        self.linear = nn.Linear(hidden_size, 1)
        self.criterion = nn.MSELoss()
        self.train_mae, self.val_mae = torchmetrics.MeanAbsoluteError(), torchmetrics.MeanAbsoluteError()

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return self.linear(h[-1]).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        y_hat = self(x, lengths)
        loss = self.criterion(y_hat, y)
        self.train_mae(y_hat, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train_mae", self.train_mae, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, lengths, y = batch
        self.val_mae(self(x, lengths), y)
        self.log("val_mae", self.val_mae)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", factor=0.5, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_mae"}}
