"""A CycleGAN between two unpaired sets in a CombinedLoader, with three networks' losses and a pool of generated images."""

import itertools
import random

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        x = torch.tensor(load_digits().data[:200], dtype=torch.float32) / 8 - 1
        self.a, self.b = TensorDataset(x[:93]), TensorDataset(-x[93:170])

    def train_dataloader(self):
        loaders = {
            "A": DataLoader(self.a, batch_size=self.batch_size, shuffle=True),
            "B": DataLoader(self.b, batch_size=self.batch_size, shuffle=True),
        }
        return CombinedLoader(loaders, mode="max_size_cycle")


class ImagePool:
    """A history of generated images (Shrivastava et al.)."""

    def __init__(self, pool_size=30):
        self.pool_size, self.images = pool_size, []

    def query(self, images):
        out = []
        for image in images.detach():
            if len(self.images) < self.pool_size:
                self.images.append(image)
                out.append(image)
            elif random.uniform(0, 1) > 0.5:
                i = random.randint(0, self.pool_size - 1)
                out.append(self.images[i].clone())
                self.images[i] = image
            else:
                out.append(image)
        return torch.stack(out)


def net(out):
    return nn.Sequential(nn.Linear(64, 48), nn.InstanceNorm1d(48), nn.LeakyReLU(0.2), nn.Linear(48, out))


class Model(L.LightningModule):
    def __init__(self, lr=2e-3, lambda_cycle=10.0):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.G_AB, self.G_BA, self.D_A, self.D_B = net(64), net(64), net(1), net(1)
        self.pool_A, self.pool_B = ImagePool(), ImagePool()

    def gan_loss(self, pred, is_real):
        return F.mse_loss(pred, torch.full_like(pred, float(is_real)))

    def training_step(self, batch, batch_idx):
        real_a, real_b = batch["A"][0], batch["B"][0]
        opt_g, opt_d = self.optimizers()
        self.toggle_optimizer(opt_g)
        fake_b, fake_a = self.G_AB(real_a), self.G_BA(real_b)
        g_loss = self.gan_loss(self.D_B(fake_b), True) + self.gan_loss(self.D_A(fake_a), True)
        cycle = F.l1_loss(self.G_BA(fake_b), real_a) + F.l1_loss(self.G_AB(fake_a), real_b)
        g_loss = g_loss + self.hparams.lambda_cycle * cycle
        opt_g.zero_grad()
        self.manual_backward(g_loss)
        opt_g.step()
        self.untoggle_optimizer(opt_g)

        self.toggle_optimizer(opt_d)
        fake_a, fake_b = self.pool_A.query(fake_a), self.pool_B.query(fake_b)
        d_loss = self.gan_loss(self.D_A(real_a), True) + self.gan_loss(self.D_A(fake_a), False)
        d_loss = (d_loss + self.gan_loss(self.D_B(real_b), True) + self.gan_loss(self.D_B(fake_b), False)) / 2
        opt_d.zero_grad()
        self.manual_backward(d_loss)
        opt_d.step()
        self.untoggle_optimizer(opt_d)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss, "cycle": cycle}, prog_bar=True)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        generators = itertools.chain(self.G_AB.parameters(), self.G_BA.parameters())
        discriminators = itertools.chain(self.D_A.parameters(), self.D_B.parameters())
        opt_g = torch.optim.Adam(generators, lr=self.hparams.lr, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(discriminators, lr=self.hparams.lr, betas=(0.5, 0.999))
        linear = lambda epoch: 1.0 - max(0, epoch - 1) / 4  # noqa: E731
        return [opt_g, opt_d], [torch.optim.lr_scheduler.LambdaLR(o, linear) for o in (opt_g, opt_d)]
