"""WGAN-GP: a critic step each batch and a generator step each n-th, a gradient penalty, schedulers stepped by hand."""

import lightning as L
import torch
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, n=203, batch_size=16):
        super().__init__()
        self.n, self.batch_size = n, batch_size

    def setup(self, stage):
        x, _ = make_moons(self.n, noise=0.05, random_state=0)
        self.data = TensorDataset(torch.from_numpy(x).float())

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size, shuffle=True, num_workers=1)


def mlp(i, o, h=32):
    return nn.Sequential(nn.Linear(i, h), nn.LeakyReLU(0.2), nn.Linear(h, h), nn.LeakyReLU(0.2), nn.Linear(h, o))


class Model(L.LightningModule):
    def __init__(self, latent_dim=8, n_critic=5, lambda_gp=10, lr=1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.G, self.D = mlp(latent_dim, 2), mlp(2, 1)

    def forward(self, z):
        return self.G(z)

    def compute_gradient_penalty(self, real_samples, fake_samples):
        alpha = torch.rand(real_samples.size(0), 1, device=self.device)
        interpolates = (alpha * real_samples + (1 - alpha) * fake_samples).requires_grad_(True)
        d_interpolates = self.D(interpolates)
        gradients = torch.autograd.grad(
            outputs=d_interpolates,
            inputs=interpolates,
            grad_outputs=torch.ones_like(d_interpolates),
            create_graph=True,
            retain_graph=True,
            only_inputs=True,
        )[0]
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def training_step(self, batch, batch_idx):
        (real,) = batch
        opt_g, opt_d = self.optimizers()
        sch_g, sch_d = self.lr_schedulers()

        z = torch.randn(len(real), self.hparams.latent_dim, device=self.device)
        fake = self(z).detach()
        gp = self.compute_gradient_penalty(real.data, fake.data)
        d_loss = -self.D(real).mean() + self.D(fake).mean() + self.hparams.lambda_gp * gp
        opt_d.zero_grad()
        self.manual_backward(d_loss)
        self.clip_gradients(opt_d, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        opt_d.step()
        self.log("d_loss", d_loss, prog_bar=True)

        if batch_idx % self.hparams.n_critic == 0:
            z = torch.randn(len(real), self.hparams.latent_dim, device=self.device)
            g_loss = -self.D(self(z)).mean()
            opt_g.zero_grad()
            self.manual_backward(g_loss)
            opt_g.step()
            self.log("g_loss", g_loss, prog_bar=True)

        if self.trainer.is_last_batch:
            sch_g.step()
            sch_d.step()

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.G.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9))
        opt_d = torch.optim.Adam(self.D.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9))
        sch_g = torch.optim.lr_scheduler.ExponentialLR(opt_g, gamma=0.9)
        sch_d = torch.optim.lr_scheduler.ExponentialLR(opt_d, gamma=0.9)
        return [opt_g, opt_d], [sch_g, sch_d]
