"""A graph autoencoder that draws negative edges in training_step, with a DistributedSampler that somebody left in."""

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision


def make_edges(num_nodes=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(num_nodes, 2, generator=generator)
    edges = (torch.cdist(place, place) < 0.16).triu(1).nonzero()
    return edges[torch.randperm(len(edges), generator=generator)]


class Model(L.LightningModule):
    def __init__(self, num_nodes=80, dim=16, lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(num_nodes, dim)
        self.encoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(dim, dim))
        self.auroc, self.ap = BinaryAUROC(thresholds=20), BinaryAveragePrecision(thresholds=20)

    def forward(self, edges):
        src, dst = self.encoder(self.embedding(edges)).unbind(1)
        return (src * dst).sum(-1)

    def negative_sampling(self, edges):
        corrupted = edges.clone()
        side = torch.randint(0, 2, (len(edges),), device=edges.device)
        corrupted[torch.arange(len(edges)), side] = torch.randint(
            0, self.hparams.num_nodes, (len(edges),), device=edges.device
        )
        return corrupted

    def shared_step(self, edges):
        logits = torch.cat([self(edges), self(self.negative_sampling(edges))])
        labels = torch.cat([torch.ones(len(edges)), torch.zeros(len(edges))]).to(logits)
        return logits, labels, F.binary_cross_entropy_with_logits(logits, labels)

    def training_step(self, batch, batch_idx):
        _, _, loss = self.shared_step(batch[0])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        logits, labels, loss = self.shared_step(batch[0])
        self.auroc(logits, labels.long())
        self.ap(logits, labels.long())
        self.log_dict({"val_loss": loss, "val_auroc": self.auroc, "val_ap": self.ap}, on_step=False, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_auroc"}}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        edges = make_edges()
        self.train, self.val = TensorDataset(edges[:-30]), TensorDataset(edges[-30:])

    def train_dataloader(self):
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = DistributedSampler(self.train, num_replicas=world_size, rank=rank, shuffle=True)
        return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)
