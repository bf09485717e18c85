"""Models whose step needs the whole batch: synchronised BatchNorm, and contrastive losses."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

import labtrain


class Whole(pl.LightningModule):
    """What they share: float64 if it is to be compared with the whole batch."""

    def __init__(self, dtype: str = "float32", dropout: float = 0.1) -> None:
        super().__init__()
        self.kind = getattr(torch, dtype)
        self.drop = nn.Dropout(dropout)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/mean", self(batch[0].to(self.kind)).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Normalised(Whole):
    """BatchNorm after a convolution and after a linear layer; one without weights or running statistics."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8),
            nn.BatchNorm1d(8, momentum=None), nn.BatchNorm1d(8, affine=False, track_running_stats=False), self.drop,
            nn.Linear(8, 3),
        ).to(self.kind)  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0].to(self.kind)), batch[1])
        self.log("loss", loss)
        return loss


class Contrastive(Whole):
    """CLIP's loss between images and their mirrored ones, over the whole batch; supervised by labels if asked."""

    def __init__(self, supervised: bool = False, manual: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.supervised, self.automatic_optimization = supervised, not manual
        self.one = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), self.drop, nn.Linear(16, 8)).to(self.kind)
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=self.kind))

    def forward(self, images: Tensor) -> Tensor:
        return functional.normalize(self.one(images), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        images = batch[0].to(self.kind)
        one, two = labtrain.gather(self(images)), labtrain.gather(self(images.flip(-1)))
        labels = labtrain.gather(batch[1])
        scores = self.scale * one @ two.T
        if self.supervised:
            same = (labels[:, None] == labels[None]).to(self.kind)
            loss = -(scores.log_softmax(1) * same).sum(1).div(same.sum(1)).mean()
        else:
            targets = torch.arange(len(one))
            loss = (functional.cross_entropy(scores, targets) + functional.cross_entropy(scores.T, targets)) / 2
        self.log("loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


class Refused(Normalised):
    """Gathers where shards do not meet."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self(batch[0])
        if self.fault == "later" and batch_idx == 1:
            scores = labtrain.gather(scores)
        return scores.square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.fault == "validation":
            labtrain.gather(self(batch[0]))
