"""DQN as in Lightning's tutorial: each training_step plays a step and appends to the replay buffer that the stream samples."""

from collections import deque, namedtuple

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

Experience = namedtuple("Experience", field_names=["state", "action", "reward", "done", "new_state"])


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


class ReplayBuffer:
    def __init__(self, capacity):
        self.buffer = deque(maxlen=capacity)

    def append(self, experience):
        self.buffer.append(experience)

    def sample(self, batch_size):
        indices = np.random.choice(len(self.buffer), batch_size, replace=False)
        states, actions, rewards, dones, next_states = zip(*(self.buffer[idx] for idx in indices), strict=True)
        rewards = np.array(rewards, dtype=np.float32)
        return np.array(states), np.array(actions), rewards, np.array(dones, dtype=bool), np.array(next_states)


class RLDataset(IterableDataset):
    def __init__(self, buffer, sample_size=60):
        self.buffer, self.sample_size = buffer, sample_size

    def __iter__(self):
        states, actions, rewards, dones, new_states = self.buffer.sample(self.sample_size)
        for i in range(len(dones)):
            yield states[i], actions[i], rewards[i], dones[i], new_states[i]


class Agent:
    def __init__(self, env, replay_buffer):
        self.env, self.replay_buffer = env, replay_buffer
        self.reset()

    def reset(self):
        self.state = self.env.reset()

    @torch.no_grad()
    def play_step(self, net, epsilon=0.0, device="cpu"):
        if np.random.random() < epsilon:
            action = np.random.randint(2)
        else:
            action = int(torch.argmax(net(torch.tensor(self.state, device=device))))
        new_state, reward, done = self.env.step(action)
        self.replay_buffer.append(Experience(self.state, action, reward, done, new_state))
        self.state = new_state
        if done:
            self.reset()
        return reward, done


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(dataset=RLDataset(self.trainer.lightning_module.buffer), batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, lr=1e-2, gamma=0.95, sync_rate=5, replay_size=500, warm_start_steps=100):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
        self.target_net = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
        self.buffer = ReplayBuffer(replay_size)
        self.agent = Agent(Corridor(), self.buffer)
        self.total_reward, self.episode_reward = 0, 0
        for _ in range(warm_start_steps):
            self.agent.play_step(self.net, epsilon=1.0)

    def dqn_mse_loss(self, batch):
        states, actions, rewards, dones, next_states = batch
        state_action_values = self.net(states).gather(1, actions.long().unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            next_state_values = self.target_net(next_states).max(1)[0]
            next_state_values[dones] = 0.0
        return nn.MSELoss()(state_action_values, next_state_values.detach() * self.hparams.gamma + rewards)

    def training_step(self, batch, nb_batch):
        epsilon = max(0.05, 1.0 - self.global_step / 20)
        self.log("epsilon", epsilon)
        reward, done = self.agent.play_step(self.net, epsilon, self.device)
        self.episode_reward += reward
        loss = self.dqn_mse_loss(batch)
        if done:
            self.total_reward = self.episode_reward
            self.episode_reward = 0
        if self.global_step % self.hparams.sync_rate == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        self.log_dict({"loss": loss, "reward": reward, "total_reward": self.total_reward})
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr)
