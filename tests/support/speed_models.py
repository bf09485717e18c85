"""Models for the tests of `speed`: small enough to be compiled in seconds."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support.exact_worker import CNN, Net


class Normed(Net):
    """One layer with BatchNorm, whose compiled sums over the batch are others where its size is dynamic."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


class Fused(CNN):
    """Trained by an optimizer in one kernel."""

    def __init__(self, optimizer: str, **options: Any) -> None:
        super().__init__(**options)
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        options = {"momentum": 0.9, "nesterov": True} if self.optimizer == "SGD" else {}
        return getattr(torch.optim, self.optimizer)(self.parameters(), 3e-3, fused=True, **options)


class Drawn(nn.Module):
    """A block that draws from all three generators, and counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, inputs: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        noise = torch.randn(4) + random.random() + float(np.random.rand())
        return inputs + scale * torch.tanh(self.layer(inputs) + noise)


class Stack(nn.Module):
    """Blocks in a list, called with keywords."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs, scale=0.5) if isinstance(block, Drawn) else block(inputs)
        return inputs


class Counting(nn.Module):
    """Changes a buffer each time that it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.layer(inputs)
