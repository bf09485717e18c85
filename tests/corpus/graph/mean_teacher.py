"""Semi-supervised graphs: a dict of two loaders, and a teacher by deepcopy that follows in on_before_zero_grad."""

import copy

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


def make_graphs(n, seed, nodes=8):
    """Dense graphs: random ones, and such with two communities."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=g)
    side = torch.arange(nodes) % 2
    within = (side[:, None] == side[None]).float()
    p = torch.where(y.view(-1, 1, 1) == 1, 0.2 + 0.6 * within, torch.full_like(within, 0.5))
    adj = (torch.rand(n, nodes, nodes, generator=g) < p).float().triu(1)
    return adj + adj.transpose(1, 2), y


class DenseGNN(nn.Module):
    def __init__(self, hidden=16, classes=2, dropout=0.2):
        super().__init__()
        self.lin1, self.lin2, self.lin3 = (
            nn.Linear(2, hidden),
            nn.Linear(2 * hidden, hidden),
            nn.Linear(hidden, classes),
        )
        self.norm, self.dropout = nn.BatchNorm1d(hidden), dropout

    def forward(self, adj):
        degree = adj.sum(-1, keepdim=True)
        x = torch.cat([degree / 4, adj @ degree / 16], dim=-1)
        x = F.relu(self.lin1(x))
        x = self.lin2(torch.cat([x, adj @ x / 4], dim=-1))
        x = F.relu(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return self.lin3(F.dropout(x.mean(1), self.dropout, self.training))


class Model(L.LightningModule):
    def __init__(self, ema_decay=0.9, consistency=1.0, drop_edge=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.student = DenseGNN()
        self.teacher = copy.deepcopy(self.student)
        for param in self.teacher.parameters():
            param.requires_grad = False

    def augment(self, adj):
        keep = (torch.rand_like(adj) > self.hparams.drop_edge).float().triu(1)
        return adj * (keep + keep.transpose(1, 2))

    def training_step(self, batch, batch_idx):
        adj, y = batch["labelled"]
        (unlabelled,) = batch["unlabelled"]
        supervised = F.cross_entropy(self.student(self.augment(adj)), y)
        with torch.no_grad():
            target = self.teacher(self.augment(unlabelled)).softmax(-1)
        consistency = F.mse_loss(self.student(self.augment(unlabelled)).softmax(-1), target)
        weight = self.hparams.consistency * min(1.0, self.current_epoch / 2)
        loss = supervised + weight * consistency
        self.log_dict({"supervised": supervised, "consistency": consistency, "weight": weight}, batch_size=len(y))
        return loss

    def on_before_zero_grad(self, optimizer):
        with torch.no_grad():
            for student, teacher in zip(self.student.parameters(), self.teacher.parameters()):
                teacher.data.mul_(self.hparams.ema_decay).add_(student.data, alpha=1 - self.hparams.ema_decay)

    def validation_step(self, batch, batch_idx):
        adj, y = batch
        self.log("val_acc", (self.teacher(adj).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=5e-3)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.labelled = TensorDataset(*make_graphs(44, 0))
        self.unlabelled = TensorDataset(make_graphs(117, 1)[0])
        self.val = TensorDataset(*make_graphs(40, 2))

    def train_dataloader(self):
        return {
            "labelled": DataLoader(self.labelled, batch_size=self.batch_size, shuffle=True, drop_last=True),
            "unlabelled": DataLoader(self.unlabelled, batch_size=self.batch_size, shuffle=True),
        }

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)
