"""Models for Lightning's finders of a learning rate and of a batch size."""

from typing import Any

import torch

from tests.support.resume_models import Small


class WithRate(Small):
    """Trains with a learning rate that a finder may set."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
