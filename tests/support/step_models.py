"""Models whose steps do what people write, and what shards make difficult: test_steps.py says what ought to come out."""

import copy
import enum
import types
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Step(pl.LightningModule):
    """A small network; `kind` names what is done beside computing a loss."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.inp, self.block, self.out = (
            nn.Linear(36, 12),
            nn.Sequential(nn.Linear(12, 12), nn.Tanh()),
            nn.Linear(12, 3),
        )
        self.norms: list[str] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(self.block(self.inp(images.flatten(1))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Zeroed(Step):
    """Zeroes gradients in place, or every third step, or keeps a gradient of the step before."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if self.kind == "in place":
            optimizer.zero_grad(set_to_none=False)
        elif self.kind == "every third" and batch_idx % 3 == 0:
            optimizer.zero_grad(set_to_none=batch_idx % 2 == 0)
        elif self.kind == "kept":
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradient = self.inp.weight.grad
        if self.kind == "kept" and hasattr(self, "before"):
            with torch.no_grad():
                self.out.weight += self.before.sum() + gradient.sum()
        self.before = gradient


class Reentrant(Step):
    """Uses a block three times, or as often as the batch has samples, under reentrant checkpointing."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.inp(images.flatten(1))
        for _ in range(3 if self.kind == "three" else 1 + self.global_step):
            hidden = hidden + checkpoint(self.block, hidden, use_reentrant=True)
        return self.out(hidden)


class Normed(Step):
    """Has BatchNorm, which needs two samples."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh())


class Manual(Step):
    """Manual optimization that steps every other batch."""

    automatic_optimization = False

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Changes(Step):
    """Changes a parameter in training_step, in one of the ways there are."""

    def __init__(self, kind: str, since: int = 0) -> None:
        super().__init__(kind)
        self.since = since
        self.target = nn.Linear(12, 12).requires_grad_(False)
        self.teachers = [copy.deepcopy(self.block)] if kind == "hidden" else []
        if kind == "library":
            library: Any = type("Averages", (), {"__module__": "a_library"})
            self.ema = library()
            self.ema.averages = [self.out.weight.detach().clone()]
        if kind == "max_norm":
            self.table = nn.Embedding(3, 12, max_norm=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.global_step < self.since:
            return loss
        with torch.no_grad():
            if self.kind == "average":
                for mine, other in zip(self.target.parameters(), self.block.parameters(), strict=True):
                    mine.mul_(0.9).add_(other, alpha=0.1)
            elif self.kind == "data":
                for mine, other in zip(self.target.parameters(), self.block.parameters(), strict=True):
                    mine.data = 0.9 * mine.data + 0.1 * other.data
            elif self.kind == "hidden":
                for mine, other in zip(self.teachers[0].parameters(), self.block.parameters(), strict=True):
                    mine.lerp_(other, 0.1)
            elif self.kind == "library":
                self.ema.averages[0].lerp_(self.out.weight, 0.1)
            elif self.kind == "silent":
                self.out.weight.data.clamp_(-0.01, 0.01)
            elif self.kind == "numpy":
                self.out.weight.detach().numpy()[0, 0] += 1
            elif self.kind == "new":
                self.out.bias = nn.Parameter(self.out.bias + 1)
            elif self.kind == "frozen":
                self.inp.requires_grad_(False)
            elif self.kind == "added":
                self.more = nn.Linear(12, 3)
        return loss + self.table(batch[1]).sum() if self.kind == "max_norm" else loss


class Still(Step):
    """Learns nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Buffered(Step):
    """Keeps something in buffers."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.register_buffer("queue", torch.zeros(16, 3))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("center", None)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        if kind == "spectral":
            self.out = nn.utils.parametrizations.spectral_norm(self.out)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        scores = self(images)
        if self.kind == "queue":
            at = int(self.pointer)
            self.queue[at : at + len(scores)] = scores.detach()[: 16 - at]
            self.pointer[0] = (at + len(scores)) % 16
        elif self.kind == "alike":
            self.scale.mul_(0.95)
            scores = scores * self.scale
        elif self.kind == "none":
            self.center = 0.9 * self.center + 0.1 if self.center is not None else torch.zeros(3)
            scores = scores - self.center
        elif self.kind == "none, unlike":
            self.center = scores.detach().mean(0)
        elif self.kind == "new":
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.zeros(3))
            self.late += 1
            scores = scores + 0.1 * self.late
        elif self.kind == "new statistic":
            if not hasattr(self, "running_scores"):
                self.register_buffer("running_scores", torch.zeros(3))
            self.running_scores = 0.9 * self.running_scores + 0.1 * scores.detach().mean(0)
            scores = scores - self.running_scores
        return nn.functional.cross_entropy(scores, labels)


class Phase(enum.Enum):
    """A value that is neither a number nor a text."""

    WARM = 1
    MAIN = 2


class Point(NamedTuple):
    """Numbers with names."""

    count: int


class Helper:
    """An object of the experiment's own, with a state."""

    def __init__(self) -> None:
        self.calls = 0


class Counting(Step):
    """Keeps numbers, strings, tensors and containers of these; the learning signal depends on each."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.count, self.temperature, self.phase = 0, 1.0, "warm"
        self.seen, self.history, self.helper = {"batches": 0}, [0.0] * 3, Helper()
        self.vector, self.array = torch.ones(3), __import__("numpy").ones(2)
        self.losses: list[Any] = []
        self.bag = types.SimpleNamespace(count=0)
        self.first, self.mode, self.point = 1.5, Phase.WARM, Point(0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        scores = self(images) * getattr(self, "first", 1.0)
        if self.kind == "equal":
            if batch_idx == 4 and hasattr(self, "first"):
                del self.first
            self.count += 1
            self.point = Point(self.point.count + 1)
            self.bag.count += 1
            self.mode = Phase.MAIN if self.mode is Phase.WARM else Phase.WARM
            scores = scores * self.point.count * self.mode.value * self.bag.count
            self.temperature *= 0.9
            self.phase = "hot" if self.count > 3 else "warm"
            self.seen["batches"] += 1
            self.history[self.count % 3] += 1.0
            self.helper.calls += 1
            self.vector.mul_(0.99)
            self.array[0] *= 0.98
            scores = scores * self.temperature * self.vector * float(self.array[0])
            scores = scores + 0.01 * (self.count + self.seen["batches"] + sum(self.history) + self.helper.calls)
            scores = scores * (1.1 if self.phase == "hot" else 1.0)
        loss = nn.functional.cross_entropy(scores, labels)
        if self.kind == "unlike":
            loss = loss * (1.0 + 0.1 * float(getattr(self, "last_loss", 0.0)))
            self.last_loss = loss
        elif self.kind == "late" and self.global_step > 2:
            self.count += 1
            loss = loss * (1.0 + 0.1 * self.count)
        elif self.kind == "grows":
            self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_rank == 0:
            print(
                f"after {self.global_step}: {self.count} {self.helper.calls} {self.point.count} {self.bag.count} {len(self.losses)}",
                flush=True,
            )


class Together(Step):
    """Talks to the other ranks in a step, or asks whether there are any."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.kind == "all_gather":
            return self.all_gather(loss, sync_grads=True).mean()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss.detach())
            return loss * torch.distributed.get_world_size()
        return loss


EXCHANGES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "batch_isend_irecv",
             "broadcast", "broadcast_object_list")  # fmt: skip


class Exchanges(pl.Callback):
    """Writes down which exchanges each rank begins, in their order, from the first step on."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        def noted(name: str, exchange: Any) -> Any:
            def begun(*args: Any, **options: Any) -> Any:
                with (self.folder / f"rank-{trainer.global_rank}").open("a") as file:
                    file.write(f"{name}\n")
                return exchange(*args, **options)

            return begun

        for name in EXCHANGES:
            setattr(torch.distributed, name, noted(name, getattr(torch.distributed, name)))


class Drift(pl.Callback):
    """Changes one weight of one rank."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            with torch.no_grad():
                pl_module.block[0].weight[0, 0] += 1e-3


class Typed(Step):
    """Has buffers of dtypes that gloo does not send, and trains by them; a step changes them, in each shard alike."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.register_buffer("count", torch.ones((), dtype=torch.int16))
        self.register_buffer("mask", torch.ones(2, 3, dtype=torch.uint16))
        self.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        return super().training_step(batch, batch_idx) * self.scale.float().mean() / self.count


class Anneals(Step):
    """Makes dropout weaker from the third step on: a torch layer's attribute, which none has changed before."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.block.append(nn.Dropout(0.5))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step >= 2:
            self.block[2].p *= 0.95
        return super().training_step(batch, batch_idx)


class Lazy(Step):
    """Learns the size of its input from the first batch."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__(kind)
        self.inp = nn.LazyLinear(12)


class Stops(Step):
    """Ends its training: a shard does, or a hook by what the whole batch logs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True)
        if self.kind == "step" and self.global_step == 2:
            self.trainer.should_stop = True
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.kind == "hook" and self.trainer.callback_metrics["loss"] < 1.1:
            self.trainer.should_stop = True
