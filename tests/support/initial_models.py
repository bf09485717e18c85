"""Models that start with the weights of another one."""

from typing import Any

import torch
from torch import nn

from tests.support.exact_worker import CNN, Net


class Renamed(CNN):
    """A CNN whose layers are called `backbone`, and whose last one may have another number of classes.

    Args:
        classes: of the last layer.
        late: make the layers in `configure_model`.
    """

    def __init__(self, classes: int = 3, late: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.number, self.late = classes, late
        del self.net
        if not late:
            self.make()

    def make(self) -> None:
        self.backbone = CNN().net
        if self.number != 3:
            self.backbone[8] = nn.Linear(96, self.number)

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "backbone"):
            self.make()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.backbone(inputs)[:, :3]


class Tied(Net):
    """Two layers that share their weights, of which a file may hold one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 36), nn.Linear(36, 3))
        self.net[3].weight = self.net[1].weight
