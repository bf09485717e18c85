"""Models whose loss is no mean over samples, or is one in disguise; without draws, and with weights that are always the same."""

import collections
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torchmetrics
from torch import nn
from torch.nn import functional

import labtrain
from labtrain.training.sharded import objective

SAMPLES, TOKENS, CLASSES, IGNORED = 22, 6, 3, -100
CLASS_WEIGHTS = (0.2, 1.0, 5.0)
LR = 0.3


def sentences() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (N, T, 4) and targets (N, T), of which a different number counts in each; in the last eight none does."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, TOKENS, 4, generator=generator)
    targets = torch.randint(0, CLASSES, (SAMPLES, TOKENS), generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (SAMPLES,), generator=generator)
    lengths[-8:] = 0
    targets[torch.arange(TOKENS) >= lengths[:, None]] = IGNORED
    return inputs, targets


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs (N, 4) and targets (N,)."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(SAMPLES, 4, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def hinges() -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses (N, T), of eighths, and which of them count, in batches of eight: five times the same three.

    In the first, three samples have a loss and two shards have none. In the second none has. In the third a shard's
    samples are all padding.
    """
    losses, lengths = torch.zeros(24, TOKENS), torch.arange(24) % TOKENS + 1
    losses[[0, 1, 3, 20]] = torch.tensor([[0.125, 0.5, 2.25, 0.0, 1.0, 0.375]])
    lengths[16:18] = 0
    return losses.repeat(5, 1), (torch.arange(TOKENS) < lengths[:, None]).repeat(5, 1)


class Data(pl.LightningDataModule):
    """In the order in which they are, so that a test can do the same."""

    def __init__(self, kind: str, batch_size: int) -> None:
        super().__init__()
        self.arrays, self.batch_size = {"sentences": sentences, "points": points, "hinges": hinges}[kind](), batch_size

    def train_dataloader(self) -> Any:
        return labtrain.DataLoader(self.arrays, self.batch_size)


class Weighted(pl.LightningModule):
    """A mean over tokens or of weighted classes, which returns its weight."""

    def __init__(self, kind: str, fault: str = "") -> None:
        super().__init__()
        self.kind, self.fault = kind, fault
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def loss(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch and its weight."""
        inputs, targets = batch
        scores = self.net(inputs)
        if self.kind == "sentences":
            loss = functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            return loss, int((targets != IGNORED).sum())
        weights = torch.tensor(CLASS_WEIGHTS, dtype=scores.dtype)
        return functional.cross_entropy(scores, targets, weights), weights[targets].sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, weight = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("last", loss, on_step=True, on_epoch=False)
        self.log("samples", float(len(batch[0])), on_step=False, on_epoch=True)
        if self.fault == "some" and batch[1][0] == 0:
            return loss
        if self.fault in ("nan", "-1", "each"):
            weight = torch.ones(2) if self.fault == "each" else float(self.fault)
        return {"loss": loss, "weight": weight, "scores": 1.0}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), LR)


class Hinge(pl.LightningModule):
    """A mean over tokens, which is 0 where all is right; it returns its weight, and logs the loss and an error."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses, valid = batch
        loss = self.scale * (losses * valid).sum() / valid.sum()
        error = (losses * valid).amax(1).gt(0).double().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"item": loss.item(), "error": error}, on_step=False, on_epoch=True)
        self.log("both", error, on_step=True, on_epoch=True)
        return {"loss": loss, "weight": valid.sum()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


class Unweighted(Weighted):
    """Losses of many kinds, without a weight."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(kind, **options)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.recurrent = nn.LSTM(4, 5, num_layers=2, dropout=0.5)
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        hidden = self.net[0](inputs)
        scores = self.net(inputs)
        if self.kind == "sentences":
            return functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        if self.kind == "classes":
            return functional.cross_entropy(scores, targets, torch.tensor(CLASS_WEIGHTS, dtype=scores.dtype))
        if self.kind == "contrast":
            left, right = functional.normalize(scores, dim=-1), functional.normalize(inputs[:, :CLASSES], dim=-1)
            return functional.cross_entropy(left @ right.T / 0.1, torch.arange(len(inputs)))
        if self.kind == "sum":
            return functional.cross_entropy(scores, targets, reduction="sum")
        if self.kind == "variance":
            return scores.var()
        if self.kind == "samples":
            return {"loss": self.loss(batch)[0], "weight": len(inputs)}
        if self.kind == "drawn":
            return ((scores + torch.randn_like(scores)) ** 2).mean()
        if self.kind == "own draws":
            return ((scores + torch.randn(scores.shape, generator=self.generator)) ** 2).mean()
        if self.kind == "fails":
            return functional.cross_entropy(scores, targets) if self.training else scores[:, 0].oops
        if self.kind == "nan":
            return functional.cross_entropy(scores, targets) * (1.0 if self.training else float("nan"))
        if self.kind == "squares":
            return functional.mse_loss(scores, hidden[:, :CLASSES].sin())
        if self.kind == "one norm":
            penalty = sum(parameter.abs().sum() for parameter in self.net.parameters())
            return functional.cross_entropy(scores, targets) + 1e-3 * penalty
        if self.kind == "critic":  # a difference of two means, nearly 0
            return scores[:, 0].mean() - (scores[:, 0] + 1e-4 * scores[:, 1]).mean()
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return functional.cross_entropy(self.net(inputs).float(), targets)
        if self.kind == "frozen":
            self.net[0].requires_grad_(False)
            return functional.cross_entropy(scores, targets)
        if self.kind == "recurrent":
            return functional.cross_entropy(self.net[2](self.recurrent(inputs[None])[0][0]), targets)
        if self.kind == "collective":  # as many on each rank: a full batch on two devices
            dist.all_reduce(torch.ones(1))
            return functional.cross_entropy(scores, targets)
        assert self.kind == "normed"
        return functional.cross_entropy(self.net[2](self.drop(self.norm(hidden))), targets)


class Unchecked(Unweighted):
    """Has the comparison left out in its process."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(kind, **options)
        objective.compare = lambda *_, **__: None  # type: ignore[assignment]


class Average:
    """An object of the person's own, which the model holds."""

    def __init__(self, module: nn.Module) -> None:
        self.shadow = [parameter.detach().clone() for parameter in module.parameters()]
        self.calls = 0


class Restless(pl.LightningModule):
    """Changes everything it has in each call of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, CLASSES))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.table = nn.Embedding(50, 4, max_norm=0.1)
        self.register_buffer("queue", torch.zeros(8, 4))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("late", None)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.cat = torchmetrics.CatMetric()
        self.average = Average(self.net)
        self.count, self.name, self.flag = 0, "first", False
        self.losses: list[torch.Tensor] = []
        self.recent: Any = collections.deque([1, 2], maxlen=3)
        self.counts: Any = collections.Counter()
        self.nested = {"numbers": [1, {2}], "tensor": torch.zeros(3), "array": np.zeros(3)}
        self.torch_draws, self.numpy_draws = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.python_draws, self.old_draws = random.Random(1), np.random.RandomState(1)
        self.activations: list[torch.Tensor] = []
        self.net[0].register_forward_hook(lambda module, inputs, output: self.activations.append(output))
        self.net[3].weight.grad = torch.ones_like(self.net[3].weight)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        inputs.mul_(2)
        draws = random.random() + np.random.rand() + torch.rand(())
        draws += self.numpy_draws.random() + self.python_draws.random() + self.old_draws.rand()
        draws += torch.rand((), generator=self.torch_draws)
        scores = self.net(inputs + self.frozen(inputs)) + self.table(targets).sum(1, keepdim=True)
        loss = functional.cross_entropy(scores, targets) + 0 * draws
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.data.mul_(0.5)
            self.net[0].bias.data = torch.ones(4)
            self.frozen.weight.data = torch.rand(4, 4)
            self.net[1].running_mean.data.fill_(3.0)
            for shadow in self.average.shadow:
                shadow.fill_(1.0)
        self.queue[int(self.place)] = inputs[0]
        self.place += 1
        self.late = torch.ones(2)
        self.register_buffer("new", torch.ones(2))
        self.average.calls += 1
        self.count, self.name, self.flag, self.fresh = self.count + 1, "second", True, loss
        self.losses.append(loss)
        self.recent.append(3)
        self.counts["steps"] += 1
        self.nested["numbers"][1].add(3)
        self.nested["numbers"].append(4)
        self.nested["tensor"].add_(1)
        self.nested["array"] += 1
        self.frozen.requires_grad_(True)
        self.net[2].p = 0.9
        self.frozen.train()
        self.frozen.extra = nn.Linear(1, 1)
        self.accuracy(scores, targets)
        self.cat(loss)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log("accuracy", self.accuracy)
        for logger in self.loggers:
            logger.log_metrics({"by hand": 1.0})
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.5
        self.lr_schedulers().step()
        self.trainer.should_stop = True
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), LR)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
