"""Logistic regression by LBFGS in automatic optimization."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import accuracy


class Model(L.LightningModule):
    """Logistic regression, as in lightning-bolts."""

    def __init__(self, input_dim=30, num_classes=2, bias=True, learning_rate=0.1, l2_strength=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(in_features=input_dim, out_features=num_classes, bias=bias)

    def forward(self, x):
        return self.linear(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.cross_entropy(y_hat, y)
        if self.hparams.l2_strength > 0:
            loss += self.hparams.l2_strength * self.linear.weight.pow(2).sum()
        self.log("train_ce_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        self.log("val_ce_loss", F.cross_entropy(y_hat, y))
        self.log("val_acc", accuracy(y_hat.softmax(-1), y, task="multiclass", num_classes=2))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=self.hparams.learning_rate, max_iter=5, history_size=10)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        x, y = load_breast_cancer(return_X_y=True)
        x, y = torch.tensor(scale(x), dtype=torch.float32), torch.tensor(y)
        self.train, self.val = TensorDataset(x[:205], y[:205]), TensorDataset(x[205:300], y[205:300])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)
