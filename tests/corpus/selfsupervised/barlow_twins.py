"""Barlow Twins: a cross-correlation over the batch, synchronised BatchNorm, views made by the collate function."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import labtrain  # labtrain:

TRAINER = {"sync_batchnorm": True, "gradient_clip_val": 5.0}


class Digits(Dataset):
    def __init__(self, start, stop):
        data = load_digits()
        self.images, self.targets = data.images[start:stop].astype("float32") / 16, data.target[start:stop]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, idx):
        return torch.from_numpy(self.images[idx])[None], int(self.targets[idx])


class BarlowTwinsCollate:
    """Make two noisy, randomly erased views of each image."""

    def view(self, img):
        img = img + 0.1 * torch.randn_like(img)
        i, j = torch.randint(0, 6, (2,)).tolist()
        img[:, i : i + 2, j : j + 2] = 0
        return img

    def __call__(self, samples):
        images, targets = zip(*samples, strict=True)
        views = [torch.stack([self.view(i) for i in images]) for _ in range(2)]
        return views[0], views[1], torch.tensor(targets)


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(
            Digits(0, 157),
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=BarlowTwinsCollate(),
            num_workers=2,
        )

    def val_dataloader(self):
        return DataLoader(Digits(157, 200), batch_size=self.batch_size, collate_fn=BarlowTwinsCollate())


class BarlowTwinsLoss(nn.Module):
    def __init__(self, z_dim, lambda_coeff=5e-3):
        super().__init__()
        self.z_dim, self.lambda_coeff = z_dim, lambda_coeff

    def forward(self, z1, z2):
        z1_norm = (z1 - torch.mean(z1, dim=0)) / torch.std(z1, dim=0)
        z2_norm = (z2 - torch.mean(z2, dim=0)) / torch.std(z2, dim=0)
        cross_corr = torch.matmul(z1_norm.T, z2_norm) / z1.shape[0]
        on_diag = torch.diagonal(cross_corr).add_(-1).pow_(2).sum()
        off_diag = cross_corr.flatten()[:-1].view(self.z_dim - 1, self.z_dim + 1)[:, 1:].pow(2).sum()
        return on_diag + self.lambda_coeff * off_diag


class Model(L.LightningModule):
    def __init__(self, z_dim=16, learning_rate=1e-2):
        super().__init__()
        self.learning_rate = learning_rate
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.projection_head = nn.Sequential(
            nn.Flatten(), nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, z_dim)
        )
        self.loss_fn = BarlowTwinsLoss(z_dim)

    def forward(self, x):
        return self.projection_head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x1, x2, _ = batch
        z1, z2 = self(x1), self(x2)
        loss = self.loss_fn(labtrain.gather(z1), labtrain.gather(z2))  # labtrain: loss = self.loss_fn(z1, z2)
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch, batch_idx):
        x1, x2, _ = batch
        self.log("val_distance", (self(x1) - self(x2)).square().mean(), on_step=False, on_epoch=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)
        return [optimizer], [scheduler]
