"""A metric whose updates change more than its states is refused with shards, before the first update of the weights."""

from typing import Any

import pytest

from tests.support.exact import Runner, configure, outcome

BESIDE = {"running": "Running): an update changes its _num_vals_seen", "own": "Counting): an update changes its seen",
          "minmax": "MinMaxMetric): an update changes its min_val"}  # fmt: skip


def config(kind: str) -> Any:
    found = configure("mlp", "even", determinism={"shards": 4}, trainer={"max_epochs": 2})
    found["model"] = {"_target_": "tests.support.metric_models.Measures", "kind": kind}
    return found


@pytest.mark.parametrize("kind", BESIDE)
def test_what_a_metric_keeps_beside_its_states_is_refused(kind: str, runner: Runner) -> None:
    """torchmetrics' Running and MinMaxMetric, and a counter of one's own: their values depended on the devices."""
    runner.run(config(kind), code=2)
    assert f"error: metric ({BESIDE[kind]}, which is not a state" in runner.said()
    assert "hint: use add_state in the metric" in runner.said()
    assert not any(path.read_text() for path in runner.folder.glob("runs/*/*/trail.jsonl"))


def test_mode_off_does_not_look(runner: Runner) -> None:
    options = config("own")
    options["determinism"]["mode"] = "off"
    assert runner.run(options) is not None


@pytest.mark.parametrize("kind", ["outputs", "mean", "tracker"])
def test_other_metrics_are_exact(kind: str, runner: Runner, other: Runner) -> None:
    """A wrapper whose metrics have all in their states; a metric that a hook makes for each epoch; a MetricTracker."""
    assert outcome(runner.run(config(kind))) == outcome(other.run(config(kind), world=2))


@pytest.mark.parametrize(("kind", "step"), [("computed", "training"), ("validated", "validation")])
def test_a_metric_that_is_computed_in_a_step_is_refused(kind: str, step: str, runner: Runner) -> None:
    """It would be the mean of the shards' values, not of all that was seen."""
    runner.run(config(kind), code=2)
    assert "error: a step calls metric.compute(): the value would be of one shard" in runner.said()
    assert "hint: self.log('metric', self.metric)" in runner.said()
