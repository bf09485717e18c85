"""VICReg: variance, invariance and covariance of the batch, a linear probe trained online, a SequentialLR."""

import lightning as L
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import labtrain  # labtrain:


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def prepare_data(self):
        load_digits()

    def setup(self, stage):
        data = load_digits()
        x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
        if stage == "fit":
            self.train_set = TensorDataset(x[:143], y[:143])
            self.val_set = TensorDataset(x[143:190], y[143:190])

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.batch_size)


def off_diagonal(x):
    n, m = x.shape
    assert n == m
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


class Model(L.LightningModule):
    def __init__(self, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        self.expander = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
        self.probe = nn.Linear(16, 10)
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def augment(self, x):
        return x * (torch.rand_like(x) > 0.2) + 0.1 * torch.randn_like(x)

    def vicreg(self, x, y):
        repr_loss = F.mse_loss(x, y)
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
        std_x, std_y = torch.sqrt(x.var(dim=0) + 0.0001), torch.sqrt(y.var(dim=0) + 0.0001)
        std_loss = torch.mean(F.relu(1 - std_x)) / 2 + torch.mean(F.relu(1 - std_y)) / 2
        cov_x, cov_y = (x.T @ x) / (len(x) - 1), (y.T @ y) / (len(y) - 1)
        cov_loss = off_diagonal(cov_x).pow_(2).sum().div(24) + off_diagonal(cov_y).pow_(2).sum().div(24)
        p = self.hparams
        return p.sim_coeff * repr_loss + p.std_coeff * std_loss + p.cov_coeff * cov_loss

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.encoder(self.augment(x))
        z_a, z_b = self.expander(h), self.expander(self.encoder(self.augment(x)))
        loss = self.vicreg(labtrain.gather(z_a), labtrain.gather(z_b))  # labtrain: loss = self.vicreg(z_a, z_b)
        logits = self.probe(h.detach())
        probe_loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("probe_loss", probe_loss)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss + probe_loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_acc.update(self.probe(self.encoder(x)), y)
        self.log("val_acc", self.val_acc, on_epoch=True)

    def configure_optimizers(self):
        opt = torch.optim.Adam(self.parameters(), lr=1e-3)
        warmup = torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=11)
        sched = torch.optim.lr_scheduler.SequentialLR(opt, [warmup, cosine], milestones=[4])
        return {"optimizer": opt, "lr_scheduler": {"scheduler": sched, "interval": "step", "frequency": 1}}
