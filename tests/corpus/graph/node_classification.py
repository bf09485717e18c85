"""A GCN on one graph, which the model keeps as buffers; batches are nodes of a Subset, with an RNG of the loader's own."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy


def make_graph(n=120, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    same = (y[:, None] == y[None]).float()
    adj = (torch.rand(n, n, generator=g) < 0.02 + 0.1 * same).float()
    adj = ((adj + adj.T) > 0).float() + torch.eye(n)
    x = F.one_hot(y, classes).float() + 0.8 * torch.randn(n, classes, generator=g)
    return x, adj, y


class GCNConv(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x, adj_norm):
        return adj_norm @ self.lin(x) + self.bias


class Model(L.LightningModule):
    def __init__(self, hidden_channels: int = 16, num_classes: int = 3, dropout: float = 0.5):
        super().__init__()
        x, adj, y = make_graph()
        deg = adj.sum(1).pow(-0.5)
        self.register_buffer("x", x)
        self.register_buffer("adj", deg[:, None] * adj * deg[None], persistent=False)
        self.register_buffer("y", y)
        self.dropout = dropout
        self.conv1, self.conv2 = GCNConv(x.size(1), hidden_channels), GCNConv(hidden_channels, num_classes)
        self.acc = Accuracy(task="multiclass", num_classes=num_classes)

    def forward(self):
        h = F.dropout(self.x, self.dropout, self.training)
        h = F.relu(self.conv1(h, self.adj))
        return self.conv2(F.dropout(h, self.dropout, self.training), self.adj)

    def training_step(self, batch, batch_idx):
        (idx,) = batch
        loss = F.cross_entropy(self()[idx], self.y[idx])
        self.log("train_loss", loss, batch_size=len(idx))
        return loss

    def validation_step(self, batch, batch_idx):
        (idx,) = batch
        self.acc(self()[idx], self.y[idx])
        self.log("val_acc", self.acc, on_epoch=True, batch_size=len(idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02, weight_decay=5e-4)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        nodes = torch.randperm(120, generator=torch.Generator().manual_seed(1))
        self.train_nodes, self.val_nodes = TensorDataset(nodes[:85]), TensorDataset(nodes[85:])

    def train_dataloader(self):
        g = torch.Generator()
        g.manual_seed(0)
        return DataLoader(self.train_nodes, batch_size=self.batch_size, shuffle=True, generator=g)

    def val_dataloader(self):
        return DataLoader(self.val_nodes, batch_size=len(self.val_nodes))
