"""Trainings of step_models.py, and what they ought to come to."""

from typing import Any

from tests.support.exact import Runner, configure, outcome

# Ways to change a parameter in a step, and the one that is named.
CHANGES = {
    "average": "target.weight",
    "data": "target.weight",
    "silent": "out.weight",
    "numpy": "out.weight",
    "new": "out.bias",
    "frozen": "inp.weight",
    "added": "a new parameter",
    "max_norm": "table.weight",
    "hidden": "teachers.0.0.bias",
    "library": "ema.averages.0",
}


# Those that all shards do alike.
ALIKE = ("average", "data", "silent", "numpy", "hidden", "library")


def model(name: str, kind: str = "plain", /, module: str = "step_models", **more: Any) -> Any:
    groups = {"data": {"size": 37, "batch_size": 8}, "trainer": {"max_epochs": 2}} | more
    config = configure("mlp", "even", **groups)
    config["model"] = {"_target_": f"tests.support.{module}.{name}", "kind": kind} | more.get("model", {})
    return config


def one_and_two(runner: Runner, other: Runner, config: Any) -> dict[str, Any]:
    """Train on one device and on two, and return what both came to."""
    alone = outcome(runner.run(config))
    assert outcome(other.run(config, world=2)) == alone
    return alone


def refused(runner: Runner, kind: str, world: int) -> None:
    """Assert that a step which changes a parameter is refused before the first update, by name, with both cures."""
    runner.run(model("Changes", kind), world=world, code=None if world > 1 else 2)
    assert f"training_step changes {CHANGES[kind]}: with determinism.shards=4" in runner.said()
    assert "hint: change it in on_train_batch_end, which runs once a step, or determinism.shards=1" in runner.said()
    assert not any(path.read_text() for path in runner.folder.glob("runs/*/*/trail.jsonl"))
