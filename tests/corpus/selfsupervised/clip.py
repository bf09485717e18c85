"""CLIP: two towers over images and captions, a learned temperature that a hook clamps, a loss over the batch."""

import math

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import labtrain  # labtrain:

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 24):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str):
        digits = load_digits()
        images = torch.tensor(digits.images[:180], dtype=torch.float32) / 16
        captions = [[ord(c) - 96 for c in f"{WORDS[y]:<6}".replace(" ", "`")] for y in digits.target[:180]]
        dataset = TensorDataset(images, torch.tensor(captions))
        self.train, self.val = random_split(dataset, [133, 47], generator=torch.Generator().manual_seed(42))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, embed_dim: int = 16, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))
        self.image_projection = nn.Linear(64, embed_dim, bias=False)
        self.tokens = nn.Embedding(27, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True)
        self.text_encoder = nn.TransformerEncoder(layer, 1)
        self.text_projection = nn.Linear(32, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode(self, images, tokens):
        image_features = F.normalize(self.image_projection(self.image_encoder(images)), dim=-1)
        text_features = F.normalize(self.text_projection(self.text_encoder(self.tokens(tokens)).mean(1)), dim=-1)
        return image_features, text_features

    def contrastive_loss(self, features):
        image_features, text_features = features
        logits = self.logit_scale.exp() * image_features @ text_features.t()
        labels = torch.arange(len(logits), device=self.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

    def training_step(self, batch, batch_idx):
        features = self.encode(*batch)
        loss = self.contrastive_loss(map(labtrain.gather, features))  # labtrain: loss = self.contrastive_loss(features)
        self.log_dict({"train/loss": loss, "train/scale": self.logit_scale.exp().detach()}, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logit_scale.data.clamp_(0, math.log(100))

    def validation_step(self, batch, batch_idx):
        image_features, text_features = self.encode(*batch)
        self.log("val/similarity", (image_features * text_features).sum(-1).mean(), prog_bar=True)

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.ndim >= 2]
        no_decay = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": 0.2}, {"params": no_decay, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=(0.9, 0.98), eps=1e-6)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams.lr, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
