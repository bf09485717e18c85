"""Optimizers that hold an optimizer, or that the Trainer does not know: each on several devices, killed and moved."""

import signal
from typing import Any

import pytest

from tests.support.exact import Runner, configure, outcome

BY_HAND = [
    ("sam, adamw", "methods"),
    ("sam", "closure"),
    ("lookahead", "step"),
    ("lookahead of sam", "closure"),
    ("centralised", "step"),
    ("centralised", "inner"),
    ("lbfgs", "closure"),
    ("adam", "own"),
]
AUTOMATIC = ["sam", "sam, adamw", "lookahead", "lookahead of sam", "centralised"]


@pytest.mark.parametrize("options", [{"kind": kind, "way": way} for kind, way in BY_HAND], ids=str)
def test_by_hand_it_is_one_result(options: dict[str, str], runner: Runner, other: Runner) -> None:
    config = configure("mlp", "uneven")
    config["model"] = {"_target_": "tests.support.nested_models.ByHand", **options}
    steps = 2 if options["way"] == "own" else 1
    is_one_result(config, steps, runner, other)


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_automatically_it_is_one_result(kind: str, runner: Runner, other: Runner) -> None:
    config = configure("mlp", "uneven")
    config["model"] = {"_target_": "tests.support.nested_models.Automatic", "kind": kind}
    is_one_result(config, 1, runner, other)


def is_one_result(config: Any, steps: int, runner: Runner, other: Runner) -> None:
    """Train on one device; then on two, four and two, each killed, and on one. A batch has so many steps."""
    reference = outcome(runner.run(config))
    config["checkpoint"]["every_n_steps"] = steps
    for batches, world in ((2, 2), (8, 4), (12, 2)):
        other.run(config, world=world, code=None, signal_at=f"{batches * steps} {int(signal.SIGKILL)} 0")
    assert outcome(other.run(config)) == reference
