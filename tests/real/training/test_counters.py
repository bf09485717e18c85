"""Numbers that steps add to by hand: as in plain Lightning, on any number of devices, killed and moved."""

import signal
from typing import Any

import pytest

from tests.support.exact import Runner, outcome, tell
from tests.support.steps import model


def counting(kind: str = "plain", name: str = "Counting", **more: Any) -> Any:
    return model(name, kind, module="counter_models", **more)


def test_one_result_on_any_number_of_devices(runner: Runner, other: Runner) -> None:
    alone = outcome(runner.run(counting()))
    metrics = alone["metrics"]
    assert {name: metrics[name] for name in ("train/seen", "train/steps", "train/confusion")} == {
        "train/seen": 2 * 37,
        "train/steps": 2 * 5,
        "train/confusion": 2 * 37,
    }
    assert metrics["train/diagonal"] == metrics["train/all_correct"]
    assert tell(other, counting(), world=4, story="moved", seed=1) == alone


@pytest.mark.parametrize("name", ["Counting", "Late", "ByHand"])
def test_the_values_are_those_of_one_shard(name: str, runner: Runner, other: Runner) -> None:
    """In float64. What differs is the order of additions: bound 1e-12."""
    sanity = {"trainer": {"num_sanity_val_steps": 1, "max_epochs": 2}}
    several, one = (
        outcome(each.run(counting(name=name, determinism={"shards": shards}, **sanity)))["metrics"]
        for each, shards in ((runner, 4), (other, 1))
    )
    unlike = {name: (value, one[name]) for name, value in several.items() if abs(value - one[name]) > 1e-12}
    assert not unlike


def test_an_amount_that_is_neither_a_sum_nor_a_mean_is_said(runner: Runner) -> None:
    runner.run(counting("squares"))
    assert "training_step sets squares, and its value differs between the 4 shards of a step" in runner.said()
    assert "sets squares," not in runner.said().replace("training_step sets squares,", "", 1)


@pytest.mark.parametrize("name", ["Late", "ByHand"])
def test_what_is_found_out_later_is_the_same_on_other_devices(name: str, runner: Runner, other: Runner) -> None:
    """Killed in the second epoch, and resumed on one device."""
    config = counting(name=name, trainer={"num_sanity_val_steps": 1, "max_epochs": 2})
    other.run(config, world=2, code=None, signal_at=f"{7 if name == 'Late' else 14} {int(signal.SIGKILL)} 0")
    assert outcome(other.run(config)) == outcome(runner.run(config))


def test_other_numbers_that_depend_on_the_number_of_shards_are_named(runner: Runner) -> None:
    runner.run(counting("items", "Late", data={"size": 40, "batch_size": 8}))
    assert "training_step adds to items['n']; of_buffer for each sample: labtrain cannot combine" in runner.said()
    runner.run(counting("squares", "Late", determinism={"mode": "warn"}))
    assert "validation_step adds to squares what is neither a sum over samples nor a mean" in runner.said()
