"""Off-policy learning from a logged bandit: clipped importance weights, a WeightedRandomSampler, a regret computed by hand."""

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler


class LoggedBandit(Dataset):
    """Digits as contexts, labels as the best arms, and a logging policy that is right in a half of the cases."""

    def __init__(self, contexts, labels, seed=0):
        rng = np.random.RandomState(seed)
        self.contexts, self.labels = contexts.astype(np.float32) / 16, labels
        n = len(labels)
        right = rng.rand(n) < 0.5
        self.actions = np.where(right, labels, rng.randint(0, 10, n))
        self.propensities = np.where(self.actions == labels, 0.55, 0.05).astype(np.float32)
        self.rewards = (self.actions == labels).astype(np.float32)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.contexts[i], self.actions[i], self.rewards[i], self.propensities[i], self.labels[i]


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        x, y = load_digits(return_X_y=True)
        if stage in ("fit", None):
            self.train, self.val = LoggedBandit(x[:300], y[:300]), LoggedBandit(x[300:351], y[300:351], seed=1)

    def train_dataloader(self):
        weights = np.where(self.train.rewards > 0, 2.0, 1.0)
        sampler = WeightedRandomSampler(weights, num_samples=105, replacement=True)
        return DataLoader(self.train, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, hidden=32, clip=5.0, lr=5e-3):
        super().__init__()
        self.save_hyperparameters()
        self.policy = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 10))

    def forward(self, x):
        return torch.distributions.Categorical(logits=self.policy(x))

    def training_step(self, batch, batch_idx):
        context, action, reward, propensity, _ = batch
        pi = self(context)
        ratio = (pi.log_prob(action).exp() / propensity).clamp(max=self.hparams.clip)
        loss = -(ratio * (reward - 0.3)).mean() - 0.01 * pi.entropy().mean()
        self.log("train/loss", loss)
        return {"loss": loss, "ratio": ratio.detach()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("train/max_ratio", outputs["ratio"].max(), reduce_fx="max")

    def on_validation_epoch_start(self):
        self.correct, self.seen = 0, 0

    def validation_step(self, batch, batch_idx):
        context, *_, label = batch
        self.correct += (self(context).probs.argmax(-1) == label).sum().item()
        self.seen += len(label)

    def on_validation_epoch_end(self):
        self.log("val/regret", 1 - self.correct / self.seen, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
