"""A DDPM with its schedule in buffers, trained with Lightning's EMAWeightAveraging callback; it samples at the end of a validation."""

import math

import lightning as L
import torch
from sklearn.datasets import make_swiss_roll
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TRAINER = {"gradient_clip_val": 1.0, "check_val_every_n_epoch": 1}
CALLBACKS = {
    "ema": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.9, "update_every_n_steps": 1}
}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=32):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        x, _ = make_swiss_roll(230, noise=0.3, random_state=1)
        x = torch.from_numpy(x[:, [0, 2]]).float() / 10
        self.train, self.val = TensorDataset(x[:171]), TensorDataset(x[171:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=False)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class SinusoidalPositionEmbeddings(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, time):
        half_dim = self.dim // 2
        embeddings = math.log(10000) / (half_dim - 1)
        embeddings = torch.exp(torch.arange(half_dim, device=time.device) * -embeddings)
        embeddings = time[:, None] * embeddings[None, :]
        return torch.cat((embeddings.sin(), embeddings.cos()), dim=-1)


class Model(L.LightningModule):
    def __init__(self, timesteps=50, dim=16):
        super().__init__()
        self.timesteps = timesteps
        self.time_mlp = nn.Sequential(SinusoidalPositionEmbeddings(dim), nn.Linear(dim, 32), nn.SiLU())
        self.net_in, self.net_out = (
            nn.Linear(2, 32),
            nn.Sequential(nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)),
        )
        betas = torch.linspace(1e-4, 0.05, timesteps)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.register_buffer("betas", betas)
        self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt(), persistent=False)

    def forward(self, x, t):
        return self.net_out(self.net_in(x) + self.time_mlp(t.float()))

    def q_sample(self, x, t, noise):
        return self.sqrt_alphas_cumprod[t, None] * x + self.sqrt_one_minus_alphas_cumprod[t, None] * noise

    def p_losses(self, x):
        t = torch.randint(0, self.timesteps, (x.shape[0],), device=self.device).long()
        noise = torch.randn_like(x)
        return F.smooth_l1_loss(self(self.q_sample(x, t, noise), t), noise)

    def training_step(self, batch, batch_idx):
        loss = self.p_losses(batch[0])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.p_losses(batch[0]))

    @torch.no_grad()
    def on_validation_epoch_end(self):
        x = torch.randn(16, 2, device=self.device)
        for i in reversed(range(self.timesteps)):
            t = torch.full((16,), i, device=self.device)
            beta, noise = self.betas[i], torch.randn_like(x) if i else 0
            mean = (x - beta * self(x, t) / self.sqrt_one_minus_alphas_cumprod[i]) / (1 - beta).sqrt()
            x = mean + beta.sqrt() * noise
        self.log("sample_std", x.std())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)
