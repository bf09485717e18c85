"""Advantage actor-critic with two optimizers by hand; on_train_epoch_start plays new episodes into the dataset."""

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class GridWorld:
    def __init__(self, n=8, size=4):
        self.n, self.size = n, size

    def reset(self):
        self.pos = np.random.randint(0, self.size, (self.n, 2))
        return self.pos.astype(np.float32) / self.size

    def step(self, actions):
        moves = np.array([[0, 1], [0, -1], [1, 0], [-1, 0]])[actions]
        self.pos = np.clip(self.pos + moves, 0, self.size - 1)
        at_goal = (self.pos == self.size - 1).all(1)
        self.pos[at_goal] = np.random.randint(0, self.size - 1, (at_goal.sum(), 2))
        return self.pos.astype(np.float32) / self.size, np.where(at_goal, 1.0, -0.05).astype(np.float32)


class Data(L.LightningDataModule):
    def __init__(self, horizon=10, n_envs=8, batch_size=16):
        super().__init__()
        self.batch_size = batch_size
        n = horizon * n_envs
        self.rollout = TensorDataset(torch.zeros(n, 2), torch.zeros(n, dtype=torch.long), torch.zeros(n))

    def train_dataloader(self):
        return DataLoader(self.rollout, batch_size=self.batch_size, shuffle=True)


class Model(L.LightningModule):
    def __init__(self, horizon=10, gamma=0.9, entropy_coef=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.actor = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        self.env = GridWorld()

    @torch.no_grad()
    def on_train_epoch_start(self):
        obs, states, actions, rewards = self.env.reset(), [], [], []
        for _ in range(self.hparams.horizon):
            state = torch.from_numpy(obs).to(self.device)
            action = torch.distributions.Categorical(logits=self.actor(state)).sample()
            obs, reward = self.env.step(action.cpu().numpy())
            states.append(state)
            actions.append(action)
            rewards.append(torch.from_numpy(reward))
        returns, running = [], self.critic(torch.from_numpy(obs).to(self.device)).squeeze(-1)
        for reward in reversed(rewards):
            running = reward + self.hparams.gamma * running
            returns.insert(0, running)
        rollout = self.trainer.datamodule.rollout
        for tensor, new in zip(rollout.tensors, (states, actions, returns), strict=True):
            tensor.copy_(torch.cat(new))
        self.log("mean_reward", torch.cat(rewards).mean(), prog_bar=True)

    def training_step(self, batch, batch_idx):
        states, actions, returns = batch
        opt_actor, opt_critic = self.optimizers()
        values = self.critic(states).squeeze(-1)
        critic_loss = nn.functional.smooth_l1_loss(values, returns)
        opt_critic.zero_grad()
        self.manual_backward(critic_loss)
        opt_critic.step()

        dist = torch.distributions.Categorical(logits=self.actor(states))
        advantage = (returns - values).detach()
        actor_loss = -(dist.log_prob(actions) * advantage).mean() - self.hparams.entropy_coef * dist.entropy().mean()
        opt_actor.zero_grad()
        self.manual_backward(actor_loss)
        nn.utils.clip_grad_norm_(self.actor.parameters(), 0.5)
        opt_actor.step()
        self.log_dict({"actor_loss": actor_loss, "critic_loss": critic_loss}, on_step=True, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.actor.parameters(), lr=3e-3), torch.optim.RMSprop(
            self.critic.parameters(), lr=5e-3
        )
