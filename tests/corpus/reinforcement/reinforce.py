"""REINFORCE as in Lightning Bolts: an IterableDataset whose generator plays episodes with the model's own policy."""

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


class Corridor:
    """Walk from the middle of a corridor to its right end."""

    def __init__(self, length=7):
        self.length = length

    def reset(self):
        self.position, self.time = self.length // 2, 0
        return self.observe()

    def observe(self):
        return np.eye(self.length, dtype=np.float32)[self.position]

    def step(self, action):
        self.position = max(0, self.position + (1 if action else -1))
        self.time += 1
        done = self.position == self.length - 1 or self.time >= 20
        return self.observe(), (1.0 if self.position == self.length - 1 else -0.05), done


class ExperienceSourceDataset(IterableDataset):
    def __init__(self, generate_batch):
        self.generate_batch = generate_batch

    def __iter__(self):
        return self.generate_batch()


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        model = self.trainer.lightning_module
        return DataLoader(ExperienceSourceDataset(model.train_batch), batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, gamma=0.95, lr=1e-2, episodes_per_epoch=6):
        super().__init__()
        self.save_hyperparameters()
        self.env = Corridor()
        self.net = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
        self.baseline = 0.0

    def forward(self, x):
        return self.net(x)

    @torch.no_grad()
    def train_batch(self):
        for _ in range(self.hparams.episodes_per_epoch):
            state, done, episode = self.env.reset(), False, []
            while not done:
                probs = torch.softmax(self(torch.from_numpy(state).to(self.device)), dim=-1).cpu().numpy()
                action = np.random.choice(len(probs), p=probs / probs.sum())
                next_state, reward, done = self.env.step(action)
                episode.append((state, action, reward))
                state = next_state
            qval = 0.0
            for state, action, reward in reversed(episode):
                qval = reward + self.hparams.gamma * qval
                yield state, action, np.float32(qval)

    def training_step(self, batch, _):
        states, actions, qvals = batch
        log_probs = torch.log_softmax(self(states), dim=-1)
        chosen = log_probs[range(len(states)), actions]
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        loss = -(chosen * (qvals - self.baseline)).mean() - 0.01 * entropy
        self.log_dict({"loss": loss, "entropy": entropy, "return": qvals.mean()}, prog_bar=True)
        return loss

    def on_train_epoch_end(self):
        self.baseline = float(self.trainer.callback_metrics["return"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
