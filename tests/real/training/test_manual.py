"""Manual optimization with shards: GANs and others, on 1, 2 and 4 devices, killed and moved; and against Lightning."""

import pytest
import torch

import labtrain
from tests.support.exact import Runner, outcome
from tests.support.own_code import MANUAL_IN_CI, is_exact_in_manual_optimization, manual


@pytest.mark.parametrize("model", MANUAL_IN_CI)
def test_one_result_on_any_number_of_devices(model: str, runner: Runner, other: Runner) -> None:
    is_exact_in_manual_optimization(model, runner, other)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("noise", "training_step changes the gradient of discriminator.0.weight after its backward, and not equally"),
        ("places", "the shards of a step meet at different places: shard "),
        ("clamp", "training_step changes discriminator.0.weight: with determinism.shards=4 it runs once a shard"),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_what_shards_cannot_do_together_is_refused(fault: str, says: str, world: int, runner: Runner) -> None:
    config = manual("gan")
    config["model"] = {"_target_": "tests.support.manual_models.Refused", "fault": fault}
    runner.run(config, world=world, code=2)
    assert says in runner.said()
    assert "determinism.shards=1" in runner.said()
    assert world > 1 or "Traceback" not in runner.said()


def test_an_error_in_a_step_is_raised_with_its_own_traceback(runner: Runner) -> None:
    config = manual("gan")
    config["model"] = {"_target_": "tests.support.manual_models.Refused", "fault": "raises"}
    runner.run(config, code=1)
    assert "ZeroDivisionError: in a shard's step" in runner.said()
    assert "manual_models.py" in runner.said()


@pytest.mark.parametrize("closure", [False, True])
def test_one_shard_is_what_lightning_computes(closure: bool, runner: Runner, other: Runner) -> None:
    """`shards: 1` and Lightning's plain strategy: this model draws nothing, so they have the same weights."""
    runs = []
    for shards, each in ((1, runner), (None, other)):
        config = manual("closure" if closure else "accumulated", determinism={"shards": shards})
        runs.append(outcome(each.run(config)))
    assert runs[0]["weights_digest"] == runs[1]["weights_digest"]
    assert [line["weights"] for line in runs[0]["trail"]] == [line["weights"] for line in runs[1]["trail"]]


@pytest.mark.parametrize("closure", [False, True])
def test_shards_compute_the_gradient_of_the_batch(closure: bool, runner: Runner, other: Runner) -> None:
    """Against the whole batch, in float64: what differs is the order of additions. Bound: 1e-12 of the largest weight."""
    weights = []
    for shards, each in ((4, runner), (1, other)):
        config = manual("closure" if closure else "accumulated", determinism={"shards": shards})
        config["model"] |= {"dtype": "float64"}
        weights.append(labtrain.load_weights(str(each.run(config))))
    for name, one in weights[0].items():
        assert one.dtype == torch.float64
        assert (one - weights[1][name]).abs().max() <= 1e-12 * one.abs().max(), name


def test_steps_that_lightning_does_not_count_are_counted_and_reported(runner: Runner, other: Runner) -> None:
    """With any number of shards; plain Lightning, which `shards: null` uses, counts none."""
    for shards, each in ((1, runner), (4, runner), (None, other)):
        config = manual("accumulated", determinism={"shards": shards}, trainer={"max_epochs": 1})
        config["model"] = {"_target_": "tests.support.manual_models.Uncounted"}
        assert outcome(each.run(config))["steps"] == (0 if shards is None else 5)
        counted = "warning: global_step counts the steps of SGD: Lightning alone counts only step()"
        none = "warning: no optimizer step was counted, so the trail is empty"
        assert (none if shards is None else counted) in each.said()
