"""State that a step reaches without an attribute: seen by two looks, and refused with shards."""

import signal
from typing import Any

import numpy as np
import pytest
import torch

from labtrain.base.errors import EXIT_STOPPED
from labtrain.training.state.snapshots import look, unlike
from labtrain.training.state.undo import Undo
from tests.support.exact import Runner
from tests.support.reaching_models import Reaching
from tests.support.steps import model, one_and_two

NAMES = {
    "slots": "kept.calls",
    "closure": "counter.count.calls",
    "subclass": "kept.calls",
    "method": "kept.__self__.calls",
    "numpy generator": "kept",
    "random": "kept",
    "torch generator": "kept",
    "bytes": "kept",
    "array": "kept",
    "count": "kept.0",
    "iterator": "kept.1",
    "local": "kept.calls",
    "partial": "kept.args.0",
    "default": "default.defaults.0",
    "global": "tests.support.reaching_models.table.calls",
    "class": "Reaching.total",
    "hyperparameters": "hparams.calls",
    "tag": "inp.weight.calls",
    "module": "kept.net.weight",
    "view": "view",
}


@pytest.mark.parametrize("kind", NAMES)
def test_two_looks_show_what_a_step_has_changed(kind: str) -> None:
    """Wherever it lies, it is named; and it is put back, but for where an iterator stands."""
    step, images = Reaching(kind), torch.ones(2, 6, 6)
    step.inp.weight.calls = 0  # type: ignore[attr-defined]
    before, undo = look(step), Undo([step])
    assert before is not None
    step.value(images)
    after = look(step)
    assert after is not None
    assert NAMES[kind] in unlike(before, after)
    undo()
    again = look(step)
    assert again is not None
    assert (unlike(before, again) == []) is (kind not in ("count", "iterator"))


def test_a_list_that_grows_has_not_changed() -> None:
    """It may hold numbers or anything else, and be longer than what has one fingerprint."""
    step = Reaching("cache")
    for values in ([1.0] * 60, [step.inp], [1.0] * 130):
        step.kept = values
        before = look(step)
        values += [2.0] * 70  # type: ignore[list-item]
        after = look(step)
        assert before is not None
        assert after is not None
        assert unlike(before, after) == []
        values[10 if len(values) > 100 else 0] = 5.0
        changed = look(step)
        assert changed is not None
        assert unlike(before, changed)


@pytest.mark.parametrize("make", [lambda size: torch.zeros(size, 64), lambda size: np.zeros((size, 64))])
def test_of_a_large_tensor_or_array_a_part_is_looked_at(make: Any) -> None:
    """A change of most of it is seen; a map of a file larger than memory is not read as a whole."""
    step = Reaching("cache")
    for size in (1, 1 << 17):
        step.kept = (make(size),)
        before = look(step)
        step.kept[0][:] = 1
        after = look(step)
        assert before is not None
        assert after is not None
        assert unlike(before, after) == ["kept.0"]


@pytest.mark.parametrize(("kind", "world"), [("closure", 1), ("numpy generator", 1), ("global", 2)])
def test_it_is_refused_before_the_first_update(kind: str, world: int, runner: Runner) -> None:
    """By name; without this it counted four, two or one a step, with exit code 0."""
    runner.run(model("Reaching", kind, module="reaching_models"), world=world, code=None if world > 1 else 2)
    assert f"training_step changes {NAMES[kind]}" in runner.said().replace("tests.support.reaching_models.calls; ", "")
    assert "hint: change it in on_train_batch_end" in runner.said()
    assert not any(path.read_text() for path in runner.folder.glob("runs/*/*/trail.jsonl"))


def test_what_is_computed_once_is_no_change(runner: Runner, other: Runner) -> None:
    """A table that the first step fills, and the next ones read, trains to the same bits on two devices."""
    one_and_two(runner, other, model("Reaching", "cache", module="reaching_models"))


def test_what_no_checkpoint_holds_is_named_when_it_is_saved_and_when_a_training_goes_on(runner: Runner) -> None:
    """A replaced activation and loss, a function of torch's, a forward hook, closures of the model and of a scheduler.

    A resume forgot each without a word.
    """
    config = model("Replacing", "replaces", module="reaching_models")
    names = (
        "Replacing.configure_optimizers.falls.factor; block.1; counter.count.calls; inp._forward_hooks; loss; squash"
    )
    runner.run(config, code=EXIT_STOPPED, signal_at=f"5 {int(signal.SIGTERM)} 0")
    assert f"warning: the training changes {names}, which no checkpoint holds" in runner.said()
    run_dir = runner.run(config)
    assert run_dir is not None
    said = f"the training changed {names}, which its"
    assert f"warning: {said}" in runner.said()
    assert said in (run_dir / "receipt.json").read_text()


def test_a_training_that_changes_nothing_of_the_kind_says_nothing(runner: Runner) -> None:
    """Weights, statistics, attributes and what Lightning keeps for itself are held, so nothing is named."""
    config = model("Replacing", "plain", module="reaching_models")
    runner.run(config, code=EXIT_STOPPED, signal_at=f"5 {int(signal.SIGTERM)} 0")
    assert runner.run(config) is not None
    assert all("no checkpoint holds" not in log.read_text() for log in runner.logs)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("history", "loss of a shard depends on history, which the shard before it changed"),
        ("bank", "loss of a shard depends on history, which the shard before it changed"),
        ("engine", "changes engine."),
        ("loader", "changes others._num_yielded"),
    ],
)
def test_what_a_later_shard_reads_of_one_before_is_refused(kind: str, what: str, runner: Runner) -> None:
    """A list that grows and is read, a sequence of torch's, an iterator over another loader: silent before."""
    runner.run(model("Reading", kind, module="reaching_models"), code=2)
    assert f"error: training_step's {what}" in runner.said() or f"error: training_step {what}" in runner.said()


@pytest.mark.parametrize("kind", ["view", "table", "appends"])
def test_what_each_shard_leaves_alike_is_exact(kind: str, runner: Runner, other: Runner) -> None:
    """A view that is changed in place from the third step on; a buffer that is made anew, longer; a list."""
    one_and_two(runner, other, model("Reading", kind, module="reaching_models"))


def test_a_callback_without_a_state_is_named(runner: Runner) -> None:
    """Its average of the weights began anew in a resume, with exit code 0."""
    config = model("Reading", "appends", module="reaching_models")
    for name in ("shadow", "another"):
        config["callbacks"][name] = {"_target_": "tests.support.reaching_models.Shadow"}
    runner.run(config, code=EXIT_STOPPED, signal_at=f"5 {int(signal.SIGTERM)} 0")
    assert "warning: the training changes Shadow#1.shadow.block.0.bias; Shadow#1.shadow.block.0.weight" in runner.said()
    assert "; Shadow.shadow.block.0.bias; Shadow.shadow.block.0.weight; and 4 more" in runner.said()
