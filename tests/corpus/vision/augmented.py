"""A Dataset that augments in __getitem__, loaded by persistent workers, with label smoothing and OneCycleLR."""

import random

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Digits(Dataset):
    def __init__(self, train=True):
        digits = load_digits()
        part = slice(0, 210) if train else slice(210, 280)
        self.images, self.labels = digits.images[part].astype(np.float32) / 16, digits.target[part]
        self.train = train

    def __len__(self):
        return len(self.images)

    def __getitem__(self, idx):
        img = self.images[idx]
        if self.train:
            if random.random() < 0.5:
                img = np.roll(img, random.choice([-1, 1]), axis=1)
            img = img + np.random.normal(0, 0.05, img.shape).astype(np.float32)
            if torch.rand(1).item() < 0.3:
                top, left = np.random.randint(0, 6, 2)
                img = img.copy()
                img[top : top + 2, left : left + 2] = 0
        return torch.from_numpy(np.ascontiguousarray(img)).unsqueeze(0), int(self.labels[idx])


class Model(L.LightningModule):
    def __init__(self, max_lr=0.05, smoothing=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.fc = nn.Linear(16 * 16, 10)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.norm(self.conv2(x)))
        return self.fc(x.flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = self.criterion(y_hat, y)
        acc = (y_hat.argmax(dim=1) == y).float().mean()
        self.log_dict({"train/loss": loss, "train/acc": acc}, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.max_lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16, num_workers=2):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(
            Digits(), batch_size=self.hparams.batch_size, shuffle=True, num_workers=self.hparams.num_workers,
            persistent_workers=True, pin_memory=True,
        )  # fmt: skip

    def val_dataloader(self):
        return DataLoader(Digits(train=False), batch_size=self.hparams.batch_size, num_workers=1)
