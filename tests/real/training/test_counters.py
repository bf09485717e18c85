"""Numbers that steps add to by hand: as in plain Lightning, on any number of devices, killed and moved."""

from typing import Any

from tests.support.exact import Runner, outcome, tell
from tests.support.steps import model


def counting(kind: str = "plain", **more: Any) -> Any:
    return model("Counting", kind, module="counter_models", **more)


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


def test_the_values_are_those_of_one_shard(runner: Runner, other: Runner) -> None:
    """In float64. What differs is the order of additions: bound 1e-12."""
    several, one = (
        outcome(each.run(counting(determinism={"shards": shards})))["metrics"]
        for each, shards in ((runner, 4), (other, 1))
    )
    unlike = {name: (value, one[name]) for name, value in several.items() if abs(value - one[name]) > 1e-12}
    assert not unlike


def test_an_amount_that_is_neither_a_sum_nor_a_mean_is_said(runner: Runner) -> None:
    runner.run(counting("squares"))
    assert "training_step sets squares, and its value differs between the 4 shards of a step" in runner.said()
    assert "sets squares," not in runner.said().replace("training_step sets squares,", "", 1)
