"""Texts from an IterableDataset with a shuffle buffer, split among workers, without a length or a state."""

import random

import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

TRAINER = {"limit_val_batches": 2}


class Stream(IterableDataset):
    """Read documents one after the other, tokenize, pack into blocks."""

    def __init__(self, documents=60, block=12, buffer=16, shuffle=True):
        self.documents, self.block, self.buffer, self.shuffle = documents, block, buffer, shuffle

    def read(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        tokens = []
        for number in range(first, self.documents, step):
            rng = random.Random(number)
            word = rng.randrange(32)
            for _ in range(rng.randint(20, 50)):
                word = (word * 5 + rng.choice([1, 2, 3])) % 32
                tokens.append(word)
            while len(tokens) > self.block:
                yield torch.tensor(tokens[: self.block + 1])
                tokens = tokens[self.block :]

    def __iter__(self):
        if not self.shuffle:
            yield from self.read()
            return
        buffer = []
        for sample in self.read():
            if len(buffer) < self.buffer:
                buffer.append(sample)
                continue
            i = random.randrange(self.buffer)
            yield buffer[i]
            buffer[i] = sample
        random.shuffle(buffer)
        yield from buffer


class Model(L.LightningModule):
    def __init__(self, dim=24):
        super().__init__()
        self.emb = nn.Embedding(32, dim)
        self.rnn = nn.LSTM(dim, dim, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(dim, 32)

    def forward(self, x):
        out, _ = self.rnn(self.emb(x))
        return self.fc(self.drop(out))

    def training_step(self, batch, batch_idx):
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, 32), batch[:, 1:].reshape(-1))
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[:, :-1]).reshape(-1, 32), batch[:, 1:].reshape(-1)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16, num_workers=2):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self):
        return DataLoader(Stream(), batch_size=self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self):
        return DataLoader(Stream(documents=12, shuffle=False), batch_size=self.batch_size)
