"""What a step computes over the whole batch: synchronised BatchNorm and `labtrain.gather`, with shards."""

import pytest
import torch

import labtrain
from tests.support.exact import Runner
from tests.support.own_code import (
    WHOLE_IN_CI,
    is_exact_over_whole_batches,
    is_what_the_whole_batch_gives,
    of_whole_batches,
)


@pytest.mark.parametrize("kind", WHOLE_IN_CI)
def test_one_result_on_any_number_of_devices(kind: str, runner: Runner, other: Runner) -> None:
    is_exact_over_whole_batches(kind, runner, other)


@pytest.mark.parametrize("kind", WHOLE_IN_CI)
def test_it_is_what_the_whole_batch_gives(kind: str, runner: Runner, other: Runner) -> None:
    is_what_the_whole_batch_gives(kind, runner, other)


@pytest.mark.parametrize(
    ("fault", "says", "hint"),
    [
        (
            "validation",
            "labtrain.gather in a validation or test: their shards run one after the other",
            "gather_outputs",
        ),
        (
            "later",
            "labtrain.gather was not used in the training's first step",
            "use labtrain.gather in every training_step",
        ),
    ],
)
def test_what_cannot_meet_is_refused(fault: str, says: str, hint: str, runner: Runner) -> None:
    config = of_whole_batches("clip")
    config["model"] = {"_target_": "tests.support.whole_models.Refused", "fault": fault}
    runner.run(config, code=2)
    assert says in runner.said()
    assert hint in runner.said()
    assert "Traceback" not in runner.said()


def test_outside_of_a_training_it_returns_its_rows() -> None:
    rows = torch.rand(3, 2, requires_grad=True)
    assert labtrain.gather(rows) is rows
