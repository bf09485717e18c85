"""Two heads on a backbone that is frozen at first (BackboneFinetuning); the task of the second head starts in a later epoch."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

CALLBACKS = {
    "finetuning": {
        "_target_": "lightning.pytorch.callbacks.BackboneFinetuning",
        "unfreeze_backbone_at_epoch": 1,
        "backbone_initial_ratio_lr": 0.1,
        "train_bn": False,
    },
}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        x, y = load_digits(return_X_y=True)
        x, y = torch.from_numpy(x).float() / 16, torch.from_numpy(y)
        self.train, self.val = TensorDataset(x[:147], y[:147]), TensorDataset(x[147:200], y[147:200])

    def train_dataloader(self):
        sampler = BatchSampler(RandomSampler(self.train), self.batch_size, drop_last=False)
        return DataLoader(self.train, sampler=sampler, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU())
        self.digit, self.parity = nn.Linear(48, 10), nn.Linear(48, 1)

    def forward(self, x):
        h = self.backbone(x)
        return self.digit(h), self.parity(h).squeeze(1)

    def on_train_epoch_start(self):
        for p in self.parity.parameters():
            p.requires_grad = self.current_epoch >= 1

    def losses(self, batch):
        x, y = batch
        digit, parity = self(x)
        return F.cross_entropy(digit, y), F.binary_cross_entropy_with_logits(parity, (y % 2).float())

    def training_step(self, batch, batch_idx):
        digit, parity = self.losses(batch)
        self.log("train_digit", digit)
        self.log("train_parity", parity)
        return digit + parity if self.current_epoch >= 1 else digit

    def validation_step(self, batch, batch_idx):
        digit, parity = self.losses(batch)
        self.log("val_loss", digit + parity, prog_bar=True)

    def configure_optimizers(self):
        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(params, lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]
