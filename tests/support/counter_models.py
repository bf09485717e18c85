"""A model that keeps its metrics by hand, in numbers that steps add to: test_counters.py says what they must be."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.step_models import Step


class AverageMeter:
    """The average of a value, in the form of PyTorch's ImageNet example."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        self.sum += value * n
        self.count += n

    @property
    def average(self) -> float:
        return self.sum / self.count


class Counting(Step):
    """Counts samples, batches and correct answers, and adds losses up, in training and in validation."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.double()
        self.seen, self.steps, self.all_correct = 0, 0, torch.zeros((), dtype=torch.int64)
        self.confusion = np.zeros((3, 3), np.int64)
        self.meter = AverageMeter()

    def on_train_epoch_start(self) -> None:
        self.correct, self.total_loss, self.losses = 0, 0.0, torch.zeros(2, dtype=torch.float64)
        self.squares = 0.0
        self.meter.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        logits = self(images.double())
        loss = nn.functional.cross_entropy(logits, labels)
        self.steps += 1
        self.count(logits.detach(), labels)
        self.total_loss = self.total_loss + loss.item()
        self.losses += loss.detach() * torch.tensor([1.0, 2.0])
        if self.kind == "squares":
            self.squares += loss.item() ** 2
        self.meter.update(loss.item(), len(labels))
        return loss

    def count(self, logits: Tensor, labels: Tensor) -> None:
        answers = logits.argmax(1)
        self.seen += len(labels)
        self.correct += (answers == labels).sum()
        self.all_correct += (answers == labels).sum()
        self.confusion += np.bincount(3 * labels.numpy() + answers.numpy(), minlength=9).reshape(3, 3)

    def on_train_epoch_end(self) -> None:
        assert isinstance(self.seen, int)
        assert isinstance(self.correct, Tensor)
        assert self.confusion.dtype == np.int64
        values = {
            "seen": self.seen,
            "steps": self.steps,
            "accuracy": self.correct.item() / self.meter.count,
            "loss": self.total_loss / self.steps,
            "average": self.meter.average,
            "losses": self.losses[1].item(),
            "confusion": int(self.confusion.sum()),
            "diagonal": int(self.confusion.trace()),
            "all_correct": self.all_correct.item(),
        }
        self.log_dict({f"train/{name}": float(value) for name, value in values.items()})

    def on_validation_epoch_start(self) -> None:
        self.val_correct = self.val_seen = self.batches = 0
        self.val_loss = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images.double())
        for answer, label in zip(logits.argmax(1), labels, strict=True):
            if answer == label:
                self.val_correct += 1
        self.val_seen += labels.size(0)
        self.val_loss += nn.functional.cross_entropy(logits, labels).item()
        self.batches += 1

    def on_validation_epoch_end(self) -> None:
        self.log("val/accuracy", self.val_correct / self.val_seen)
        self.log("val/loss", self.val_loss / self.batches)
        self.log("val/seen", float(self.val_seen))
        self.log("val/batches", float(self.batches))


class Late(Counting):
    """Adds from the second epoch on, not in the sanity check, and to what no attribute of its own holds."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.late, self.items = 0.0, {"n": 0}
        self.register_buffer("of_buffer", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.kind == "items":
            self.items["n"] += len(batch[1])
            self.of_buffer += len(batch[1])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.sanity_checking:
            return
        super().validation_step(batch, batch_idx)
        if self.current_epoch:
            self.late += nn.functional.cross_entropy(self(batch[0].double()), batch[1]).item()
        if self.kind == "squares":
            self.squares += self.val_loss**2

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            super().on_validation_epoch_end()
            self.log("val/late", self.late / self.batches)


class ByHand(Counting):
    """Counts updates in a loop, in manual optimization: the generator of a GAN follows each tenth."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.automatic_optimization = False
        self.updates = self.rare = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.updates += 1
            if self.updates % 4 == 0:
                self.rare += 1
        return loss

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log_dict({"train/updates": float(self.updates), "train/rare": float(self.rare)})
