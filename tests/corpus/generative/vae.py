"""A VAE whose KL weight grows by epoch, with losses in log_dict, samples kept for the epoch's end, EarlyStopping."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

TRAINER = {"accumulate_grad_batches": 2, "max_epochs": 4}
CALLBACKS = {
    "early_stopping": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val_loss", "patience": 3}
}


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
        full = TensorDataset(x)
        self.train, self.val = Subset(full, range(149)), Subset(full, range(149, 200))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, enc_out_dim=32, latent_dim=4, kl_coeff=0.1, lr=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, enc_out_dim), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(latent_dim, enc_out_dim), nn.ReLU(), nn.Linear(enc_out_dim, 64))
        self.fc_mu = nn.Linear(enc_out_dim, latent_dim)
        self.fc_var = nn.Linear(enc_out_dim, latent_dim)
        self.kl_weight = 0.0
        self.epoch_kl = []

    def sample(self, mu, log_var):
        std = torch.exp(log_var / 2)
        p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(std))
        q = torch.distributions.Normal(mu, std)
        return p, q, q.rsample()

    def step(self, batch, batch_idx):
        (x,) = batch
        h = self.encoder(x)
        p, q, z = self.sample(self.fc_mu(h), self.fc_var(h))
        recon_loss = F.mse_loss(self.decoder(z), x, reduction="mean")
        kl = torch.distributions.kl_divergence(q, p).mean()
        loss = kl * self.kl_weight + recon_loss
        return loss, {"recon_loss": recon_loss, "kl": kl, "loss": loss}

    def on_train_epoch_start(self):
        self.kl_weight = self.hparams.kl_coeff * min(1.0, (self.current_epoch + 1) / 3)

    def training_step(self, batch, batch_idx):
        loss, logs = self.step(batch, batch_idx)
        self.epoch_kl.append(logs["kl"].detach())
        self.log_dict({f"train_{k}": v for k, v in logs.items()}, on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_end(self):
        self.print("mean KL", torch.stack(self.epoch_kl).mean().item())
        self.epoch_kl.clear()

    def validation_step(self, batch, batch_idx):
        loss, logs = self.step(batch, batch_idx)
        self.log_dict({f"val_{k}": v for k, v in logs.items()})
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
