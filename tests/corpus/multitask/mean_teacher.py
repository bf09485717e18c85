"""A semi-supervised mean teacher: torch's AveragedModel as teacher, a list of loaders, SubsetRandomSampler for the labelled part."""

import lightning as L
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size=8):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        digits = load_digits()
        x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        self.train, self.val = TensorDataset(x[:170], y[:170]), TensorDataset(x[170:220], y[170:220])

    def train_dataloader(self):
        labelled = DataLoader(self.train, batch_size=self.batch_size, sampler=SubsetRandomSampler(range(37)))
        unlabelled = DataLoader(self.train, batch_size=3 * self.batch_size, sampler=SubsetRandomSampler(range(37, 170)))
        return [labelled, unlabelled]

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, lr=5e-3, ema_decay=0.95, consistency=2.0, ramp_up=10):
        super().__init__()
        self.save_hyperparameters()
        self.student = nn.Sequential(
            nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10)
        )
        self.teacher = AveragedModel(self.student, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
        self.acc = torchmetrics.Accuracy(task="multiclass", num_classes=10)

    def on_train_start(self):
        self.teacher.eval()

    def on_before_zero_grad(self, optimizer):
        self.teacher.update_parameters(self.student)

    def training_step(self, batch, batch_idx):
        (x, y), (u, _) = batch
        inputs = torch.cat([x, u])
        logits = self.student(inputs + 0.1 * torch.randn_like(inputs))
        with torch.no_grad():
            targets = self.teacher(inputs + 0.1 * torch.randn_like(inputs)).softmax(-1)
        sup = F.cross_entropy(logits[: len(x)], y)
        cons = F.mse_loss(logits.softmax(-1), targets)
        weight = self.hparams.consistency * min(1.0, self.global_step / self.hparams.ramp_up)
        loss = sup + weight * cons
        self.log("train_sup", sup, batch_size=len(x))
        self.log("train_cons", cons, batch_size=len(inputs))
        self.log("weight", weight, batch_size=len(x))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.acc(self.teacher(x), y)
        self.log("val_acc_teacher", self.acc, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=self.hparams.lr)
