"""Models whose steps change what is neither an attribute, nor a buffer, nor a weight of theirs."""

import array
import functools
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from tests.support.step_models import Step

calls = 0
table = {"calls": 0}


class Slotted:
    """Has no `__dict__`."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Helper:
    """Its bound method is kept, and not itself."""

    def __init__(self) -> None:
        self.calls = 0

    def bump(self) -> float:
        self.calls += 1
        return float(self.calls)


class Own(dict[str, int]):
    """A dict of the experiment's."""


def counter() -> Callable[[], float]:
    """Return a function that counts how often it is called."""
    calls = 0

    def count() -> float:
        nonlocal calls
        calls += 1
        return float(calls)

    return count


def default(calls: list[int] = [0]) -> float:  # noqa: B006
    """Count in a default."""
    calls[0] += 1
    return float(calls[0])


class Reaching(Step):
    """Its loss depends on what its steps have left somewhere."""

    total = 0

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.save_hyperparameters({"calls": 0})
        if kind == "view of a buffer":
            self.register_buffer("buf", torch.zeros(2))
            self.view = self.buf[0]
        if kind == "view":
            self.buf = torch.zeros(2)
            self.view = self.buf[0]
        made: dict[str, Any] = {
            "slots": Slotted, "closure": counter, "subclass": lambda: Own(calls=0), "method": lambda: Helper().bump,
            "numpy generator": lambda: np.random.default_rng(0), "random": lambda: random.Random(0),
            "torch generator": torch.Generator, "bytes": lambda: bytearray(1), "array": lambda: array.array("d", [0.0]),
            "count": itertools.count, "iterator": lambda: iter(list(range(10_000))), "local": threading.local,
            "partial": lambda: functools.partial(default, [0]), "module": lambda: {"net": nn.Linear(36, 3)},
            "cache": dict,
        }  # fmt: skip
        self.kept = made[kind]() if kind in made else None
        if kind == "local":
            self.kept.calls = 0
        if kind == "module":
            self.optimizer = (torch.optim.SGD(self.kept["net"].parameters(), lr=0.1),)

    def value(self, images: torch.Tensor) -> float:
        """Return a number that depends on how often the step has been called."""
        global calls
        kept: Any = self.kept
        match self.kind:
            case "slots" | "local":
                kept.calls += 1
                return float(kept.calls)
            case "closure" | "method" | "partial":
                return float(kept())
            case "subclass":
                kept["calls"] += 1
                return float(kept["calls"])
            case "numpy generator" | "random":
                return float(kept.random())
            case "torch generator":
                return float(torch.rand(1, generator=kept))
            case "bytes" | "array":
                kept[0] += 1
                return float(kept[0])
            case "count" | "iterator":
                return float(next(kept))
            case "default":
                return default()
            case "global":
                calls += 1
                table["calls"] += 1
                return float(table["calls"])
            case "class":
                Reaching.total += 1
                return float(Reaching.total)
            case "hyperparameters":
                self.hparams.calls += 1  # type: ignore[operator]
                return float(self.hparams.calls)  # type: ignore[arg-type]
            case "tag":
                weight: Any = self.inp.weight
                weight.calls = getattr(weight, "calls", 0) + 1
                return float(weight.calls)
            case "module":
                self.optimizer[0].zero_grad()
                loss = kept["net"](images.flatten(1)).square().mean()
                loss.backward()
                self.optimizer[0].step()
                return float(loss.detach())
            case "view" | "view of a buffer":
                self.view += 1
                return float(self.view)
            case "cache":
                return float(kept.setdefault("first", 3.0))
        raise ValueError(self.kind)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + self.value(batch[0]) / 100)


class Replacing(Step):
    """In its third batch a hook replaces an activation, a function of torch's and the loss, adds a forward hook, and
    counts in a closure. Its learning rate is computed in another one."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.kind != "replaces":
            return optimizer
        factor = 1.0

        def falls(step: int) -> float:
            nonlocal factor
            factor *= 0.99
            return factor

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, falls)]

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.loss: Callable[..., torch.Tensor] = nn.functional.cross_entropy
        self.squash = torch.relu
        self.count = counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return self.loss(self(images), labels)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.kind == "replaces" and batch_idx == 2:
            self.block[1] = nn.ReLU()
            self.loss = smooth
            self.squash = torch.tanh
            self.inp.register_forward_hook(halve)
            self.count()


def smooth(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy with smoothed labels."""
    return nn.functional.cross_entropy(outputs, labels, label_smoothing=0.1)


def halve(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Halve what a module returns."""
    return output / 2


class Reading(Step):
    """Its steps keep what later ones read; "appends": it is not read, but at the epoch's end."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.history: list[Any] = []
        self.register_buffer("table", torch.zeros(1), persistent=False)
        if kind == "engine":
            self.engine = torch.quasirandom.SobolEngine(2)
        if kind == "view":
            self.center = torch.zeros(3).unsqueeze(0)

    def on_train_start(self) -> None:
        if self.kind == "loader":
            images = torch.utils.data.TensorDataset(torch.rand(400, 36))
            self.others = iter(torch.utils.data.DataLoader(images, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        outputs = self(images)
        loss = nn.functional.cross_entropy(outputs, labels)
        match self.kind:
            case "history":
                self.history.append(loss.item())
                loss = loss / (1 + sum(self.history[-20:]) / len(self.history[-20:]))
            case "bank":
                self.history.append(outputs.detach())
                loss = loss + 0.01 * (outputs[:, None] - torch.cat(self.history[-8:])).square().mean()
            case "appends":
                self.history.append(loss.item())
            case "engine":
                loss = loss + 0.01 * self.engine.draw(4).sum()
            case "loader":
                loss = loss + 0.01 * self(next(self.others)[0]).square().mean()
            case "view":  # it is the same for all shards, and begins late
                loss = loss + 0.01 * (outputs - self.center).square().mean()
                if self.global_step >= 2:
                    self.center.mul_(0.9).add_(0.1)
            case "table":
                length = 1 + self.global_step + len(self.table)
                if length > 3:
                    self.table = torch.arange(float(length))
                loss = loss + 0.01 * self.table[:1].sum()
        return loss


class Shadow(pl.Callback):
    """An average of the weights that no state_dict holds."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.shadow = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, weight in pl_module.named_parameters():
            self.shadow[name].lerp_(weight.detach(), 0.1)
