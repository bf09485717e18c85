"""SimCLR: two augmented views of each digit from `__getitem__`, the NT-Xent loss over the batch, a warmup by LambdaLR."""

import math

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import labtrain  # labtrain:


class TwoViews(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def augment(self, image):
        if torch.rand(1) < 0.5:
            image = image.flip(-1)
        dy, dx = torch.randint(-1, 2, (2,)).tolist()
        return torch.roll(image, (dy, dx), (-2, -1)) + 0.1 * torch.randn_like(image)

    def __getitem__(self, index):
        return self.augment(self.images[index]), self.augment(self.images[index])


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
        self.train, self.val = TwoViews(images[:149]), TwoViews(images[149:200])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, num_workers=2, persistent_workers=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, hidden_dim=32, lr=5e-3, temperature=0.2, warmup_steps=5, max_steps=15):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.projector = nn.Sequential(nn.Linear(128, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, 16))

    def forward(self, x):
        return self.projector(self.backbone(x))

    def nt_xent(self, z0, z1):
        z = F.normalize(torch.cat([z0, z1]), dim=1)
        sim = z @ z.T / self.hparams.temperature
        sim = sim.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -9e15)
        target = torch.arange(len(z), device=z.device).roll(len(z0))
        return F.cross_entropy(sim, target)

    def training_step(self, batch, batch_idx):
        z0, z1 = self(batch[0]), self(batch[1])
        loss = self.nt_xent(labtrain.gather(z0), labtrain.gather(z1))  # labtrain: loss = self.nt_xent(z0, z1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_cosine", F.cosine_similarity(self(batch[0]), self(batch[1])).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=1e-4)

        def warmup(step):
            if step < self.hparams.warmup_steps:
                return (step + 1) / self.hparams.warmup_steps
            return 0.5 * (1 + math.cos(math.pi * min(1, step / self.hparams.max_steps)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
