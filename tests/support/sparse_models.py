"""Models with sparse gradients: embeddings of which a batch uses a few rows."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class Ranking(pl.LightningModule):
    """A margin loss: rows of pairs that are far enough apart have a gradient of zero, which moves Adam's averages."""

    def __init__(self, manual: bool = False, dtype: str = "float32") -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.table = nn.Embedding(60, 4, sparse=True, dtype=getattr(torch, dtype))
        self.scale = nn.Parameter(torch.ones(4, dtype=getattr(torch, dtype)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        places = (batch[0].flatten(1)[:, :2] * 20).long() % 60
        one, other = (self.table(places) * self.scale).unbind(1)
        loss = (0.5 - (one - other).square().sum(1)).relu().mean()
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            self.scale.requires_grad = False
            return torch.optim.SparseAdam([self.table.weight], lr=0.05)
        return [torch.optim.SparseAdam([self.table.weight], lr=0.05), torch.optim.SGD([self.scale], lr=0.1)]
