"""PPO in manual optimization: several passes over each batch of rollouts, a clipped objective, a StepLR stepped by hand."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Rollouts(Dataset):
    """Trajectories of a fixed behaviour policy on a noisy integrator."""

    def __init__(self, n=157, horizon=6, gamma=0.95):
        g = torch.Generator().manual_seed(3)
        position, self.obs, self.act, reward = torch.randn(n, generator=g), [], [], []
        for _ in range(horizon):
            action = (torch.rand(n, generator=g) < 0.5).long()
            self.obs.append(torch.stack([position, position.abs()], 1))
            position = position + 0.4 * (2 * action - 1) + 0.1 * torch.randn(n, generator=g)
            self.act.append(action)
            reward.append(-position.abs())
        returns = [torch.zeros(n)]
        for r in reversed(reward):
            returns.insert(0, r + gamma * returns[0])
        self.obs, self.act, self.ret = torch.stack(self.obs, 1), torch.stack(self.act, 1), torch.stack(returns[:-1], 1)

    def __len__(self):
        return len(self.obs)

    def __getitem__(self, i):
        return {"obs": self.obs[i], "act": self.act[i], "ret": self.ret[i]}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        self.rollouts = Rollouts()

    def train_dataloader(self):
        return DataLoader(self.rollouts, batch_size=self.batch_size, shuffle=True, num_workers=2, prefetch_factor=2)


class Model(L.LightningModule):
    def __init__(self, lr=3e-3, clip_ratio=0.2, nb_optim_iters=3, ent_coef=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.actor = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def evaluate(self, obs, act):
        dist = torch.distributions.Categorical(logits=self.actor(obs))
        return dist.log_prob(act), dist.entropy(), self.critic(obs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        opt, sched = self.optimizers(), self.lr_schedulers()
        obs, act, ret = (batch[k].flatten(0, 1) for k in ("obs", "act", "ret"))
        with torch.no_grad():
            old_logp, _, values = self.evaluate(obs, act)
            adv = ret - values
        for _ in range(self.hparams.nb_optim_iters):
            logp, entropy, value = self.evaluate(obs, act)
            ratio = torch.exp(logp - old_logp)
            clipped = torch.clamp(ratio, 1 - self.hparams.clip_ratio, 1 + self.hparams.clip_ratio)
            policy_loss = -torch.min(ratio * adv, clipped * adv).mean()
            value_loss = (value - ret).pow(2).mean()
            loss = policy_loss + 0.5 * value_loss - self.hparams.ent_coef * entropy.mean()
            opt.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(opt, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            opt.step()
        self.log("loss_actor", policy_loss, prog_bar=True)
        self.log("loss_critic", value_loss)
        self.log("approx_kl", (old_logp - logp).mean())
        if self.trainer.is_last_batch and (self.current_epoch + 1) % 2 == 0:
            sched.step()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr, eps=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}
