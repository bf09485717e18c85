"""MoCo: a queue of keys in a buffer and a momentum encoder, both updated inside training_step."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import labtrain  # labtrain:


class Pairs(Dataset):
    def __init__(self, start, stop):
        self.x = torch.tensor(load_digits().data[start:stop], dtype=torch.float32) / 16

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return [self.x[i] + 0.15 * torch.randn(64), self.x[i] + 0.15 * torch.randn(64)]


class Data(L.LightningDataModule):
    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(Pairs(0, 149), batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(Pairs(149, 180), batch_size=self.batch_size)


class Model(L.LightningModule):
    def __init__(self, emb_dim=16, num_negatives=64, encoder_momentum=0.99, softmax_temperature=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.encoder_q, self.encoder_k = self.make_encoder(emb_dim), self.make_encoder(emb_dim)
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(emb_dim, num_negatives), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def make_encoder(self, emb_dim):
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, emb_dim))

    @torch.no_grad()
    def _momentum_update_key_encoder(self):
        em = self.hparams.encoder_momentum
        for param_q, param_k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            param_k.data = param_k.data * em + param_q.data * (1.0 - em)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys):
        keys = labtrain.gather(keys)  # labtrain: keys = keys.detach()
        ptr, batch_size = int(self.queue_ptr), keys.shape[0]
        assert self.hparams.num_negatives % batch_size == 0
        self.queue[:, ptr : ptr + batch_size] = keys.T
        self.queue_ptr[0] = (ptr + batch_size) % self.hparams.num_negatives

    def forward(self, img_q, img_k):
        q = F.normalize(self.encoder_q(img_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            k = F.normalize(self.encoder_k(img_k), dim=1)
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1) / self.hparams.softmax_temperature
        return logits, torch.zeros(len(logits), dtype=torch.long, device=self.device), k

    def training_step(self, batch, batch_idx):
        output, target, keys = self(*batch)
        self._dequeue_and_enqueue(keys)
        loss = F.cross_entropy(output, target)
        acc1 = (output.argmax(1) == target).float().mean()
        self.log_dict({"train_loss": loss, "train_acc1": acc1})
        return loss

    def validation_step(self, batch, batch_idx):
        q, k = (F.normalize(self.encoder_q(x), dim=1) for x in batch)
        self.log("val_alignment", (q - k).norm(dim=1).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
