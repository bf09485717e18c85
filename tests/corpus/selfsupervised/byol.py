"""BYOL: a deepcopy of the networks as target, moved in on_train_batch_end by a momentum that follows a cosine."""

import copy
import math

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        self.train, self.val = TensorDataset(images[:139]), TensorDataset(images[139:180])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True, pin_memory=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size, shuffle=False, pin_memory=True)


class MLP(nn.Sequential):
    def __init__(self, in_dim, hidden_dim, out_dim):
        super().__init__(
            nn.Linear(in_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, out_dim),
        )


class Model(L.LightningModule):
    def __init__(self, learning_rate=0.05, initial_tau=0.99):
        super().__init__()
        self.save_hyperparameters()
        encoder = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.online_network = nn.Sequential(encoder, MLP(72, 32, 16))
        self.predictor = MLP(16, 32, 16)
        self.target_network = copy.deepcopy(self.online_network)
        for p in self.target_network.parameters():
            p.requires_grad = False
        self.current_tau = initial_tau

    def forward(self, x):
        return self.online_network(x)

    def augment(self, x):
        return torch.roll(x, torch.randint(-1, 2, (1,)).item(), dims=-1) + 0.1 * torch.randn_like(x)

    def cosine_loss(self, x1, x2):
        z = self.predictor(self.online_network(x1))
        with torch.no_grad():
            target = self.target_network(x2)
        return -2 * F.cosine_similarity(z, target, dim=-1).mean()

    def training_step(self, batch, batch_idx):
        (x,) = batch
        x1, x2 = self.augment(x), self.augment(x)
        loss = self.cosine_loss(x1, x2) + self.cosine_loss(x2, x1)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for online, target in zip(self.online_network.parameters(), self.target_network.parameters(), strict=True):
            target.data = self.current_tau * target.data + (1 - self.current_tau) * online.data
        max_steps = len(self.trainer.train_dataloader) * self.trainer.max_epochs
        k = math.cos(math.pi * self.trainer.global_step / max_steps)
        self.current_tau = 1 - (1 - self.hparams.initial_tau) * (k + 1) / 2
        self.log("tau", self.current_tau)

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        self.log("val_loss", self.cosine_loss(x, x), on_epoch=True)

    def configure_optimizers(self):
        params = [*self.online_network.parameters(), *self.predictor.parameters()]
        optimizer = torch.optim.SGD(params, lr=self.hparams.learning_rate, momentum=0.9, weight_decay=1.5e-6)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)]
