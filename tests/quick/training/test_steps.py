"""Steps that do more than compute a loss: right on any number of devices, or refused before the first update."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.exact.attributes import hidden_weights
from labtrain.training.state.step_changes import Watch
from tests.support import step_models
from tests.support.exact import Runner, exchanges, outcome
from tests.support.steps import ALIKE, CHANGES, model, one_and_two, refused


def notes(runner: Runner) -> list[str]:
    receipt = json.loads(next(runner.folder.glob("runs/*/*/receipt.json")).read_text())
    return list(receipt["determinism"]["notes"])


@pytest.mark.parametrize("kind", ["in place", "every third", "kept"])
def test_gradients_that_code_keeps_are_not_overwritten(kind: str, runner: Runner, other: Runner) -> None:
    """The next step's sums do not use memory that a gradient, or what was made of it, still has."""
    trail = one_and_two(runner, other, model("Zeroed", kind))["trail"]
    assert len({line["gradients"] for line in trail}) == len(trail)


def test_a_block_under_reentrant_checkpointing_gets_the_gradient_of_all_its_uses(runner: Runner, other: Runner) -> None:
    one_and_two(runner, other, model("Reentrant", "three"))


def test_a_block_used_more_often_than_before_is_an_error_on_several_devices(runner: Runner) -> None:
    runner.run(model("Reentrant", "more and more"), world=2, code=None)
    assert "reentrant checkpointing used it more often than in any step before" in runner.said()
    assert "hint: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)" in runner.said()


@pytest.mark.parametrize("size", [33, 34, 37])
def test_a_smaller_last_batch_trains_with_batchnorm(size: int, runner: Runner, other: Runner) -> None:
    """Last batches of 1 (refused), 2 and 5 samples, of 8 in 4 shards."""
    config = model("Normed", data={"size": size, "batch_size": 8})
    if size == 33:
        runner.run(config, code=2)
        assert "the last batch of an epoch gives BatchNorm1d 1 sample" in runner.said()
        assert "drop_last=True" in runner.said()
        return
    one_and_two(runner, other, config)


def test_a_full_batch_of_single_samples_is_refused_with_batchnorm(runner: Runner) -> None:
    runner.run(model("Normed", data={"size": 35, "batch_size": 7}), code=2)
    assert "batch_size=7 gives BatchNorm shards of 1 sample" in runner.said()
    assert "hint: data.batch_size=8 or more, or fewer determinism.shards" in runner.said()


def test_manual_accumulation_trains(runner: Runner) -> None:
    """It was taken for a stop at step 0."""
    config = model("Manual", determinism={"shards": None}, data={"size": 40, "batch_size": 4})
    assert outcome(runner.run(config))["steps"] == 10


def test_the_trail_has_the_loss_of_an_accumulated_step(runner: Runner, other: Runner) -> None:
    """The mean over its batches: with a learning rate of 0 that is the mean of the losses of single steps."""
    config = model("Still", data={"size": 36, "batch_size": 6}, trainer={"max_epochs": 1})
    losses = torch.tensor([line["loss"] for line in outcome(runner.run(config))["trail"]])
    config["trainer"]["accumulate_grad_batches"] = 3
    found = [line["loss"] for line in outcome(other.run(config))["trail"]]
    assert found == (losses / 3).double().view(2, 3).sum(1).tolist()


@pytest.mark.parametrize("kind", CHANGES)
def test_a_parameter_that_a_step_changes_is_found(kind: str) -> None:
    """By name, whichever way it is changed; if all shards change it alike, it is changed once."""
    module, once, found = step_models.Changes(kind), step_models.Changes(kind), list[str]()
    once.load_state_dict(module.state_dict())
    for name, weight in hidden_weights(once).items():
        weight.data.copy_(hidden_weights(module)[name])
    place: Any = {"device": torch.device("cpu"), "rank": 0, "world": 1}
    watch = Watch(module, **place, judge=lambda what, _: found.append(what), say=found.append)
    watch.begin()
    for shard in range(2):
        if shard:
            watch.restore()
        module.training_step((torch.randn(4, 1, 6, 6), torch.tensor([0, shard, 2 * shard, 0])), 0)
        watch.leave(shard, 1, last=shard == 1)
    watch.end(watch.numbers, [range(2)])
    if kind not in ALIKE:
        assert [text.partition(":")[0] for text in found] == [f"training_step changes {CHANGES[kind]}"]
        return
    once.training_step((torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])), 0)
    expected, left = ({**model.state_dict(), **hidden_weights(model)} for model in (once, module))
    assert all(torch.equal(left[name], weight) for name, weight in expected.items())
    assert not found


def test_a_list_that_steps_append_to_and_change_is_refused() -> None:
    """A pool of generated images: each device has the items of its own shards."""
    module, found, said = step_models.Changes("average"), list[str](), list[str]()
    place: Any = {"device": torch.device("cpu"), "rank": 0, "world": 1}
    watch = Watch(module, **place, judge=lambda what, _: found.append(what), say=said.append)
    module.pool = []
    for step in range(3):
        watch.begin()
        for shard in range(2):
            if shard:
                watch.restore()
            if step < 2:
                module.pool.append(torch.full((2,), float(shard)))
            else:
                module.pool[0] = torch.full((2,), float(shard))
            watch.leave(shard, 1, last=shard == 1)
        watch.end(watch.numbers, [range(2)])
        assert bool(found) == (step == 2)
    assert found[0].startswith("training_step changes items of pool, to which it has also appended")


@pytest.mark.parametrize("world", [1, 2])
def test_a_parameter_that_a_step_changes_is_refused(world: int, runner: Runner) -> None:
    refused(runner, "max_norm", world)


@pytest.mark.parametrize("kind", ["average", "silent"])
def test_one_that_all_shards_change_alike_is_exact(kind: str, runner: Runner, other: Runner) -> None:
    """Also a target that is first changed in a later step: no optimizer updates it."""
    changes = model("Changes", kind, model={"since": 4 if kind == "average" else 0}, data={"size": 34, "batch_size": 8})
    alone = one_and_two(runner, other, changes)
    assert alone["steps"] == 10


def test_one_that_a_later_step_changes_stops_that_step(runner: Runner) -> None:
    """labtrain has no copy of weights that an optimizer updates, unless the first step changes them."""
    runner.run(model("Changes", "silent", model={"since": 4}), code=2)
    assert "training_step changes" in runner.said()
    assert len(next(runner.folder.glob("runs/*/*/trail.jsonl")).read_text().splitlines()) == 4


def test_with_one_shard_a_step_may_change_what_it_likes(runner: Runner) -> None:
    assert outcome(runner.run(model("Changes", "average", determinism={"shards": 1})))["steps"] == 10


@pytest.mark.parametrize(("kind", "name", "world"), [("queue", "queue", 2), ("none, unlike", "center", 1)])
def test_a_buffer_that_shards_leave_differently_is_refused(kind: str, name: str, world: int, runner: Runner) -> None:
    runner.run(model("Buffered", kind), world=world, code=None if world > 1 else 2)
    assert f"buffer {name} of Buffered (torch.float32) differs between the shards of a step" in runner.said()
    assert "determinism.shards=1" in runner.said()
    assert "floating-point" not in runner.said()


@pytest.mark.parametrize("kind", ["alike", "none", "new", "new statistic", "spectral"])
def test_other_buffers_do_not_depend_on_the_devices(kind: str, runner: Runner, other: Runner) -> None:
    """One that all shards change alike, one that was None or absent at first, and what spectral normalisation keeps."""
    one_and_two(runner, other, model("Buffered", kind, data={"size": 34, "batch_size": 8}))


@pytest.mark.parametrize("kind", ["equal", "late"])
def test_equal_changes_of_attributes_count_once(kind: str, runner: Runner, other: Runner) -> None:
    """Numbers, texts, dicts, lists, tensors, arrays, Enums, named tuples, and an object's: once a step, on any devices."""
    config = model("Counting", kind, data={"size": 34, "batch_size": 8})
    one_and_two(runner, other, config)
    steps = 10 if kind == "equal" else 7
    for each in (runner, other):
        assert f"after 10: {steps} {' '.join([str(steps if kind == 'equal' else 0)] * 3)}" in each.said()
        assert not [note for note in notes(each) if "training_step sets" in note]


def test_attributes_that_differ_between_shards_are_the_last_shards_and_said(runner: Runner, other: Runner) -> None:
    one_and_two(runner, other, model("Counting", "unlike", data={"size": 34, "batch_size": 8}))
    for each in (runner, other):
        said = [note for note in notes(each) if "training_step sets" in note]
        assert len(said) == 1
        assert said[0].startswith("training_step sets last_loss, and its value differs between the 4 shards of a step")


def test_lists_may_grow(runner: Runner) -> None:
    """With one item a shard: 2 epochs of 4 batches of 4 shards and one of 2 samples in one."""
    assert outcome(runner.run(model("Counting", "grows", data={"size": 34, "batch_size": 8})))
    assert "after 10: 0 0 0 0 34" in runner.said()


def test_all_gather_in_a_step_is_refused(runner: Runner) -> None:
    runner.run(model("Together", "all_gather"), code=2)
    assert "self.all_gather in a step" in runner.said()
    assert "hint: labtrain.gather(tensor)" in runner.said()


def test_a_step_does_not_see_the_other_ranks(runner: Runner, other: Runner) -> None:
    """torch.distributed is as on one device, so code that asks for it computes the same."""
    one_and_two(runner, other, model("Together", "asks"))


def test_weights_that_differ_between_ranks_are_an_error(runner: Runner) -> None:
    """Found at the next checkpoint, with the tensor's name."""
    config = model("Step", checkpoint={"every_n_steps": 1})
    config["callbacks"]["drift"] = {"_target_": "tests.support.step_models.Drift"}
    runner.run(config, world=2, code=None)
    assert "block.0.weight differs between the ranks" in runner.said()


def test_without_guard_nothing_is_watched(runner: Runner) -> None:
    """determinism.mode=off."""
    run_dir = runner.run(model("Changes", "average", determinism={"mode": "off"}))
    assert isinstance(run_dir, Path)


def test_ranks_begin_their_exchanges_in_one_order(runner: Runner) -> None:
    """NCCL hangs where they do not; here a rank has no shard in the last batch."""
    assert len(exchanges(runner, world=3, last=5)) > 10
