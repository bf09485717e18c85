"""Two tasks with a dataset each: a dict of loaders of different lengths in training (min_size), a list of loaders in validation."""

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.utilities import CombinedLoader
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def tensors(load):
    x, y = load(return_X_y=True)
    return torch.tensor(StandardScaler().fit_transform(x), dtype=torch.float32), torch.tensor(y)


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.sets = {}
        for name, load in {"wine": load_wine, "cancer": load_breast_cancer}.items():
            x, y = tensors(load)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:178]
            x, y = x[order], y[order]
            self.sets[name] = TensorDataset(x[:125], y[:125]), TensorDataset(x[125:], y[125:])

    def train_dataloader(self):
        loaders = {
            "wine": DataLoader(self.sets["wine"][0], self.batch_size, shuffle=True),
            "cancer": DataLoader(self.sets["cancer"][0], 2 * self.batch_size, shuffle=True, num_workers=1),
        }
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self):
        return [DataLoader(self.sets[name][1], self.batch_size) for name in ("wine", "cancer")]


class Model(L.LightningModule):
    def __init__(self, hidden=24, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.inputs = nn.ModuleDict({"wine": nn.Linear(13, hidden), "cancer": nn.Linear(30, hidden)})
        self.shared = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.outputs = nn.ModuleDict({"wine": nn.Linear(hidden, 3), "cancer": nn.Linear(hidden, 2)})
        self.names = ["wine", "cancer"]
        self.val_acc = nn.ModuleList(torchmetrics.Accuracy("multiclass", num_classes=c) for c in (3, 2))

    def forward(self, x, name):
        return self.outputs[name](self.shared(self.inputs[name](x)))

    def training_step(self, batch, batch_idx):
        total = 0
        for name, (x, y) in batch.items():
            loss = nn.functional.cross_entropy(self(x, name), y)
            self.log(f"train/{name}_loss", loss, batch_size=len(x))
            total = total + loss
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch["wine"][0]))
        return total

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        name = self.names[dataloader_idx]
        self.val_acc[dataloader_idx](self(x, name), y)
        self.log(f"val/{name}_acc", self.val_acc[dataloader_idx], add_dataloader_idx=False)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2),
        }
