"""An LSTM on packed sequences, with a batch sampler that buckets texts by length and a collate_fn that pads them."""

import random

import lightning as L
import torch
import torch.nn as nn
import torchmetrics
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler


class Reviews(Dataset):
    """Sequences of random words; positive if there are more good words than bad ones."""

    def __init__(self, size, seed):
        g = torch.Generator().manual_seed(seed)
        self.samples = []
        for _ in range(size):
            length = int(torch.randint(3, 20, (1,), generator=g))
            words = torch.randint(1, 40, (length,), generator=g)
            self.samples.append((words, float((words < 20).sum() > length / 2)))
        self.lengths = [len(words) for words, _ in self.samples]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


class BucketBatchSampler(Sampler):
    def __init__(self, lengths, batch_size):
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self):
        indices = list(range(len(self.lengths)))
        random.shuffle(indices)
        pool = self.batch_size * 4
        batches = []
        for i in range(0, len(indices), pool):
            bucket = sorted(indices[i : i + pool], key=lambda j: self.lengths[j])
            batches += [bucket[k : k + self.batch_size] for k in range(0, len(bucket), self.batch_size)]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self):
        return (len(self.lengths) + self.batch_size - 1) // self.batch_size


def collate(batch):
    texts, labels = zip(*batch)
    lengths = torch.tensor([len(t) for t in texts])
    return pad_sequence(texts, batch_first=True), lengths, torch.tensor(labels)


class Model(L.LightningModule):
    def __init__(self, vocab_size=40, embedding_dim=16, hidden_dim=24, dropout=0.3):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=0)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, num_layers=2, dropout=dropout, bidirectional=True,
                            batch_first=True)  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden_dim * 2, 1)
        self.loss_fn = nn.BCEWithLogitsLoss()
        self.train_acc, self.val_auroc = torchmetrics.Accuracy("binary"), torchmetrics.AUROC(task="binary")

    def forward(self, text, lengths):
        packed = pack_padded_sequence(self.embedding(text), lengths.cpu(), batch_first=True, enforce_sorted=False)
        output, (hidden, _) = self.lstm(packed)
        output, _ = pad_packed_sequence(output, batch_first=True)
        pooled = torch.cat([hidden[-2], hidden[-1]], dim=1)
        return self.fc(self.dropout(pooled)).squeeze(1)

    def training_step(self, batch, batch_idx):
        text, lengths, labels = batch
        logits = self(text, lengths)
        loss = self.loss_fn(logits, labels)
        self.train_acc(logits.sigmoid(), labels.int())
        self.log("train_loss", loss, batch_size=len(labels))
        self.log("train_acc", self.train_acc, on_step=True, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch, batch_idx):
        text, lengths, labels = batch
        logits = self(text, lengths)
        self.val_auroc.update(logits.sigmoid(), labels.int())
        self.log("val_auroc", self.val_auroc, batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size
        self.train, self.val = Reviews(150, seed=1), Reviews(40, seed=2)

    def train_dataloader(self):
        sampler = BucketBatchSampler(self.train.lengths, self.batch_size)
        return DataLoader(self.train, batch_sampler=sampler, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size, collate_fn=collate)
