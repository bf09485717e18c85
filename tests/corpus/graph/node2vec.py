"""Node2Vec: random walks in the collate_fn, a sparse embedding and SparseAdam, as in PyTorch Geometric."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

EPS = 1e-15


def make_neighbours(num_nodes=60, degree=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    shifts = torch.randint(1, 8, (num_nodes, degree), generator=g)
    return (torch.arange(num_nodes).unsqueeze(1) + shifts) % num_nodes


class Model(L.LightningModule):
    def __init__(self, num_nodes=60, embedding_dim=16, context_size=4, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(num_nodes, embedding_dim, sparse=True)

    def forward(self, nodes=None):
        return self.embedding.weight if nodes is None else self.embedding(nodes)

    def loss(self, pos_rw, neg_rw):
        total = 0
        for rw, sign in ((pos_rw, 1), (neg_rw, -1)):
            start, rest = rw[:, 0], rw[:, 1:].contiguous()
            h_start = self(start).view(rw.size(0), 1, -1)
            h_rest = self(rest.view(-1)).view(rw.size(0), -1, self.hparams.embedding_dim)
            out = torch.sigmoid((h_start * h_rest).sum(dim=-1)).view(-1)
            total = total - torch.log((out if sign > 0 else 1 - out) + EPS).mean()
        return total

    def training_step(self, batch, batch_idx):
        pos_rw, neg_rw = batch
        loss = self.loss(pos_rw, neg_rw)
        self.log("train_loss", loss, batch_size=len(pos_rw))
        return loss

    def configure_optimizers(self):
        return torch.optim.SparseAdam(list(self.parameters()), lr=self.hparams.lr)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, walk_length: int = 5, num_negative_samples: int = 1):
        super().__init__()
        self.batch_size, self.walk_length, self.negatives = batch_size, walk_length, num_negative_samples
        self.neighbours = make_neighbours()

    def pos_sample(self, batch):
        walk = [batch]
        for _ in range(self.walk_length - 1):
            choice = torch.randint(0, self.neighbours.size(1), (len(batch),))
            walk.append(self.neighbours[walk[-1], choice])
        return torch.stack(walk, dim=1)

    def neg_sample(self, batch):
        batch = batch.repeat(self.negatives)
        rest = torch.randint(len(self.neighbours), (len(batch), self.walk_length - 1))
        return torch.cat([batch.view(-1, 1), rest], dim=-1)

    def sample(self, batch):
        batch = torch.tensor(batch)
        return self.pos_sample(batch), self.neg_sample(batch)

    def train_dataloader(self):
        return DataLoader(range(60), collate_fn=self.sample, batch_size=self.batch_size, shuffle=True)
