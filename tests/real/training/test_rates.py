"""A scheduler or an optimizer's options that a step changes are refused before the first update, by name."""

from typing import Any

import pytest
import torch

from labtrain.training.state.step_changes import Rates
from tests.support.exact import Runner, configure, outcome
from tests.support.rate_models import Rates as Model

CHANGES = {
    "scheduler": "sets lr of AdamW, param group 0",
    "own scheduler": "steps StepLR",
    "lr": "sets lr of AdamW, param group 0",
}


def config(kind: str, **model: Any) -> Any:
    found = configure("mlp", "even", determinism={"shards": 4}, trainer={"max_epochs": 2})
    found["model"] = {"_target_": "tests.support.rate_models.Rates", "kind": kind, **model}
    return found


def test_each_change_is_found() -> None:
    """A number, a tensor in place, a list of parameters, a scheduler of the model's own, the state, a new group."""
    model = Model("own scheduler")
    model.automatic_optimization = False  # in automatic optimization a trial finds a changed state
    optimizer = model.configure_optimizers()
    rates = Rates(model, lambda: [optimizer], [])
    (group,) = optimizer.param_groups
    group["weight"] = torch.zeros(1)

    def found(change: Any) -> str:
        rates.begin()
        assert rates.changed() == 0
        change()
        number = rates.changed()
        return rates.names()[number - 1] if number else ""

    assert found(lambda: group.update(lr=0.05)) == ""
    assert found(lambda: group.update(lr=0.01)) == "sets lr of AdamW, param group 0"
    assert found(lambda: group["weight"].add_(1)) == "sets weight of AdamW, param group 0"
    assert found(lambda: group["params"].append(torch.zeros(1))) == "sets params of AdamW, param group 0"
    assert found(model.own.step) == "steps StepLR"
    assert found(lambda: optimizer.state[group["params"][0]].update(old=1)) == "changes what AdamW holds"
    assert found(lambda: vars(optimizer).update(count=1)) == "changes what AdamW holds"
    assert found(lambda: optimizer.add_param_group({"params": [torch.zeros(1)]})) == (
        "adds a param group to an optimizer"
    )


@pytest.mark.parametrize(("kind", "world"), [("scheduler", 2), ("own scheduler", 1), ("lr", 2)])
def test_a_step_that_changes_it_is_refused(kind: str, world: int, runner: Runner) -> None:
    runner.run(config(kind), world=world, code=None if world > 1 else 2)
    assert f"error: training_step {CHANGES[kind]}: with determinism.shards=4 it runs once a shard" in runner.said()
    assert "hint: do it in on_train_batch_end, which runs once a step, or determinism.shards=1" in runner.said()
    assert not any(path.read_text() for path in runner.folder.glob("runs/*/*/trail.jsonl"))


def test_the_hint_works(runner: Runner, other: Runner) -> None:
    """In on_train_batch_end the number of devices changes nothing."""
    options = config("lr", hook="on_train_batch_end")
    assert outcome(runner.run(options)) == outcome(other.run(options, world=2))
