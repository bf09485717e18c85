"""A U-Net with synchronised BatchNorm and a Dice loss, on dicts, with accumulation and clipping."""

import lightning as L
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchmetrics
from torch.utils.data import DataLoader, Dataset

TRAINER = {"sync_batchnorm": True, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "precision": "32-true"}


class Shapes(Dataset):
    """Noisy images of rectangles, and their masks."""

    def __init__(self, n, seed):
        rng = np.random.RandomState(seed)
        self.images = rng.normal(0, 0.3, (n, 1, 16, 16)).astype(np.float32)
        self.masks = np.zeros((n, 16, 16), dtype=np.int64)
        for image, mask in zip(self.images, self.masks):
            top, left, height, width = rng.randint(2, 8, 4)
            mask[top : top + height, left : left + width] = 1
            image[0] += mask

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, mask = self.images[i], self.masks[i]
        if np.random.rand() > 0.5:
            image, mask = image[..., ::-1].copy(), mask[..., ::-1].copy()
        return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "name": f"{i:04d}.png"}


def double_conv(in_ch, out_ch):
    return nn.Sequential(
        nn.Conv2d(in_ch, out_ch, 3, padding=1), nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True),
        nn.Conv2d(out_ch, out_ch, 3, padding=1), nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True),
    )  # fmt: skip


class Model(L.LightningModule):
    def __init__(self, features: int = 8, num_classes: int = 2):
        super().__init__()
        self.down1, self.down2 = double_conv(1, features), double_conv(features, features * 2)
        self.up = nn.ConvTranspose2d(features * 2, features, kernel_size=2, stride=2)
        self.conv = double_conv(features * 2, features)
        self.out = nn.Conv2d(features, num_classes, kernel_size=1)
        self.iou = torchmetrics.JaccardIndex(task="multiclass", num_classes=num_classes)

    def forward(self, x):
        x1 = self.down1(x)
        x2 = self.down2(F.max_pool2d(x1, 2))
        return self.out(self.conv(torch.cat([x1, self.up(x2)], dim=1)))

    def training_step(self, batch, batch_idx):
        logits, mask = self(batch["image"]), batch["mask"]
        probs = logits.softmax(1)[:, 1]
        dice = 1 - (2 * (probs * mask).sum((1, 2)) + 1) / (probs.sum((1, 2)) + mask.sum((1, 2)) + 1)
        loss = F.cross_entropy(logits, mask) + dice.mean()
        self.log("train_loss", loss, batch_size=len(mask))
        return loss

    def validation_step(self, batch, batch_idx):
        self.iou(self(batch["image"]).argmax(1), batch["mask"])
        self.log("val_iou", self.iou, on_step=False, on_epoch=True, batch_size=len(batch["mask"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 12):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.train_set, self.val_set = Shapes(115, seed=0), Shapes(30, seed=1)

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.batch_size)
