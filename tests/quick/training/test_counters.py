"""Numbers that steps add to: what the source tells of them, what a trial tells, and how shards are combined."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from labtrain.checkpoints.structure import STATE, check
from labtrain.record.digests import PLACE
from labtrain.training.state.counters import (
    AMOUNTS,
    CALLS,
    SOME_CALLS,
    Added,
    Counters,
    Trial,
    added_to,
    kinds_of,
)

CPU = torch.device("cpu")


class Meter:
    """Adds in each form, in no order."""

    def step(self, batch: Any) -> None:
        self.steps += 1
        self.seen -= len(batch)
        self.total = self.total + batch.sum()
        self.reverse = batch.sum() + self.reverse
        if len(batch) > 3:
            self.large += 1
        for _ in batch:
            self.each += 1
        self.last = batch
        self.scaled *= 2
        self.minus = 1 - self.minus
        self.items[0] += 1

    def twice(self) -> None:
        self.steps += 1

    def anew(self, batch: Any) -> None:
        if batch is None:
            self.within = 0
        self.within += len(batch)

    def reset(self) -> None:
        self.seen, self.total = 0, 0.0


def test_the_source_tells_what_methods_add_to() -> None:
    assert added_to(Meter) == {
        "steps": CALLS,
        "seen": AMOUNTS,
        "total": AMOUNTS,
        "reverse": AMOUNTS,
        "large": SOME_CALLS,
        "each": SOME_CALLS,
    }


def test_of_code_without_a_source_nothing_is_known() -> None:
    space: dict[str, Any] = {}
    exec("class Dark:\n    def step(self):\n        self.steps += 1\n", space)
    assert added_to(space["Dark"]) == {}
    assert added_to(nn.Linear) == {}  # torch's own


class Model(nn.Module):
    """Adds what it is told to."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__()
        vars(self).update(numbers)

    def step(self, added: Any) -> None:
        self.value += added


def combined(start: Any, kind: str, *amounts: Any, samples: tuple[int, ...] = (2, 1)) -> Any:
    """Return what is left of a number, after a step on one rank and on a rank that had no shard."""
    left = []
    rows = []
    for works in (True, False):
        model = Model(value=start if not torch.is_tensor(start) else start.clone())
        counters = Counters(model, CPU, {"train": {("", "value"): kind}})
        counters.begin("train")
        if works:
            for size, amount in zip(samples, amounts, strict=True):
                model.step(amount)
                rows.append(counters.take(size))
                assert len(rows[-1]) == counters.width
        counters.end(rows)
        left.append(model.value)
    assert type(left[0]) is type(left[1])
    assert np.array_equal(np.asarray(left[0]), np.asarray(left[1]))
    return left[0]


def test_shards_are_added() -> None:
    assert combined(5, "sum", 2, 3) == 10
    assert combined(5, "count", 2, 3) == 10
    assert combined(0, "sum", torch.tensor(2), torch.tensor(3)).equal(torch.tensor(5))
    assert combined(torch.zeros(2), "sum", torch.ones(2), torch.ones(2)).equal(torch.tensor([2.0, 2.0]))
    assert combined(0, "sum", np.int64(2), np.int64(3)) == 5
    assert type(combined(0, "sum", np.int64(2), np.int64(3))) is int


def test_a_mean_weighs_samples_and_counts_a_batch_once() -> None:
    assert combined(1.0, "mean", 3.0, 6.0) == 5.0
    assert combined(7, "mean", 1, 1) == 8
    assert type(combined(7, "mean", 1, 1)) is int


@pytest.mark.parametrize("made", ["text", None, True, torch.ones(3), [1]])
def test_what_is_no_amount_is_left_as_it_is(made: Any) -> None:
    model = Model(value=1)
    counters = Counters(model, CPU, {"train": {("", "value"): "sum"}})
    counters.begin("train")
    model.value = made
    row = counters.take(1)
    assert model.value is made
    counters.end([row, row])
    assert model.value is made


def test_integers_that_became_floats_are_not_counted() -> None:
    """Nothing is known of a loss: it may be a mean."""
    model = Model(value=0)
    counters = Counters(model, CPU, {"train": {("", "value"): "count"}})
    counters.begin("train")
    model.step(0.5)
    counters.end([counters.take(1)])
    assert model.value == 0.5


def test_a_tensor_keeps_its_identity_and_version() -> None:
    value = torch.zeros(2)
    model = Model(value=value)
    counters = Counters(model, CPU, {"train": {("", "value"): "sum"}})
    counters.begin("train")
    version = value._version
    model.step(1)
    row = counters.take(1)
    assert model.value is value
    assert value._version == version
    counters.end([row, row])
    assert model.value is value
    assert value.tolist() == [2.0, 2.0]


def test_a_trial_tells_sums_and_means_apart() -> None:
    model = Model(value=0.5)
    found = []
    for whole, first, second in ((6.0, 2.0, 4.0), (3.0, 2.0, 3.5), (0.0, 0.0, 0.0), (9.0, 1.0, 2.0)):
        trial, added = Trial(Counters(model, CPU, {}), training=True), list[Added]()
        for amount in (whole, first, second):
            model.value = 0.5
            trial.begin()
            model.step(amount)
            trial.end()
            added.append(trial.added)
        trial.compare(*added, share=1 / 3)
        found.append(trial.kinds().get(("", "value")))
    assert found == ["sum", "mean", "other", "other"]
    assert Trial(Counters(model, CPU, {}), training=False).kinds() == {("", "value"): "unknown"}


def test_a_number_that_no_trial_has_told_is_found_when_shards_add_to_it() -> None:
    model = Model(value=0.0)
    counters = Counters(model, CPU, {"validate": {("", "value"): "unknown"}})
    for amount, unknown in ((0.0, []), (1.5, [("", "value")])):
        counters.begin("validate")
        rows = []
        for _ in range(2):
            model.step(amount)
            rows.append(counters.take(1))
        assert counters.unknown(rows) == unknown
        counters.end(rows, {("", "value"): "mean"})
    assert model.value == 1.5


def test_other_numbers_that_depend_on_the_number_of_calls_are_named() -> None:
    model = Model(value=0, items={"n": 0, "calls": 0, "loss": 0.0}, text="", nested=[[0]])
    model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    named = []
    for training in (True, False):
        trial, added = Trial(Counters(model, CPU, {}), training=training), list[Added]()
        for samples, loss in ((4, 1.0), (2, 0.5), (2, 1.5)):
            trial.begin()
            model.items["n"] += samples
            model.items["calls"] += 1
            model.items["loss"] += loss
            model.nested[0][0] += samples
            model.seen += samples
            trial.end()
            added.append(trial.added)
        trial.compare(*added, share=0.5)
        named.append(trial.unlike)
    assert named == [{"items['n']", "nested[0][0]", "seen"}, {"items['n']", "items['loss']", "nested[0][0]", "seen"}]


def test_a_checkpoint_holds_the_kinds_and_refuses_others() -> None:
    counters = Counters(Model(value=1), CPU, {"train": {("", "value"): "sum"}, "validate": {}})
    state = counters.state()
    assert state == {"train": {"": {"value": "sum"}}, "validate": {}}
    assert kinds_of(state) == counters.kinds
    assert Counters(nn.Linear(1, 1), CPU, {"train": {}}).state() == {}
    form: Any = STATE[PLACE]
    check(state, form["counters?"])
    for forged in ({"train": {"": {"value": "product"}}}, {"train": {"": {"value": 1}}}, {"train": [1]}, [1]):
        with pytest.raises(ValueError, match=r"."):
            check(forged, form["counters?"])


def test_a_number_that_a_hook_changes_in_mid_step_is_left_to_the_hook() -> None:
    model = Model(value=1)
    counters = Counters(model, CPU, {"train": {("", "value"): "sum"}})
    counters.begin("train")
    model.value = 7
    counters.rebase()
    model.step(1)
    assert counters.take(1) == []
    counters.end([[], []])
    assert model.value == 8
