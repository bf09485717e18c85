"""A VQ-VAE whose codebook is an EMA in buffers, updated from the batch in each step; a straight-through estimator."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import labtrain  # labtrain:


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        x = torch.tensor(load_digits().images[:200], dtype=torch.float32).unsqueeze(1) / 16
        self.train, self.val = TensorDataset(x[:163]), TensorDataset(x[163:])

    def train_dataloader(self):
        return DataLoader(
            self.train, batch_size=self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(7)
        )

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)


class VectorQuantizerEMA(nn.Module):
    def __init__(self, num_embeddings, embedding_dim, commitment_cost=0.25, decay=0.99, epsilon=1e-5):
        super().__init__()
        self._num_embeddings, self._embedding_dim = num_embeddings, embedding_dim
        self._commitment_cost, self._decay, self._epsilon = commitment_cost, decay, epsilon
        weight = torch.randn(num_embeddings, embedding_dim)
        self.register_buffer("_weight", weight)
        self.register_buffer("_ema_cluster_size", torch.zeros(num_embeddings))
        self.register_buffer("_ema_w", weight.clone())

    def nearest(self, flat):
        distances = flat.pow(2).sum(1, keepdim=True) + self._weight.pow(2).sum(1) - 2 * flat @ self._weight.t()
        return F.one_hot(distances.argmin(1), self._num_embeddings).type_as(flat)

    @torch.no_grad()
    def update(self, flat):
        encodings = self.nearest(flat)
        self._ema_cluster_size = self._ema_cluster_size * self._decay + (1 - self._decay) * encodings.sum(0)
        n = self._ema_cluster_size.sum()
        size = (self._ema_cluster_size + self._epsilon) / (n + self._num_embeddings * self._epsilon) * n
        self._ema_w = self._ema_w * self._decay + (1 - self._decay) * encodings.t() @ flat
        self._weight = self._ema_w / size.unsqueeze(1)

    def forward(self, inputs):
        inputs = inputs.permute(0, 2, 3, 1).contiguous()
        flat = inputs.view(-1, self._embedding_dim)
        encodings = self.nearest(flat)
        quantized = (encodings @ self._weight).view(inputs.shape)
        if self.training:
            self.update(labtrain.gather(flat.detach()))  # labtrain: self.update(flat.detach())
        loss = self._commitment_cost * F.mse_loss(quantized.detach(), inputs)
        quantized = inputs + (quantized - inputs).detach()
        avg_probs = encodings.mean(dim=0)
        perplexity = torch.exp(-torch.sum(avg_probs * torch.log(avg_probs + 1e-10)))
        return loss, quantized.permute(0, 3, 1, 2).contiguous(), perplexity


class Model(L.LightningModule):
    def __init__(self, num_embeddings=16, embedding_dim=8, lr=3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, embedding_dim, 1)
        )
        self.vq = VectorQuantizerEMA(num_embeddings, embedding_dim)
        self.decoder = nn.Sequential(nn.Conv2d(embedding_dim, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1))

    def forward(self, x):
        vq_loss, quantized, perplexity = self.vq(self.encoder(x))
        return vq_loss, self.decoder(quantized), perplexity

    def training_step(self, batch, batch_idx):
        vq_loss, x_recon, perplexity = self(batch[0])
        recon_error = F.mse_loss(x_recon, batch[0])
        self.log_dict({"recon": recon_error, "perplexity": perplexity}, prog_bar=True)
        return recon_error + vq_loss

    def validation_step(self, batch, batch_idx):
        _, x_recon, _ = self(batch[0])
        self.log("val_recon", F.mse_loss(x_recon, batch[0]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, amsgrad=False)
