"""Models whose code changes, after some steps, what a training is made of: for test_late.py, a kind a model."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from tests.support.resume_models import Small

LATE = 3  # the step after which the change comes


class Grows(Small):
    """Adds a layer to the model and a group to the optimizer."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            self.extra = nn.Linear(3, 3)
            self.optimizers().add_param_group({"params": self.extra.parameters(), "lr": 0.01})  # type: ignore

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + self.extra(torch.ones(3)).square().sum() if hasattr(self, "extra") else loss


class Groups(Small):
    """Adds a group of parameters that it has from the beginning."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            self.optimizers().add_param_group({"params": self.backbone.parameters(), "lr": 0.01})  # type: ignore

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9)


class Prunes(Small):
    """Prunes its head."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            prune.l1_unstructured(self.head, "weight", amount=0.5)


class Replaces(Small):
    """Puts another optimizer into the trainer."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            self.trainer.optimizers = [torch.optim.Adam(self.parameters(), 1e-3)]


class Registers(Small):
    """Gives a buffer that was None a value, makes one larger and one nothing, and scales its loss by them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("later", None)
        self.register_buffer("queue", torch.ones(2))
        self.register_buffer("first", torch.ones(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scale = self.queue.mean() * (2 if self.later is None else self.later) * (3 if self.first is None else 1)
        return super().training_step(batch, batch_idx) * scale

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            self.later, self.first = self.head.weight.detach().norm(), None
        if self.global_step >= LATE:
            self.queue = torch.cat([self.queue, self.head.bias.detach().mean()[None]])
            self.register_buffer("made", self.queue.clone())


class GrowsAgain(Grows):
    """Adds the layer when it is loaded too."""

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        if "extra.weight" in checkpoint["state_dict"] and not hasattr(self, "extra"):
            self.extra = nn.Linear(3, 3)


class PrunesAgain(Prunes):
    """Prunes its head when it is loaded too."""

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        if "head.weight_mask" in checkpoint["state_dict"] and not prune.is_pruned(self.head):
            prune.identity(self.head, "weight")


class Strange(Small):
    """Adds a group with a parameter that is none of the model's."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            self.optimizers().add_param_group({"params": [torch.zeros(3, requires_grad=True)]})  # type: ignore


class Wider(Small):
    """Has a parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.ones(()))


class Rejects(Small):
    """Looks for what it has not saved."""

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["nothing"]
