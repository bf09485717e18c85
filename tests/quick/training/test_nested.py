"""Optimizers that hold an optimizer, or that the Trainer does not know, with manual optimization and shards."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import labtrain
from labtrain.training.state.optimizers import in_place, own_methods
from tests.support.exact import Runner, configure, outcome
from tests.support.nested_models import SAM, Lookahead, made


def nested(kind: str, way: str, **more: Any) -> Any:
    config = configure("mlp", "uneven", **more)
    config["model"] = {"_target_": "tests.support.nested_models.ByHand", "kind": kind, "way": way}
    return config


def test_sam_is_the_same_on_two_devices_and_after_a_kill(runner: Runner, other: Runner) -> None:
    """Its methods run once, its base optimizer's momentum is in the checkpoint, and its own counter too.

    The scheduler of its groups gives its base optimizer the rate after the resume, too.
    """
    config = nested("sam", "methods")
    reference = outcome(runner.run(config))
    assert reference["steps"] == 15
    assert "warning: global_step counts the steps of SAM.base_optimizer" in runner.said()
    config["checkpoint"]["every_n_steps"] = 1
    other.run(config, world=2, code=None, signal_at=f"7 {int(signal.SIGKILL)} 1")
    assert outcome(other.run(config)) == reference


@pytest.mark.parametrize(("kind", "way"), [("sam", "closure"), ("lbfgs", "closure")])
def test_a_closure_that_is_called_again_sees_the_whole_batch(
    kind: str, way: str, runner: Runner, other: Runner
) -> None:
    """Four shards against one, in float64: what differs is the order of additions. Bound: 1e-9 of the largest weight."""
    weights = []
    for shards, each in ((4, runner), (1, other)):
        config = nested(kind, way, determinism={"shards": shards}, trainer={"max_epochs": 1})
        config["model"] |= {"dtype": "float64", "dropout": 0.0}
        weights.append(labtrain.load_weights(str(each.run(config))))
    for name, one in weights[0].items():
        assert (one - weights[1][name]).abs().max() <= 1e-9 * one.abs().max(), name


def test_one_shard_is_what_lightning_computes(runner: Runner, other: Runner) -> None:
    """`shards: 1` counts the steps of SAM's base optimizer; the weights are those of Lightning, which does not."""
    found = []
    for shards, each in ((1, runner), (None, other)):
        config = nested("sam", "methods", determinism={"shards": shards})
        config["model"]["dropout"] = 0.0
        found.append(outcome(each.run(config)))
    assert found[0]["weights_digest"] == found[1]["weights_digest"]
    assert [each["steps"] for each in found] == [15, 0]
    assert "warning: no optimizer step was counted" in other.said()


def test_what_a_hook_counts_between_the_shards_is_counted_once(runner: Runner, other: Runner) -> None:
    config = configure("mlp", "uneven", data={"batch_size": 8}, trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.nested_models.Counting"}
    found = outcome(runner.run(config))
    assert "differ" not in runner.said()
    assert outcome(other.run(config, world=2)) == found
    (path,) = runner.folder.glob("runs/exact/*/checkpoints/step-0000000005/state.pt")
    state = torch.load(path, weights_only=True)
    assert state["labtrain"]["ranks"][0]["attributes"][""]["steps"] == 5


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("backward", "training_step calls SAM.base_optimizer.step, called directly in a backward"),
        ("differs", "the shards of a step give SAM.first_step different values, which are not numbers"),
        ("writes", "training_step changes what SGD holds: with determinism.shards=4 it runs once a shard"),
        ("returns", "the closure of optimizer.step returns a value of type Tensor"),
    ],
)
def test_what_cannot_run_once_is_refused(fault: str, says: str, runner: Runner) -> None:
    config = nested("sam", "methods")
    config["model"] = {"_target_": "tests.support.nested_models.Faulty", "fault": fault}
    runner.run(config, code=2)
    assert f"error: {says}" in runner.said()
    assert "hint: " in runner.said()


def test_a_loaded_state_stays_shared() -> None:
    """SAM shares its groups with its base optimizer, Lookahead the state too; torch's load makes new ones."""
    weights = [torch.nn.Parameter(torch.ones(3))]
    sam, ahead = made("sam", weights), made("lookahead", weights)
    states = sam.state_dict(), ahead.optimizer.state_dict()
    states[0]["param_groups"][0]["lr"] = 0.125
    with in_place({"sam": sam, "base": sam.base_optimizer, "inner": ahead.optimizer}):
        sam.load_state_dict(states[0])
        ahead.optimizer.load_state_dict(states[1])
    assert sam.base_optimizer.param_groups[0]["lr"] == 0.125
    assert sam.base_optimizer.param_groups is sam.param_groups
    assert ahead.fast_state is ahead.optimizer.state


def test_only_methods_of_people_run_once() -> None:
    """torch's zero_grad and add_param_group stay a shard's own."""
    kinds: list[Any] = [SAM, Lookahead, torch.optim.AdamW]
    assert [own_methods(kind) for kind in kinds] == [("first_step", "second_step"), (), ()]


def test_changed_options_of_an_optimizer_that_the_model_holds_take_effect(runner: Runner, tmp_path: Path) -> None:
    """As those of the Trainer's optimizers, with a sentence."""
    config = nested("adam", "own")
    config["checkpoint"]["every_n_steps"] = 1
    runner.run(config, code=None, signal_at=f"8 {int(signal.SIGKILL)} 0")
    (run_dir,) = runner.folder.glob("runs/exact/*")
    config["model"]["lr"] = 0.002
    runner.run(config | {"resume": str(run_dir)})
    assert "lr is 0.002, and was 0.01 (model.own.body)" in runner.said()
