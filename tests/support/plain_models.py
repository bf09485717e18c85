"""Models that keep values of many kinds in plain attributes, alone or shared, and train by them."""

import enum
import os
import time
import types
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.support.resume_models import Small


class Phase(enum.Enum):
    """A value without a number."""

    WARM = "warm"
    MAIN = "main"


class Options(enum.Flag):
    """Values that combine."""

    A = 1
    B = 2
    C = 4


class Point(NamedTuple):
    """Numbers with names."""

    count: int
    losses: Any = ()


@dataclass(frozen=True, slots=True)
class State:
    """Replaced, and not changed; holds a tensor."""

    count: int
    mean: Any


class Meter:
    """Made anew by hooks, changed in place by steps."""

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros(())


def pull(values: Any) -> float:
    """Return a number that depends on each value."""
    return 1e-3 * (sum(map(ord, repr(values))) % 97)


class Kinds(Small):
    """Changes an attribute of each kind after each step, and trains by them all."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.point, self.options = Phase.WARM, Point(0), Options.A
        self.counts: Any = defaultdict(lambda: 1)
        self.nested: Any = defaultdict(lambda: defaultdict(lambda: 2))
        self.fraction, self.decimal = Fraction(1), Decimal(1)
        self.path, self.when, self.span = Path("0"), datetime(2020, 1, 1), timedelta()
        self.kind, self.place, self.range = torch.float32, torch.device("meta"), range(3)
        self.by_phase = {Phase.WARM: 0, Phase.MAIN: 0}
        self.size = torch.Size([1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.point = Point(self.point.count + 1, [self.point.count])
        self.phase = Phase.MAIN if self.phase is Phase.WARM else Phase.WARM
        self.options = self.options ^ (Options.B if self.point.count % 2 else Options.C)
        self.counts[self.phase] += 1
        self.nested[self.point.count % 3]["x"] += 1
        self.fraction, self.decimal = self.fraction / 3, self.decimal / 3
        self.path, self.when = self.path / "x", self.when + timedelta(hours=1)
        self.span += timedelta(seconds=1)
        self.kind = torch.float64 if self.kind is torch.float32 else torch.float32
        self.place = torch.device("cpu")
        self.range = range(self.range.stop, self.range.stop + 2)
        self.by_phase[self.phase] += 1
        self.size = torch.Size([self.point.count])
        seen = self.counts["new"], self.nested["new"]["y"]
        values = [value for name, value in vars(self).items() if name in KINDS]
        plain = [dict(value) if isinstance(value, defaultdict) else value for value in values]
        assert self.place.type == "cpu"
        self.factor = 1.0 + pull((seen, plain))


KINDS = ("phase", "point", "options", "counts", "fraction", "decimal", "path", "when", "span", "kind", "range",
         "by_phase", "size")  # fmt: skip


class Shares(Small):
    """Steps that change what two attributes share; the values differ between shards.

    Args:
        kind: what is shared, and how.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = self.second = [0.0]
        self.table = {"a": self.first, "b": [1.0]}
        self.tensor = self.same = torch.zeros(2)
        self.bag = self.other = types.SimpleNamespace(value=0.0)
        self.counts: Any = defaultdict(lambda: 1.0)
        self.state = State(0, torch.zeros(()))
        self.recent, self.last = deque([0.0], maxlen=2), [0.0]
        self.meter = Meter()

    def on_train_epoch_start(self) -> None:
        self.meter = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        value = loss.item()
        if self.kind == "list":
            self.second[0] += value
        elif self.kind == "in a dict":
            self.table["a"][0] += value
            self.table["b"][0] += 1
        elif self.kind == "tensor":
            self.same += value
        elif self.kind == "object":
            self.other.value += value
        elif self.kind == "unchanged":
            self.recent = self.table["b"]  # type: ignore[assignment]
            self.last = [value]
        elif self.kind == "replaced":
            self.second = [self.first[0] + value]
        elif self.kind == "factory":
            self.counts["x"] += value
        elif self.kind == "slots":
            self.state = replace(self.state, count=self.state.count + 1, mean=0.9 * self.state.mean + loss.detach())
        elif self.kind == "made anew":
            self.meter.count += 1
            self.meter.total += value
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.first[0] += 0.1
        self.tensor += 0.1
        self.bag.value += 0.1
        self.table["b"][0] += 0.1
        values = [self.first, self.second, self.table, self.same.sum().item(), self.other.value, self.counts["y"]]
        values += [list(self.counts.values()), self.state.count, float(self.state.mean), list(self.recent), self.last]
        values += [self.meter.count, float(self.meter.total)]
        self.factor = 1.0 + pull(values)
        if self.trainer.global_rank == 0:
            print(f"after {self.global_step}: {self.meter.count} {self.state.count}", flush=True)


class Sets(Small):
    """Sets something in a step that is no plain value."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self.head(self.backbone(batch[0]))
        self.distribution = torch.distributions.Categorical(logits=scores.detach())
        return nn.functional.cross_entropy(scores, batch[1])


class OnOneRank(Small):
    """Changes attributes in hooks, on one rank alone or on each.

    Args:
        kind: which.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.which, self.folder, self.begun = kind, "", 0.0
        self.norms: list[float] = []
        self.table: Any = {"values": [0.0]}
        self.device_of_rank = f"device {os.environ['LOCAL_RANK']}"

    def on_train_epoch_start(self) -> None:
        self.begun = time.perf_counter()
        if self.which == "number" and self.global_rank == 0:
            self.factor *= 1.1
        elif self.which == "in a dict" and self.global_rank == 1:
            self.table["values"][0] += 1.0
        elif self.which == "alike":
            self.factor *= 1.1

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        if self.global_rank == 0:
            self.norms.append(outputs["loss"].item())
