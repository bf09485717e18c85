"""A supervised contrastive loss over the batch and a cross entropy, by two optimizers' groups, with class-balanced sampling."""

import lightning as L
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import labtrain  # labtrain:

TRAINER = {"precision": "bf16-mixed"}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size
        x, y = load_digits(n_class=4, return_X_y=True)
        x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
        self.train, self.val = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:360], y[300:360])

    def train_dataloader(self):
        targets = self.train.tensors[1]
        class_weights = 1.0 / torch.bincount(targets).float()
        sampler = WeightedRandomSampler(class_weights[targets], 151)
        return DataLoader(self.train, self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.val, self.batch_size)


def supcon_loss(features, labels, temperature=0.1):
    """Khosla et al.; features: (B, views, D)."""
    labels = labels.contiguous().view(-1, 1)
    mask = torch.eq(labels, labels.T).float()
    views = features.shape[1]
    contrast = torch.cat(torch.unbind(features, dim=1), dim=0)
    logits = contrast @ contrast.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True)[0].detach()
    mask = mask.repeat(views, views)
    logits_mask = 1 - torch.eye(len(mask), device=mask.device)
    mask = mask * logits_mask
    log_prob = logits - torch.log((torch.exp(logits) * logits_mask).sum(1, keepdim=True))
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.projection, self.classifier = nn.Linear(32, 16), nn.Linear(32, 4)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=4)

    def forward(self, x):
        return self.classifier(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = [self.encoder(x + 0.1 * torch.randn_like(x)) for _ in range(2)]
        features = F.normalize(torch.stack([self.projection(h) for h in hidden], 1), dim=-1)
        con = supcon_loss(labtrain.gather(features), labtrain.gather(y))  # labtrain: con = supcon_loss(features, y)
        ce = F.cross_entropy(self.classifier(hidden[0]), y)
        self.log("con", con, on_epoch=True)
        self.log("ce", ce, on_epoch=True)
        return con + ce

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self(x), y)
        self.log("acc", self.accuracy, on_epoch=True)

    def configure_optimizers(self):
        opt = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        return [opt], [torch.optim.lr_scheduler.PolynomialLR(opt, total_iters=3)]
