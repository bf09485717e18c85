"""Speaker embeddings by a loss over the batch (GE2E): a batch sampler takes P speakers with K utterances each."""

import lightning as L
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

import labtrain  # labtrain:


class Voices(Dataset):
    def __init__(self, speakers=20, utterances=10, seed=0):
        rng = np.random.default_rng(seed)
        voices = rng.normal(size=(speakers, 1, 1, 12))
        x = voices + rng.normal(size=(speakers, utterances, 20, 12))
        self.x = torch.tensor(x.reshape(-1, 20, 12), dtype=torch.float32)  # (N, T, F)
        self.speaker = torch.arange(speakers).repeat_interleave(utterances)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.speaker[i]


class PKSampler(Sampler):
    """Yield batches of P speakers with K utterances each."""

    def __init__(self, labels, p, k, num_batches):
        self.labels, self.p, self.k, self.num_batches = np.asarray(labels), p, k, num_batches

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        for _ in range(self.num_batches):
            speakers = np.random.choice(np.unique(self.labels), self.p, replace=False)
            batch = [np.random.choice(np.flatnonzero(self.labels == s), self.k, replace=False) for s in speakers]
            yield np.concatenate(batch).tolist()


class Model(L.LightningModule):
    def __init__(self, dim: int = 16, hidden: int = 24, lr: float = 5e-3):
        super().__init__()
        self.save_hyperparameters()
        self.lstm = nn.LSTM(12, hidden, num_layers=2, batch_first=True, dropout=0.1)
        self.proj = nn.Linear(hidden, dim)
        self.w, self.b = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, x):
        _, (hidden, _) = self.lstm(x)
        return F.normalize(self.proj(hidden[-1]), dim=-1)

    def ge2e(self, embeddings, speakers):
        names, index = torch.unique(speakers, return_inverse=True)
        member = F.one_hot(index, len(names)).float()  # (N, P)
        centroids = F.normalize((member.T @ embeddings) / member.sum(0).unsqueeze(1), dim=-1)
        return F.cross_entropy(self.w * embeddings @ centroids.T + self.b, index)

    def training_step(self, batch, batch_idx):
        x, speakers = batch
        embeddings = self(x)
        embeddings, speakers = labtrain.gather(embeddings), labtrain.gather(speakers)  # labtrain:
        loss = self.ge2e(embeddings, speakers)
        self.log("train_loss", loss, batch_size=len(x))
        return loss

    def on_after_backward(self):
        self.w.grad *= 0.5  # a lower rate for the scale
        self.b.grad *= 0.5

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CyclicLR(
            optimizer, base_lr=1e-3, max_lr=self.hparams.lr, step_size_up=2)}  # fmt: skip


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 24):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.voices = Voices()

    def train_dataloader(self):
        k = 4
        sampler = PKSampler(self.voices.speaker, p=self.batch_size // k, k=k, num_batches=8)
        return DataLoader(self.voices, batch_sampler=sampler)
