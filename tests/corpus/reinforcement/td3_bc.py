"""TD3+BC offline: twin critics, a delayed actor, soft target updates inside training_step, a RandomSampler with replacement."""

import copy

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32, n=500):
        super().__init__()
        self.batch_size, self.n = batch_size, n

    def setup(self, stage=None):
        g = torch.Generator().manual_seed(0)
        state = torch.randn(self.n, 3, generator=g)
        action = torch.rand(self.n, 1, generator=g) * 2 - 1
        next_state = 0.9 * state + 0.3 * action + 0.05 * torch.randn(self.n, 3, generator=g)
        reward = -next_state.pow(2).sum(1, keepdim=True)
        not_done = (torch.rand(self.n, 1, generator=g) > 0.05).float()
        mean, std = state.mean(0, keepdim=True), state.std(0, keepdim=True) + 1e-3
        self.buffer = TensorDataset((state - mean) / std, action, (next_state - mean) / std, reward, not_done)

    def train_dataloader(self):
        sampler = RandomSampler(self.buffer, replacement=True, num_samples=181)
        return DataLoader(self.buffer, batch_size=self.batch_size, sampler=sampler)


def mlp(i, o):
    return nn.Sequential(nn.Linear(i, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, o))


class Model(L.LightningModule):
    def __init__(self, discount=0.9, tau=0.05, policy_noise=0.2, noise_clip=0.5, policy_freq=2, alpha=2.5):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.actor = nn.Sequential(mlp(3, 1), nn.Tanh())
        self.q1, self.q2 = mlp(4, 1), mlp(4, 1)
        self.actor_target, self.q1_target, self.q2_target = (copy.deepcopy(m) for m in (self.actor, self.q1, self.q2))
        self.total_it = 0

    def training_step(self, batch, batch_idx):
        self.total_it += 1
        state, action, next_state, reward, not_done = batch
        actor_optimizer, critic_optimizer = self.optimizers()
        with torch.no_grad():
            noise = (torch.randn_like(action) * self.hparams.policy_noise).clamp(
                -self.hparams.noise_clip, self.hparams.noise_clip
            )
            next_action = (self.actor_target(next_state) + noise).clamp(-1, 1)
            sa = torch.cat([next_state, next_action], 1)
            target_q = torch.min(self.q1_target(sa), self.q2_target(sa))
            target_q = reward + not_done * self.hparams.discount * target_q
        sa = torch.cat([state, action], 1)
        critic_loss = F.mse_loss(self.q1(sa), target_q) + F.mse_loss(self.q2(sa), target_q)
        critic_optimizer.zero_grad()
        self.manual_backward(critic_loss)
        critic_optimizer.step()
        self.log("critic_loss", critic_loss, prog_bar=True)

        if self.total_it % self.hparams.policy_freq == 0:
            pi = self.actor(state)
            q = self.q1(torch.cat([state, pi], 1))
            lmbda = self.hparams.alpha / q.abs().mean().detach()
            actor_loss = -lmbda * q.mean() + F.mse_loss(pi, action)
            actor_optimizer.zero_grad()
            self.manual_backward(actor_loss)
            actor_optimizer.step()
            self.log("actor_loss", actor_loss, prog_bar=True)
            tau = self.hparams.tau
            for net, target in ((self.actor, self.actor_target), (self.q1, self.q1_target), (self.q2, self.q2_target)):
                for param, target_param in zip(net.parameters(), target.parameters(), strict=True):
                    target_param.data.copy_(tau * param.data + (1 - tau) * target_param.data)

    def configure_optimizers(self):
        actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        critic_optimizer = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], lr=3e-4)
        return actor_optimizer, critic_optimizer
