"""A GIN on batches of graphs: a collate_fn joins them into one object with the graph of each node."""

from dataclasses import dataclass

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchmetrics
from torch.utils.data import DataLoader, Dataset, random_split


@dataclass
class Batch:
    x: torch.Tensor
    edge_index: torch.Tensor
    batch: torch.Tensor
    y: torch.Tensor

    @property
    def num_graphs(self):
        return self.y.size(0)

    def to(self, device, non_blocking=False):
        return Batch(*(getattr(self, n).to(device) for n in ("x", "edge_index", "batch", "y")))


class Rings(Dataset):
    """Rings and stars with random features."""

    def __init__(self, n=170):
        g = torch.Generator().manual_seed(0)
        self.graphs = []
        for i in range(n):
            size, y = int(torch.randint(4, 9, (), generator=g)), i % 2
            nodes = torch.arange(size)
            edges = torch.stack([nodes, (nodes + 1) % size]) if y else torch.stack([nodes[1:], nodes[1:] * 0])
            edges = torch.cat([edges, edges.flip(0)], dim=1)
            self.graphs.append((torch.randn(size, 4, generator=g), edges, y))

    def __len__(self):
        return len(self.graphs)

    def __getitem__(self, i):
        return self.graphs[i]


def collate(graphs):
    xs, edges, batch, ys, offset = [], [], [], [], 0
    for i, (x, edge_index, y) in enumerate(graphs):
        xs.append(x)
        edges.append(edge_index + offset)
        batch.append(torch.full((len(x),), i))
        ys.append(y)
        offset += len(x)
    return Batch(torch.cat(xs), torch.cat(edges, dim=1), torch.cat(batch), torch.tensor(ys))


class GINConv(nn.Module):
    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(dim_in, dim_out), nn.BatchNorm1d(dim_out), nn.ReLU(),
                                 nn.Linear(dim_out, dim_out))  # fmt: skip

    def forward(self, x, edge_index):
        src, dst = edge_index
        out = torch.zeros_like(x).index_add_(0, dst, x[src])
        return self.mlp((1 + self.eps) * x + out)


class Model(L.LightningModule):
    def __init__(self, in_channels=4, hidden=16, out_channels=2, dropout=0.3):
        super().__init__()
        self.convs = nn.ModuleList([GINConv(in_channels, hidden), GINConv(hidden, hidden)])
        self.dropout = dropout
        self.fc = nn.Linear(hidden, out_channels)
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=2)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=2)

    def forward(self, data):
        x = data.x
        for conv in self.convs:
            x = F.relu(conv(x, data.edge_index))
        pooled = x.new_zeros(data.num_graphs, x.size(1))
        pooled.scatter_add_(0, data.batch.unsqueeze(1).expand_as(x), x)
        return self.fc(F.dropout(pooled, self.dropout, training=self.training))

    def training_step(self, data, batch_idx):
        y_hat = self(data)
        loss = F.cross_entropy(y_hat, data.y)
        self.train_acc(y_hat.softmax(dim=-1), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        self.log("train_acc", self.train_acc, prog_bar=True, on_step=False, on_epoch=True, batch_size=data.num_graphs)
        return loss

    def validation_step(self, data, batch_idx):
        self.val_acc(self(data).softmax(dim=-1), data.y)
        self.log("val_acc", self.val_acc, prog_bar=True, on_step=False, on_epoch=True, batch_size=data.num_graphs)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        self.train, self.val = random_split(Rings(), [133, 37])

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size, collate_fn=collate)
