"""Models and a callback for the tests of FLOP/s: their steps are counted, or cannot be."""

from typing import Any

import lightning.pytorch as pl
import torch

from labtrain.training.callbacks import history
from labtrain.training.sharded import objective
from tests.support.exact_worker import MLP


class Told(MLP):
    """Says itself how many operations a batch has, as Lightning's ThroughputMonitor asks."""

    def __init__(self, flops_per_batch: float, **options: Any) -> None:
        super().__init__(**options)
        self.flops_per_batch = flops_per_batch


class Fails(MLP):
    """Fails where it says how many operations a batch has."""

    @property
    def flops_per_batch(self) -> int:
        raise RuntimeError("no")


@torch.library.custom_op("labtrain_tests::twice", mutates_args=())
def twice(inputs: torch.Tensor) -> torch.Tensor:
    """Multiply by two, in an operation that torch does not know."""
    return inputs * 2


twice.register_autograd(lambda context, gradient: gradient * 2)


class Custom(MLP):
    """Has an operation of another library."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return twice(super().forward(inputs))


class Broken:
    """A counter that fails in its block."""

    def __enter__(self) -> Any:
        raise RuntimeError("no dispatch mode")

    def __exit__(self, *_: object) -> None: ...


class Lines(pl.Callback):
    """Lets each step write a line of the history.

    Args:
        peak: of each device, in FLOP/s.
        fault: "none": nothing is counted, without a run of its own; "broken": the counter fails.
    """

    def __init__(self, peak: int | None = None, fault: str = "") -> None:
        self.peak, self.fault = peak, fault

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        history.History.EVERY_SECONDS = 0.0
        if self.peak is not None:
            history.peak_of_device = lambda _: self.peak
        if self.fault == "none":
            objective._Bench.flops = lambda *_, **__: None  # type: ignore[method-assign]
        elif self.fault == "broken":
            objective.FlopCount = Broken  # type: ignore[assignment, misc]
