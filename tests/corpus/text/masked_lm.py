"""A masked language model: a collator object draws the masks, gradients are accumulated, configure_model makes layers."""

from dataclasses import dataclass

import lightning as L
import torch
import torch.nn as nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchmetrics.text import Perplexity

TRAINER = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
PAD, MASK, VOCAB = 0, 1, 30


class Corpus(Dataset):
    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        start = torch.randint(2, VOCAB, (n, 1), generator=g)
        self.input_ids = 2 + (start + 3 * torch.arange(12)) % (VOCAB - 2)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return {"input_ids": self.input_ids[i], "attention_mask": torch.ones(12, dtype=torch.long)}


@dataclass
class DataCollatorForLanguageModeling:
    mlm_probability: float = 0.15

    def __call__(self, examples):
        batch = torch.utils.data.default_collate(examples)
        labels = batch["input_ids"].clone()
        masked = torch.bernoulli(torch.full(labels.shape, self.mlm_probability)).bool()
        masked[:, 0] = True  # at least one
        labels[~masked] = -100
        replaced = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & masked
        batch["input_ids"][replaced] = MASK
        batch["labels"] = labels
        return batch


class Model(L.LightningModule):
    def __init__(self, d_model: int = 32, nhead: int = 4, num_layers: int = 2, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = None
        self.perplexity = Perplexity(ignore_index=-100)

    def configure_model(self):
        if self.encoder is not None:
            return
        d = self.hparams.d_model
        self.embedding, self.position = nn.Embedding(VOCAB, d, padding_idx=PAD), nn.Parameter(torch.zeros(1, 12, d))
        layer = nn.TransformerEncoderLayer(d, self.hparams.nhead, 4 * d, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, self.hparams.num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, VOCAB)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids) + self.position
        return self.head(self.encoder(x, src_key_padding_mask=attention_mask == 0))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100)
        self.log("loss/train", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        self.perplexity(logits, batch["labels"])
        self.log("ppl/val", self.perplexity)

    def configure_optimizers(self):
        no_decay = ["bias", "norm"]
        named = list(self.named_parameters())
        groups = [
            {"params": [p for n, p in named if not any(nd in n for nd in no_decay)], "weight_decay": 0.01},
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.hparams.lr, eps=1e-8)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, num_workers: int = 1):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage=None):
        self.train, self.val = ConcatDataset([Corpus(80, 0), Corpus(57, 1)]), Corpus(30, 2)

    def _loader(self, dataset, shuffle):
        collator = DataCollatorForLanguageModeling()
        return DataLoader(dataset, self.batch_size, shuffle, collate_fn=collator, num_workers=self.num_workers)

    def train_dataloader(self):
        return self._loader(self.train, True)

    def val_dataloader(self):
        return self._loader(self.val, False)
