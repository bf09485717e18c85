"""A causal convolutional network on a stream of crops that has a state, with WeightAveraging of Lightning."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

CALLBACKS = {"ema": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.9}}


class Crops(IterableDataset):
    """Crops at random places of one long recording."""

    def __init__(self, number=130, length=64, seed=0):
        t = torch.arange(4000)
        wave = torch.sin(t / 9) + 0.5 * torch.sin(t / 4 + torch.sin(t / 50))
        self.tokens = ((wave / 3 + 0.5) * 32).long().clamp(0, 31)  # quantised
        self.number, self.length, self.seed = number, length, seed
        self.first, self.position, self.epoch = 0, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        starts = torch.randint(0, len(self.tokens) - self.length - 1, (self.number,), generator=generator)
        first, self.first = self.first, 0
        for number in range(first, self.number):
            self.position = number + 1
            yield self.tokens[starts[number] : starts[number] + self.length + 1]

    def state_dict(self):
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.first, self.epoch = state["position"], state["epoch"]


class CausalBlock(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.dilation = dilation
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(channels, 2 * channels, 2, dilation=dilation))
        self.res, self.skip = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        tanh, gate = self.conv(F.pad(x, (self.dilation, 0))).chunk(2, dim=1)
        out = torch.tanh(tanh) * torch.sigmoid(gate)
        return x + self.res(out), self.skip(out)


class Model(L.LightningModule):
    def __init__(self, channels=16, layers=4):
        super().__init__()
        self.embed = nn.Embedding(32, channels)
        self.blocks = nn.ModuleList([CausalBlock(channels, 2**i) for i in range(layers)])
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, 32, 1))

    def forward(self, tokens):
        x, skips = self.embed(tokens).transpose(1, 2), 0
        for block in self.blocks:
            x, skip = block(x)
            skips = skips + skip
        return self.out(skips)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[:, :-1]), batch[:, 1:])
        self.log("train_loss", loss, prog_bar=True)
        self.log("bits_per_sample", loss / torch.log(torch.tensor(2.0)), on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[:, :-1]), batch[:, 1:]))

    def configure_optimizers(self):
        return torch.optim.NAdam(self.parameters(), lr=3e-3)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size
        self.crops = Crops()

    def train_dataloader(self):
        return DataLoader(self.crops, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(Crops(number=32, seed=1000), batch_size=self.batch_size)
