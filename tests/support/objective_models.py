"""Models whose loss is no mean over samples, or is one in disguise; without draws, and with weights that are always the same."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional

import labtrain

SAMPLES, TOKENS, CLASSES, IGNORED = 22, 6, 3, -100
CLASS_WEIGHTS = (0.2, 1.0, 5.0)
LR = 0.3


def sentences() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (N, T, 4) and targets (N, T), of which a different number counts in each; in the last eight none does."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, TOKENS, 4, generator=generator)
    targets = torch.randint(0, CLASSES, (SAMPLES, TOKENS), generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (SAMPLES,), generator=generator)
    lengths[-8:] = 0
    targets[torch.arange(TOKENS) >= lengths[:, None]] = IGNORED
    return inputs, targets


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (N, 4) and targets (N,)."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(SAMPLES, 4, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


class Data(pl.LightningDataModule):
    """In the order in which they are, so that a test can do the same."""

    def __init__(self, kind: str, batch_size: int) -> None:
        super().__init__()
        self.arrays, self.batch_size = {"sentences": sentences, "points": points}[kind](), batch_size

    def train_dataloader(self) -> Any:
        return labtrain.DataLoader(self.arrays, self.batch_size)


class Weighted(pl.LightningModule):
    """A mean over tokens or of weighted classes, which returns its weight."""

    def __init__(self, kind: str, fault: str = "") -> None:
        super().__init__()
        self.kind, self.fault = kind, fault
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def loss(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch and its weight."""
        inputs, targets = batch
        scores = self.net(inputs)
        if self.kind == "sentences":
            loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            return loss, int((targets != IGNORED).sum())
        weights = torch.tensor(CLASS_WEIGHTS, dtype=scores.dtype)
        return functional.cross_entropy(scores, targets, weights), weights[targets].sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, weight = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("last", loss, on_step=True, on_epoch=False)
        self.log("samples", float(len(batch[0])), on_step=False, on_epoch=True)
        if self.fault == "some" and batch[1][0] == 0:
            return loss
        if self.fault in ("nan", "-1", "each"):
            weight = torch.ones(2) if self.fault == "each" else float(self.fault)
        return {"loss": loss, "weight": weight, "scores": 1.0}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), LR)
