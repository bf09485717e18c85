"""Sparse gradients: one result on any number of devices, and the rows that the whole batch has."""

import json
import signal
from typing import Any

import pytest
import torch

import labtrain
from tests.support.exact import Runner, configure, outcome


def sparse(*, shards: int = 4, **model: Any) -> Any:
    config = configure("mlp", "uneven", determinism={"shards": shards})
    config["model"] = {"_target_": "tests.support.sparse_models.Ranking", **model}
    config["trainer"]["limit_val_batches"] = 0
    return config


@pytest.mark.parametrize("manual", [False, True])
def test_one_result_on_any_number_of_devices(manual: bool, runner: Runner, other: Runner) -> None:
    """On one device; then on four, two and one, killed in between. A last batch of 5 samples has two shards."""
    config = sparse(manual=manual)
    reference = outcome(runner.run(config))
    config["checkpoint"]["every_n_steps"] = 1
    for batches, world in ((3, 4), (7, 2)):
        other.run(config, world=world, code=None, signal_at=f"{batches * (1 + manual)} {int(signal.SIGKILL)} 0")
    run_dir = other.run(config)
    assert run_dir is not None
    assert len(json.loads((run_dir / "receipt.json").read_text())["segments"]) == 3
    assert outcome(run_dir) == reference


@pytest.mark.parametrize("manual", [False, True])
def test_shards_compute_the_gradient_of_the_batch(manual: bool, runner: Runner, other: Runner) -> None:
    """Against the whole batch, in float64: what differs is the order of additions. Bound: 1e-12 of the largest weight.

    A row whose gradient adds up to zero is changed by SparseAdam, too.
    """
    weights = []
    for shards, each in ((4, runner), (1, other)):
        run_dir = each.run(sparse(shards=shards, manual=manual, dtype="float64"))
        weights.append(labtrain.load_weights(str(run_dir)))
    for name, one in weights[0].items():
        assert one.dtype == torch.float64
        assert (one - weights[1][name]).abs().max() <= 1e-12 * one.abs().max(), name
