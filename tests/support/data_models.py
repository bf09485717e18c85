"""Data that remembers how often it was asked."""

from typing import Any

import torch

from tests.support.exact_worker import Data, Images


class CountedImages(Images):
    """Counts its calls."""

    calls = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        return super().__getitem__(index)


class Counted(Data):
    """Images that are counted in training."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.train = CountedImages(len(self.train))
        self.train.calls = 0
