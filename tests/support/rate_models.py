"""Steps that step a scheduler, or change an optimizer's options."""

from typing import Any

import torch

from tests.support.resume_models import Small


class Rates(Small):
    """Changes what the optimizer works with, in `training_step` or after it.

    Args:
        kind: in which way.
        hook: where.
    """

    def __init__(self, kind: str, hook: str = "training_step") -> None:
        super().__init__()
        self.kind, self.hook = kind, hook

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.hook == "training_step":
            self.change()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.hook == "on_train_batch_end":
            self.change()

    def change(self) -> None:
        optimizer: Any = self.optimizers()
        if self.kind == "scheduler":
            self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]
        elif self.kind == "own scheduler":
            self.own.step()
        elif self.kind == "lr":
            optimizer.param_groups[0]["lr"] *= 0.9

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.05)
        self.own = torch.optim.lr_scheduler.StepLR(optimizer, 100)  # changes nothing for a long time
        if self.kind == "scheduler":
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return optimizer
