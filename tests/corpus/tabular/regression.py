"""Regression on scaled features with a MetricCollection, StochasticWeightAveraging and a plain TensorDataset."""

import lightning as L
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

CALLBACKS = {
    "swa": {
        "_target_": "lightning.pytorch.callbacks.StochasticWeightAveraging",
        "swa_lrs": 1e-3,
        "swa_epoch_start": 1,
        "annealing_epochs": 1,
    }
}


class Model(L.LightningModule):
    def __init__(self, input_dim: int = 10, hidden_dims: tuple = (32, 16), lr: float = 5e-3, dropout: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        layers = []
        for dim in hidden_dims:
            layers += [nn.Linear(input_dim, dim), nn.ReLU(), nn.Dropout(dropout)]
            input_dim = dim
        layers.append(nn.Linear(input_dim, 1))
        self.model = nn.Sequential(*layers)
        metrics = MetricCollection([MeanSquaredError(squared=False), MeanAbsoluteError(), R2Score()])
        self.train_metrics = metrics.clone(prefix="train/")
        self.val_metrics = metrics.clone(prefix="val/")

    def forward(self, x):
        return self.model(x).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = nn.functional.smooth_l1_loss(y_hat, y)
        self.log("train/loss", loss)
        self.log_dict(self.train_metrics(y_hat, y), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_metrics(self(x), y)
        self.log_dict(self.val_metrics, on_step=False, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, weight_decay=1e-4)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 30, seed: int = 0):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str):
        x, y = load_diabetes(return_X_y=True)
        y = (y - y.mean()) / y.std()
        x_train, x_val, y_train, y_val = train_test_split(x, y, test_size=0.2, random_state=self.hparams.seed)
        self.scaler = StandardScaler().fit(x_train)
        self.train, self.val = (
            TensorDataset(torch.tensor(self.scaler.transform(a), dtype=torch.float32), torch.tensor(b).float())
            for a, b in ((x_train, y_train), (x_val, y_val))
        )

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.hparams.batch_size)
