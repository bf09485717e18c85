"""Steps that do more than compute a loss: more of tests/quick/training/test_steps.py, each a training or several."""

import pytest

from tests.support.exact import Runner, exchanges, outcome
from tests.support.steps import ALIKE, CHANGES, model, one_and_two, refused


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind not in ALIKE])
def test_a_parameter_that_a_step_changes_is_refused(kind: str, world: int, runner: Runner) -> None:
    refused(runner, kind, world)


@pytest.mark.parametrize("kind", ALIKE)
def test_a_parameter_that_all_shards_change_alike_is_exact(kind: str, runner: Runner, other: Runner) -> None:
    one_and_two(runner, other, model("Changes", kind))


@pytest.mark.parametrize(("world", "last"), [(2, 3), (3, 2), (4, 5)])
def test_ranks_begin_their_exchanges_in_one_order(world: int, last: int, runner: Runner) -> None:
    """NCCL hangs where there are two; tests/full has each size of the last batch."""
    assert exchanges(runner, world=world, last=last)


def test_a_smaller_last_batch_trains_with_batchnorm(runner: Runner, other: Runner) -> None:
    one_and_two(runner, other, model("Normed", data={"size": 35, "batch_size": 8}))


def test_buffers_of_dtypes_that_are_not_sent(runner: Runner, other: Runner) -> None:
    """Three ranks, of which one has no shard of the last batch."""
    config = model("Typed")
    assert outcome(other.run(config, world=3)) == outcome(runner.run(config))


def test_a_layers_attribute_that_is_first_set_after_some_steps(runner: Runner, other: Runner) -> None:
    """It counts once a step, on any number of devices."""
    one_and_two(runner, other, model("Anneals"))


@pytest.mark.parametrize("world", [1, 2])
def test_a_layer_without_a_shape_is_refused(world: int, runner: Runner) -> None:
    runner.run(model("Lazy"), world=world, code=None if world > 1 else 2)
    assert "error: inp.weight of a lazy layer has no shape before the first batch" in runner.said()
    assert "Traceback" not in runner.said()


def test_a_shard_does_not_end_the_training(runner: Runner, other: Runner) -> None:
    """Devices would end it at steps of their own; what the hint says ends all at one."""
    runner.run(model("Stops", "step"), code=2)
    assert "error: training_step sets trainer.should_stop: a single shard would decide for all" in runner.said()
    assert "hint: set it in on_train_batch_end, from self.trainer.callback_metrics" in runner.said()
    assert 0 < one_and_two(runner, other, model("Stops", "hook"))["steps"] < 10
