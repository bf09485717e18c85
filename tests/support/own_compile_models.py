"""Models whose own code calls torch.compile, in each usual form."""

from typing import Any

import torch
from torch import nn

from tests.support.exact_worker import Net


class Compiled(Net):
    """One layer with BatchNorm and dropout.

    Args:
        form: how it is compiled.
        options: of torch.compile.
    """

    def __init__(self, form: str, options: dict[str, Any] | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.form, self.options = form, options or {}
        layers = nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)
        self.net: Any = nn.Sequential(*layers)
        if form == "assigned":
            self.net = torch.compile(self.net, **self.options)
        elif form == "in place":
            self.net[1].compile(**self.options)
        elif form == "function":
            self.scaled = torch.compile(**self.options)(scaled)

    def configure_model(self) -> None:
        if self.form == "configured" and not hasattr(self.net, "_orig_mod"):
            self.net = torch.compile(self.net, **self.options)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scores = self.net(inputs)
        return self.scaled(scores, inputs) if self.form == "function" else scores


def scaled(scores: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Sums over the batch: their order is another where sizes are dynamic."""
    return scores * (1 + 0.1 * (inputs - inputs.mean(0)).square().mean().sqrt())
