"""A GRU seq2seq with scheduled sampling: the teacher forcing ratio falls by epoch, the task gets longer (a curriculum); truncated BPTT by hand."""

import random

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Harmonics(Dataset):
    """Sums of sines; `difficulty` is the number of harmonics."""

    def __init__(self, n=117, past=16, future=8):
        self.n, self.past, self.future = n, past, future
        self.difficulty = 1

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        t = torch.arange(self.past + self.future) / 4
        phases = torch.rand(4, generator=g) * 6.28
        y = sum(torch.sin((k + 1) * t + phases[k]) / (k + 1) for k in range(self.difficulty))
        y = y + 0.05 * torch.randn(len(t))
        return y[: self.past, None], y[self.past :, None]


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size
        self.dataset = Harmonics()

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)


class Model(L.LightningModule):
    def __init__(self, hidden=24, lr=5e-3, truncated_bptt_steps=8):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.encoder, self.decoder = nn.GRU(1, hidden, batch_first=True), nn.GRU(1, hidden, batch_first=True)
        self.out = nn.Linear(hidden, 1)
        self.teacher_forcing_ratio = 1.0

    def on_train_epoch_start(self):
        self.teacher_forcing_ratio = max(0.0, 1.0 - 0.4 * self.current_epoch)
        self.trainer.datamodule.dataset.difficulty = 1 + self.current_epoch

    def decode(self, last, h, y):
        outputs, inputs = [], last
        for t in range(y.shape[1]):
            o, h = self.decoder(inputs, h)
            pred = self.out(o)
            outputs.append(pred)
            inputs = y[:, t : t + 1] if random.random() < self.teacher_forcing_ratio else pred.detach()
        return torch.cat(outputs, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt = self.optimizers()
        h = None
        for chunk in x.split(self.hparams.truncated_bptt_steps, dim=1):
            o, h = self.encoder(chunk, h)
            loss = nn.functional.mse_loss(self.out(o[:, :-1]), chunk[:, 1:])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()
        loss = nn.functional.mse_loss(self.decode(x[:, -1:], h, y), y)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.log("train_loss", loss, prog_bar=True)
        self.log("teacher_forcing", self.teacher_forcing_ratio)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
