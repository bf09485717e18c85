"""An average of weights in a callback: a shadow dict with state_dict, swapped in for the validation."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.sampler import SubsetRandomSampler

CALLBACKS = {"ema": {"_target_": f"{__name__}.EMACallback", "decay": 0.95}}


class EMACallback(Callback):
    def __init__(self, decay: float = 0.999):
        self.decay = decay
        self.shadow = {}
        self.backup = {}

    def on_fit_start(self, trainer, pl_module):
        if not self.shadow:
            self.shadow = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, param in pl_module.named_parameters():
            if param.requires_grad:
                self.shadow[name].mul_(self.decay).add_(param, alpha=1 - self.decay)

    def on_validation_epoch_start(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.backup = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        for name, param in pl_module.named_parameters():
            param.data.copy_(self.shadow[name])

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        for name, param in pl_module.named_parameters():
            param.data.copy_(self.backup[name])
        self.backup = {}

    def state_dict(self):
        return {"shadow": self.shadow}

    def load_state_dict(self, state_dict):
        self.shadow = state_dict["shadow"]


class Model(L.LightningModule):
    def __init__(self, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, 10)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.layers(x), y)
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.layers(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 24):
        super().__init__()
        self.batch_size = batch_size
        x, y = load_digits(return_X_y=True)
        self.dataset = TensorDataset(torch.from_numpy(x).float() / 16, torch.from_numpy(y))
        indices = list(range(260))
        self.train_sampler = SubsetRandomSampler(indices[50:])
        self.valid_sampler = SubsetRandomSampler(indices[:50])

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size, sampler=self.train_sampler)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size, sampler=self.valid_sampler)
