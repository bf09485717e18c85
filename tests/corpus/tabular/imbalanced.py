"""Rare classes drawn by a WeightedRandomSampler, on categorical and numeric columns, with a focal loss."""

import lightning as L
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchmetrics.classification import BinaryAUROC, BinaryConfusionMatrix, BinaryPrecision, BinaryRecall


class Transactions(Dataset):
    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.cat = rng.integers(0, [5, 3, 8], (n, 3))
        self.num = rng.normal(size=(n, 4)).astype("float32")
        score = self.num[:, 0] + 0.5 * self.cat[:, 1] - 0.2 * self.cat[:, 2] + 0.3 * rng.normal(size=n)
        self.y = (score > np.quantile(score, 0.88)).astype("int64")

    def __len__(self):
        return len(self.y)

    def __getitem__(self, idx):
        return {"cat": self.cat[idx], "num": self.num[idx], "target": self.y[idx]}


class Model(L.LightningModule):
    def __init__(self, cardinalities=(5, 3, 8), n_num=4, emb_dim=4, hidden=32, gamma=2.0):
        super().__init__()
        self.save_hyperparameters()
        self.embeddings = nn.ModuleList(nn.Embedding(c, emb_dim) for c in cardinalities)
        self.bn = nn.BatchNorm1d(n_num)
        self.mlp = nn.Sequential(
            nn.Linear(len(cardinalities) * emb_dim + n_num, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )
        self.auroc, self.precision_, self.recall = BinaryAUROC(), BinaryPrecision(), BinaryRecall()
        self.confusion = BinaryConfusionMatrix()

    def forward(self, cat, num):
        embedded = [emb(cat[:, i]) for i, emb in enumerate(self.embeddings)]
        return self.mlp(torch.cat([*embedded, self.bn(num)], dim=1)).squeeze(1)

    def focal_loss(self, logits, target):
        bce = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
        return ((1 - torch.exp(-bce)) ** self.hparams.gamma * bce).mean()

    def training_step(self, batch, batch_idx):
        loss = self.focal_loss(self(batch["cat"], batch["num"]), batch["target"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits, y = self(batch["cat"], batch["num"]), batch["target"]
        self.log("val_loss", self.focal_loss(logits, y))
        for name, metric in (("auroc", self.auroc), ("precision", self.precision_), ("recall", self.recall)):
            metric(logits.sigmoid(), y)
            self.log(f"val_{name}", metric)
        self.confusion.update(logits.sigmoid(), y)

    def on_validation_epoch_end(self):
        matrix = self.confusion.compute()
        self.log("val_false_negatives", matrix[1, 0].float())
        self.confusion.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return [optimizer], [scheduler]


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.train, self.val = Transactions(250, 0), Transactions(80, 1)

    def train_dataloader(self):
        class_counts = np.bincount(self.train.y)
        weights = 1.0 / class_counts[self.train.y]
        sampler = WeightedRandomSampler(torch.from_numpy(weights), num_samples=len(weights), replacement=True)
        return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)
