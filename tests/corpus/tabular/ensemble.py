"""A deep ensemble in manual optimization: an optimizer and a scheduler for each member, gradients accumulated by hand."""

import lightning as L
import torch
import torch.nn as nn
from sklearn.datasets import make_friedman1
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler


class Frame(Dataset):
    """Takes a list of indices, and returns a whole batch at once."""

    def __init__(self, n, seed):
        x, y = make_friedman1(n, noise=0.5, random_state=seed)
        self.x, self.y = torch.tensor(x, dtype=torch.float32), torch.tensor((y - 14) / 5, dtype=torch.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, indices):
        return self.x[indices], self.y[indices]


class Model(L.LightningModule):
    def __init__(self, members: int = 3, hidden: int = 24, accumulate: int = 2):
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(10, hidden), nn.SiLU(), nn.Dropout(0.05), nn.Linear(hidden, 2))
            for _ in range(members)
        )

    def forward(self, x):
        return torch.stack([member(x) for member in self.members])  # (M, B, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for i, (member, optimizer) in enumerate(zip(self.members, self.optimizers())):
            mean, log_var = member(x).unbind(-1)
            loss = nn.functional.gaussian_nll_loss(mean, y, log_var.exp())
            self.manual_backward(loss / self.accumulate)
            if (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch:
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
            self.log(f"train_nll/{i}", loss)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        predictions = self(x)[..., 0]
        self.log_dict({"val_mse": (predictions.mean(0) - y).pow(2).mean(), "val_spread": predictions.std(0).mean()})

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(member.parameters(), lr=1e-2) for member in self.members]
        schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.3) for optimizer in optimizers]
        return optimizers, schedulers


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        self.train, self.val = Frame(215, 0), Frame(60, 1)

    def train_dataloader(self):
        sampler = BatchSampler(RandomSampler(self.train), batch_size=self.batch_size, drop_last=False)
        return DataLoader(self.train, sampler=sampler, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.val, sampler=BatchSampler(range(len(self.val)), self.batch_size, False), batch_size=None)
