"""PCGrad: a backward a task by hand, gradients that conflict are projected, and an optimizer step."""

import random

import lightning as L
import torch
from sklearn.datasets import make_regression
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        parts = []
        for seed in range(2):
            x, y = make_regression(73, 12, n_targets=3, noise=2.0, random_state=seed)
            parts.append(
                TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32) / 100)
            )
        self.train = ConcatDataset(parts)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)


class PCGrad:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def pc_backward(self, losses, backward):
        grads = []
        for loss in losses:
            self.optimizer.zero_grad(set_to_none=True)
            backward(loss, retain_graph=True)
            grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters()])
        flat = [torch.cat([g.flatten() for g in grad]) for grad in grads]
        projected = [g.clone() for g in flat]
        for g_i in projected:
            others = list(flat)
            random.shuffle(others)
            for g_j in others:
                dot = torch.dot(g_i, g_j)
                if dot < 0:
                    g_i -= dot * g_j / g_j.norm() ** 2
        merged, start = torch.stack(projected).sum(0), 0
        for p in self.parameters():
            p.grad = merged[start : start + p.numel()].view_as(p).clone()
            start += p.numel()


class Model(L.LightningModule):
    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(32, 1) for _ in range(3))

    def forward(self, x):
        h = self.trunk(x)
        return torch.cat([head(h) for head in self.heads], 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = ((self(x) - y) ** 2).mean(0)
        opt = self.optimizers()
        PCGrad(opt).pc_backward(losses, self.manual_backward)
        opt.step()
        self.log_dict({f"loss_{i}": loss for i, loss in enumerate(losses)}, prog_bar=True)

    def on_train_epoch_end(self):
        sch = self.lr_schedulers()
        if isinstance(sch, torch.optim.lr_scheduler.ReduceLROnPlateau):
            sch.step(self.trainer.callback_metrics["loss_0"])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)]
