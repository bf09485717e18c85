"""Speech-like recognition by CTC: utterances of many lengths are padded, and NoamLR-like warmup by SequentialLR."""

import lightning as L
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchmetrics.text import CharErrorRate

TRAINER = {"gradient_clip_val": 5.0}
ALPHABET = "_abcdefg"


class Utterances(Dataset):
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.items = []
        table = torch.randn(len(ALPHABET), 12, generator=torch.Generator().manual_seed(7))
        for _ in range(n):
            target = torch.randint(1, len(ALPHABET), (int(torch.randint(2, 6, (1,), generator=g)),), generator=g)
            frames = table[target].repeat_interleave(int(torch.randint(4, 7, (1,), generator=g)), dim=0)
            self.items.append((frames + 0.3 * torch.randn(frames.shape, generator=g), target))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, idx):
        return self.items[idx]


def collate_fn(items):
    features, targets = zip(*items)
    return {
        "features": pad_sequence(features, batch_first=True),
        "feature_lengths": torch.tensor([len(f) for f in features]),
        "targets": torch.cat(targets),
        "target_lengths": torch.tensor([len(t) for t in targets]),
    }


class Model(L.LightningModule):
    def __init__(self, n_mels: int = 12, hidden: int = 24, n_class: int = len(ALPHABET)):
        super().__init__()
        self.conv = nn.Conv1d(n_mels, hidden, 3, padding=1)
        self.rnn = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.classifier = nn.Sequential(nn.LayerNorm(2 * hidden), nn.Dropout(0.1), nn.Linear(2 * hidden, n_class))
        self.criterion = nn.CTCLoss(blank=0, zero_infinity=True)
        self.cer = CharErrorRate()

    def forward(self, features):
        x = torch.relu(self.conv(features.transpose(1, 2))).transpose(1, 2)
        x, _ = self.rnn(x)
        return self.classifier(x).log_softmax(dim=-1)  # (B, T, C)

    def loss(self, log_probs, batch):
        return self.criterion(
            log_probs.transpose(0, 1), batch["targets"], batch["feature_lengths"], batch["target_lengths"]
        )

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch["features"]), batch)
        self.log("train_loss", loss, batch_size=len(batch["feature_lengths"]), prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        log_probs = self(batch["features"])
        predicted = []
        for path, length in zip(log_probs.argmax(-1), batch["feature_lengths"]):
            path = torch.unique_consecutive(path[:length])
            predicted.append("".join(ALPHABET[i] for i in path if i != 0))
        truth = ["".join(ALPHABET[i] for i in t) for t in batch["targets"].split(batch["target_lengths"].tolist())]
        self.cer.update(predicted, truth)
        self.log("val_cer", self.cer, on_step=False, on_epoch=True, batch_size=len(truth))
        self.log("val_loss", self.loss(log_probs, batch), batch_size=len(truth))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=6)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[6])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.train_set, self.val_set = Utterances(135, 0), Utterances(30, 1)

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, shuffle=True, collate_fn=collate_fn)

    def val_dataloader(self):
        return DataLoader(self.val_set, self.batch_size, collate_fn=collate_fn)
