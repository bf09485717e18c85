"""Models with a state that torch and Lightning do not save, for test_extra_state.py: a kind a model."""

import copy
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from tests.support import exact_worker


class Small(pl.LightningModule):
    """A backbone with BatchNorm and a head, trained with momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])
        return loss * self.factor

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Validate nothing, so that the place of a save before a validation is met."""

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


class Unfreezes(Small):
    """Trains the head alone in epoch 0, then everything; puts BatchNorm in evaluation mode in epoch 1."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(True)
            self.backbone[2].eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Hidden(Small):
    """Scales its loss by a buffer that is in no state dict, and by one that there is only after the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("table", torch.arange(1000.0), persistent=False)  # does not change: is not saved
        self.register_buffer("later", None, persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale * (1 if self.later is None else self.later)

    def on_train_batch_end(self, *_: Any) -> None:
        self.scale.mul_(0.9)
        self.later = self.scale + 0.5


class Hides(Small):
    """Learns from a teacher in a list, which follows after each step, and whose weights no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers = [copy.deepcopy(self.head).requires_grad_(False)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.backbone(batch[0])
        return (
            super().training_step(batch, batch_idx) + (self.head(features) - self.teachers[0](features)).square().mean()
        )

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, other in zip(self.teachers[0].parameters(), self.head.parameters(), strict=True):
            mine.lerp_(other.detach(), 0.3)


class Average:
    """An average of the head's weights, kept by an object that is no module."""

    def __init__(self, head: nn.Linear) -> None:
        self.updates, self.shadow = 0, [weight.detach().clone() for weight in head.parameters()]

    def update(self, head: nn.Linear) -> None:
        self.updates += 1
        for shadow, weight in zip(self.shadow, head.parameters(), strict=True):
            shadow.lerp_(weight.detach(), 0.1)


class Counts(Small):
    """Keeps numbers, texts, containers and an object in plain attributes, and trains by them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.phase = 0, "warm-up"
        self.norms: list[Any] = []
        self.last: deque[float] = deque(maxlen=3)
        self.by_phase: dict[str, Any] = {"seen": set()}

    def on_train_start(self) -> None:
        self.average = Average(self.head)

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1
        self.phase = "warm-up" if self.steps < 6 else "main"
        self.norms.append(self.head.weight.detach().norm())
        self.last.append(self.norms[-1].item())
        self.by_phase["seen"].add(self.steps % 5)
        self.average.update(self.head)
        self.backbone[1].uses = getattr(self.backbone[1], "uses", 0) + 1
        pull = sum(self.last) / len(self.norms) + len(self.by_phase["seen"]) + self.backbone[1].uses
        self.factor = 1 / (1 + pull + self.average.updates + self.average.shadow[0].norm().item())
        self.factor *= 2 if self.phase == "main" else 1


class Late(Small):
    """Makes an object with attributes after the fifth step; has a generator of its own from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = np.random.default_rng(0)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 5:
            self.average = Average(self.head)


class Manual(Small):
    """Steps with every fourth batch: gradients wait in between."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 4)
        if batch_idx % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()


class Accumulates(Small):
    """Clears the gradients before every third step alone."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


class Sparse(Small):
    """Has a sparse buffer of which an entry occurs twice, and one in compressed rows; scales its loss by both."""

    def __init__(self) -> None:
        super().__init__()
        graph = torch.sparse_coo_tensor([[0, 0, 2], [1, 1, 0]], [0.1, 0.2, 0.3], (3, 3))
        self.register_buffer("graph", graph)
        self.register_buffer("rows", torch.eye(3).to_sparse_csr())
        self.register_buffer("hidden", graph.coalesce(), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        total = (self.graph @ torch.ones(3, 1)).sum() + (self.rows @ torch.ones(3, 1)).sum()
        return super().training_step(batch, batch_idx) * total * self.hidden.values().sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.graph, self.hidden = self.graph * 0.9, self.hidden * 1.1


class HyperParameters(Small):
    """Saves as a hyperparameter what a checkpoint cannot hold, in the way of the most used template."""

    def __init__(self, optimizer: Any, net: Any, size: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)


class WithExtraState(nn.Module):
    def get_extra_state(self) -> Any:
        return {"seen": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Extra(Small):
    """Has an object in its state: where, an argument says."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "complex":
            self.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))
        if where == "extra":
            self.counter = WithExtraState()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.where == "hook":
            checkpoint["mine"] = {"device": self.device}
        if self.where == "key":
            checkpoint["mine"] = {torch.float32: 1}

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.where == "optimizer":
            optimizer.param_groups[0]["schedule"] = lambda step: step
        return optimizer


class Position:
    """What an epoch of a `Torchdata` is at: its iterator."""

    def __init__(self, loader: "Torchdata", state: dict[str, Any] | None) -> None:
        self.loader, self.yielded, self.finished = loader, 0, False
        if state is not None:
            loader.generator.set_state(state["generator"])
        self.generator = loader.generator.get_state()
        self.order = torch.randperm(len(loader.dataset), generator=loader.generator).tolist()
        if state is not None:
            self.yielded, self.finished = state["yielded"], state["finished"]
            loader.lines = state["lines"]

    def __iter__(self) -> "Position":
        return self

    def __next__(self) -> Any:
        loader, first = self.loader, self.yielded * self.loader.batch_size
        rows = self.order[first : first + loader.batch_size]
        if not loader.sized:  # a file that is read from its beginning to its end, then from its beginning
            rows = list(range(loader.lines, min(loader.lines + loader.batch_size, len(loader.dataset))))
            loader.lines = loader.lines + len(rows) if rows else 0
        if not rows:
            self.finished = True
            raise StopIteration
        self.yielded += 1
        return torch.utils.data.default_collate([(loader.dataset.images[i], loader.dataset.labels[i]) for i in rows])


class Torchdata:
    """The protocol of torchdata 0.11's StatefulDataLoader, with a random sampler, or a stream that has a state.

    `load_state_dict` is for the next iterator, which goes on in the epoch of the state, though nothing is left of it; a
    state that was taken after the iterator's StopIteration begins a new epoch.
    """

    def __init__(self, dataset: Any, batch_size: int, *, sized: bool) -> None:
        self.dataset, self.batch_size, self.sized = dataset, batch_size, sized
        self.generator, self.lines = torch.Generator().manual_seed(3), 0
        self.position: Position | None = None
        self.state: dict[str, Any] | None = None

    def __len__(self) -> int:
        if not self.sized:
            raise TypeError("a stream")
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Position:
        self.position, self.state = Position(self, self.state), None
        if self.position.finished:
            self.position = Position(self, None)
        return self.position

    def state_dict(self) -> dict[str, Any]:
        at = self.position
        assert at is not None
        return {"generator": at.generator, "yielded": at.yielded, "finished": at.finished, "lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.state = None, state


class StreamData(exact_worker.Data):
    """Training data from a `Torchdata`."""

    def train_dataloader(self) -> Any:
        if self.loader.startswith("torchdata"):
            return Torchdata(self.train, self.batch_size, sized=self.loader == "torchdata")
        return super().train_dataloader()


class Scheduled(Small):
    """Has an optimizer and a schedule of a kind, with options that a test changes."""

    def __init__(
        self, kind: str = "none", lr: float = 0.05, momentum: float = 0.9, warmup: int = 4, adam: bool = False
    ) -> None:
        super().__init__()
        self.kind, self.lr, self.momentum, self.warmup, self.adam = kind, lr, momentum, warmup, adam
        self.used: list[Any] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        print("step", self.global_step + 1, "used", group["lr"], group.get("momentum"), flush=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", 1.0)

    def configure_optimizers(self) -> Any:
        schedules = torch.optim.lr_scheduler
        optimizer: Any = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        if self.adam:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if self.kind == "none":
            return optimizer
        scheduler: Any = {
            "lambda": lambda: schedules.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup)),
            "cycle": lambda: schedules.OneCycleLR(
                optimizer, max_lr=self.lr, total_steps=int(self.trainer.estimated_stepping_batches)
            ),
            "cyclic": lambda: schedules.CyclicLR(optimizer, self.lr / 10, self.lr, step_size_up=3),
            "epochs": lambda: schedules.StepLR(optimizer, 1, gamma=0.5),
            "plateau": lambda: schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
        }[self.kind]()
        interval = "epoch" if self.kind in ("epochs", "plateau") else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val/loss"},
        }


class FailsAtOnce(pl.Callback):
    """Fails in the first step of a process."""

    def on_train_batch_start(self, *_: Any) -> None:
        1 / 0  # noqa: B018


class Anneals(Small):
    """Smooths its labels less and less; notes when it has made its last step."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing, self.started = smoothing, time.time()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.head(self.backbone(batch[0]))
        return nn.functional.cross_entropy(scores, batch[1], label_smoothing=self.smoothing)

    def on_train_batch_end(self, *_: Any) -> None:
        self.smoothing *= 0.95
        self.started = time.time()
