"""Models that log metrics which wrap others, or keep something outside of their states."""

from typing import Any

import torch
import torchmetrics
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, MultioutputWrapper, Running

from tests.support.resume_models import Small


class Counting(torchmetrics.Metric):
    """Weighs each update by the number of updates before it, which is no state of it."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor) -> None:
        self.seen += 1
        self.total += value * self.seen

    def compute(self) -> Any:
        return self.total


METRICS: dict[str, Any] = {
    "mean": lambda: torchmetrics.MeanMetric(),
    "computed": lambda: torchmetrics.MeanMetric(),
    "validated": lambda: torchmetrics.MeanMetric(),
    "running": lambda: Running(torchmetrics.MeanMetric(), 3),
    "own": Counting,
    "tracker": lambda: MetricTracker(torchmetrics.MeanMetric(), maximize=True),
    "minmax": lambda: MinMaxMetric(torchmetrics.MeanMetric()),
    "outputs": lambda: MultioutputWrapper(torchmetrics.MeanSquaredError(), 1),
}


class Measures(Small):
    """Logs one metric of its losses.

    Args:
        kind: which.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.metric = kind, METRICS[kind]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.kind == "outputs":
            self.metric(loss.detach().view(1, 1), torch.zeros(1, 1))
        else:
            self.metric(loss.detach())
        if self.kind == "computed":
            self.log("measured", self.metric.compute())
        if self.kind in ("running", "own", "outputs"):
            self.log("measured", self.metric, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.kind == "validated":
            self.metric.update(batch[0].mean())
            self.log("measured", self.metric.compute())

    def on_train_epoch_start(self) -> None:
        if self.kind == "tracker":
            self.metric.increment()
        elif self.kind == "mean":
            self.metric = torchmetrics.MeanMetric()

    def on_train_epoch_end(self) -> None:
        if self.kind in ("mean", "tracker"):
            self.log("measured", self.metric.compute())
        elif self.kind == "minmax":
            self.log_dict(self.metric.compute())
            self.metric.reset()
