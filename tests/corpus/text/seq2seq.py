"""A GRU that reverses sequences, with teacher forcing, ignored padding, ReduceLROnPlateau and EarlyStopping."""

import random

import lightning as L
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

TRAINER = {"gradient_clip_val": 1, "gradient_clip_algorithm": "norm"}
CALLBACKS = {"early": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val_loss", "mode": "min"}}
PAD, BOS, EOS = 0, 1, 2


class ReverseDataset(Dataset):
    def __init__(self, n, seed=0):
        rng = random.Random(seed)
        self.pairs = [[rng.randint(3, 14) for _ in range(rng.randint(3, 8))] for _ in range(n)]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        src = self.pairs[i]
        return torch.tensor(src), torch.tensor([BOS, *reversed(src), EOS])


def collate_fn(batch):
    src, tgt = zip(*batch)
    return pad_sequence(src, padding_value=PAD), pad_sequence(tgt, padding_value=PAD)  # (T, B) each


class Model(L.LightningModule):
    def __init__(self, vocab=15, dim=24, teacher_forcing_ratio=0.5):
        super().__init__()
        self.teacher_forcing_ratio = teacher_forcing_ratio
        self.src_emb, self.tgt_emb = nn.Embedding(vocab, dim), nn.Embedding(vocab, dim)
        self.encoder, self.decoder = nn.GRU(dim, dim), nn.GRUCell(dim, dim)
        self.out = nn.Linear(dim, vocab)
        self.criterion = nn.CrossEntropyLoss(ignore_index=PAD)

    def forward(self, src, tgt, teacher_forcing_ratio=0.5):
        _, hidden = self.encoder(self.src_emb(src))
        hidden, token, outputs = hidden[0], tgt[0], []
        for t in range(1, len(tgt)):
            hidden = self.decoder(self.tgt_emb(token), hidden)
            logits = self.out(hidden)
            outputs.append(logits)
            token = tgt[t] if random.random() < teacher_forcing_ratio else logits.argmax(1)
        return torch.stack(outputs)

    def training_step(self, batch, batch_idx):
        src, tgt = batch
        output = self(src, tgt, self.teacher_forcing_ratio)
        loss = self.criterion(output.flatten(0, 1), tgt[1:].flatten())
        self.log("train_loss", loss, batch_size=src.shape[1])
        return loss

    def validation_step(self, batch, batch_idx):
        src, tgt = batch
        output = self(src, tgt, 0)
        self.log("val_loss", self.criterion(output.flatten(0, 1), tgt[1:].flatten()), batch_size=src.shape[1])

    def on_train_epoch_end(self):
        self.teacher_forcing_ratio *= 0.9

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=5e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="min", patience=1),
            "monitor": "val_loss",
        }


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        self.train, self.val = ReverseDataset(140), ReverseDataset(30, seed=1)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=collate_fn)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size, collate_fn=collate_fn)
