"""Plain attributes of a model: found, saved, put back, and named where they cannot be kept."""

import io
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from labtrain.exact.attributes import fingerprints, plain_attributes, restore, snapshot, unkept

CPU = torch.device("cpu")


class Average:
    """Shadow weights, kept by an object that is no module."""

    def __init__(self, module: nn.Module) -> None:
        self.decay, self.updates = 0.9, 0
        self.shadow = {name: weight.detach().clone() for name, weight in module.named_parameters()}


class Bare(list[int]):
    """A list with something of its own."""


class Colour(Enum):
    RED = 1


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        self.accuracy = torchmetrics.MeanMetric()
        self.scores = torchmetrics.MetricCollection([torchmetrics.MeanMetric()])
        self.steps, self.phase, self.best = 0, "warm-up", None
        self.losses: list[Any] = []
        self.average = Average(self.net)
        self.weights, self.first = list(self.net.parameters()), [self.net[0].weight.detach()]
        self.loss, self.colour = nn.functional.cross_entropy, Colour.RED
        self.make = partial(torch.optim.SGD, lr=0.1)


def names(model: nn.Module) -> set[str]:
    return {name for name in plain_attributes(model) if not name.startswith("net.")}


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_plain_attributes_are_those_of_the_experiment() -> None:
    """Numbers, strings, None, Enums and containers count; parameters, metrics, functions and Lightning's fields do not."""
    found = names(Model())
    average = {"average.decay", "average.updates", "average.shadow"}
    assert found == {"steps", "phase", "best", "losses", "colour", *average}
    assert plain_attributes(Model())["net.1.p"] == 0.1


VALUES: dict[str, Any] = {
    "number": 3,
    "complex": 1 + 2j,
    "text": "warm",
    "bytes": b"raw",
    "nothing": None,
    "tensor": torch.arange(3.0),
    "bfloat": torch.ones(2, dtype=torch.bfloat16),
    "sparse": torch.eye(2).to_sparse(),
    "array": np.arange(6, dtype=np.float64).reshape(2, 3),
    "mask": np.array([True, False]),
    "numpy number": np.float32(0.1),
    "list": [1, [2.5, "x"], (torch.ones(1), None)],
    "dict": {("a", 1): [1], 2: "b"},
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("abca"),
    "default": defaultdict(list, x=[1]),
    "set": {3, 1},
    "frozen": frozenset({"a"}),
    "deque": deque([1, 2], maxlen=2),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(name: str) -> None:
    """Each kind of plain value, its type included, comes back from a file that loads without running code."""
    model, other = Model(), Model()
    model.losses = VALUES[name]
    before = fingerprints(model)["losses"]
    assert restore(other, through_a_file(snapshot(model)), device=CPU) == []
    assert type(other.losses) is type(model.losses)
    assert fingerprints(other)["losses"] == before
    if name == "deque":
        assert other.losses.maxlen == 2
    if name == "default":
        assert other.losses["new"] == []


def test_only_what_changed_is_in_a_snapshot_that_is_unlike_another() -> None:
    """What is as it was when the training began is left out, in the objects of the model too."""
    model = Model()
    before = fingerprints(model)
    model.steps += 1
    model.average.updates += 1
    model.average.shadow["0.weight"] *= 0.5
    model.net[1].p = 0.2
    found = snapshot(model, unlike=before)
    assert {path: set(values) for path, values in found.items()} == {
        "": {"steps"},
        "net.1": {"p"},
        "average": {"updates", "shadow"},
    }
    other = Model()
    restore(other, through_a_file(found), device=CPU)
    assert other.average.updates == 1
    assert torch.equal(other.average.shadow["0.weight"], model.average.shadow["0.weight"])


def test_what_was_one_object_is_one_again() -> None:
    """Two attributes that hold one list still hold one after they are put back, and a list may hold itself."""
    model, other = Model(), Model()
    model.losses = model.net.seen = [1]  # type: ignore[assignment]
    model.losses.append(model.losses)
    restore(other, through_a_file(snapshot(model)), device=CPU)
    assert other.losses is other.net.seen
    assert other.losses[1] is other.losses


def test_a_tensor_that_an_optimizer_holds_stays_the_same_object() -> None:
    """A leaf that requires a gradient, SAC's log_alpha, is changed in place: the optimizer goes on with it."""
    model, other = Model(), Model()
    for each in (model, other):
        each.alpha, each.betas = torch.zeros(1, requires_grad=True), [torch.zeros(1, requires_grad=True)]
    held = other.alpha, other.betas[0]
    with torch.no_grad():
        model.alpha += 1
        model.betas[0] += 2
    restore(other, through_a_file(snapshot(model)), device=CPU)
    assert other.alpha is held[0]
    assert other.betas[0] is held[1]
    assert (other.alpha.item(), other.betas[0].item()) == (1.0, 2.0)


def test_what_belongs_to_an_object_of_the_training_is_reported() -> None:
    """An object that was made during the training is not there in a new process: its attributes are returned."""
    model = Model()
    model.later = Average(model.net)
    missing = restore(Model(), through_a_file(snapshot(model)), device=CPU)
    assert missing == ["later.decay", "later.updates", "later.shadow"]


def test_what_cannot_be_kept_is_named_and_nothing_else(tmp_path: Path) -> None:
    """Generators, iterators, files and lists of one's own kind are named; functions, metrics and enums are not."""
    model = Model()
    assert list(unkept(model)) == []
    with (tmp_path / "log").open("w") as file:
        model.rng = np.random.default_rng(0)
        model.average.draws = random.Random(0)  # type: ignore[attr-defined]
        model.generators = {"noise": torch.Generator()}
        model.cycle = itertools.cycle([1, 2])
        model.file, model.bare = file, Bare()
        assert [name for name, _ in unkept(model)] == [
            "rng",
            "generators['noise']",
            "cycle",
            "file",
            "bare",
            "average.draws",
        ]
