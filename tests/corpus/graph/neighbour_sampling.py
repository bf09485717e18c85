"""GraphSAGE: the collate_fn samples neighbours with numpy, in workers that worker_init_fn seeds."""

import lightning as L
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader


class Graph:
    def __init__(self, n=200, classes=4, seed=0):
        rng = np.random.default_rng(seed)
        self.y = rng.integers(0, classes, n)
        self.x = (np.eye(classes)[self.y] + rng.normal(0, 1, (n, classes))).astype(np.float32)
        probability = np.where(self.y[:, None] == self.y[None], 0.1, 0.01)
        adjacency = rng.random((n, n)) < probability
        self.neighbours = [np.flatnonzero(row) if row.any() else np.array([i]) for i, row in enumerate(adjacency)]


class NeighborSampler:
    def __init__(self, graph, fanout):
        self.graph, self.fanout = graph, fanout

    def sample(self, nodes):
        return np.stack([np.random.choice(self.graph.neighbours[n], self.fanout) for n in nodes])

    def __call__(self, nodes):
        nodes = np.array(nodes)
        hop1 = self.sample(nodes)  # (B, K)
        hop2 = self.sample(hop1.reshape(-1)).reshape(*hop1.shape, self.fanout)  # (B, K, K)
        x = self.graph.x
        return [torch.from_numpy(x[each]) for each in (nodes, hop1, hop2)], torch.from_numpy(self.graph.y[nodes])


def seed_worker(worker_id):
    worker_seed = torch.initial_seed() % 2**32
    np.random.seed(worker_seed)


class SAGEConv(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.own, self.others = nn.Linear(dim_in, dim_out), nn.Linear(dim_in, dim_out, bias=False)

    def forward(self, x, neighbours):
        return F.normalize(self.own(x) + self.others(neighbours.mean(-2)), dim=-1)


class Model(L.LightningModule):
    def __init__(self, in_dim=4, hidden=16, classes=4):
        super().__init__()
        self.save_hyperparameters()
        self.conv1, self.conv2 = SAGEConv(in_dim, hidden), SAGEConv(hidden, hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, blocks):
        x, hop1, hop2 = blocks
        h1 = F.dropout(F.relu(self.conv1(hop1, hop2)), 0.2, self.training)
        h0 = F.relu(self.conv1(x, hop1))
        return self.fc(self.conv2(h0, h1))

    def training_step(self, batch, batch_idx):
        blocks, y = batch
        loss = F.cross_entropy(self(blocks), y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=y.numel())
        return loss

    def validation_step(self, batch, batch_idx):
        blocks, y = batch
        self.log("val/acc", (self(blocks).argmax(-1) == y).float().mean(), batch_size=y.numel())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, num_workers: int = 2, fanout: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.graph = Graph()

    def _loader(self, nodes, shuffle):
        return DataLoader(
            nodes, batch_size=self.hparams.batch_size, shuffle=shuffle, num_workers=self.hparams.num_workers,
            collate_fn=NeighborSampler(self.graph, self.hparams.fanout), worker_init_fn=seed_worker,
        )  # fmt: skip

    def train_dataloader(self):
        return self._loader(range(0, 137), shuffle=True)

    def val_dataloader(self):
        return self._loader(range(137, 200), shuffle=False)
