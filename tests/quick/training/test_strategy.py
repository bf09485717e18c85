"""What cannot be cut into shards is refused, with the reason. What can is in test_exact.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.exact import Runner, configure, outcome


def faulty(fault: str, **more: Any) -> Any:
    config = configure("mlp", "even", **more)
    config["model"] = {"_target_": "tests.support.exact_worker.Faulty", "fault": fault}
    return config


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("counts", "buffer seen of Faulty (torch.int64) differs between the shards of a step"),
        ("metric", "pearson (PearsonCorrCoef): its state 'mean_x' has its own reduction"),
        ("names", "the shards of one step log different names: "),
        ("none", "training_step returned no loss for shard "),
    ],
)
def test_what_cannot_be_cut_is_refused(fault: str, says: str, world: int, runner: Runner) -> None:
    """On one device and on two alike, with the way out in the hint."""
    runner.run(faulty(fault), world=world, code=None)
    said = runner.said()
    assert says in said, said
    assert f"determinism.shards={1 if fault == 'counts' else 'null'}" in said
    assert world > 1 or "Traceback" not in said  # a rank that waits for the refusing one ends with its own error


@pytest.mark.parametrize("fault", ["counts", "metric"])
def test_without_shards_it_trains_and_says_what_is_off(fault: str, runner: Runner) -> None:
    run_dir = runner.run(faulty(fault, determinism={"shards": None}))
    assert run_dir is not None
    determinism = json.loads((run_dir / "receipt.json").read_text())["determinism"]
    assert determinism["any_number_of_devices"] is False
    assert any(
        "determinism.shards=null" in note and "results then depend on the number of devices" in note
        for note in determinism["notes"]
    )
    assert "results then depend on the number of devices" in runner.said()


def test_more_devices_than_shards_are_refused(runner: Runner) -> None:
    runner.run(configure("mlp", "even", determinism={"shards": 2}), world=3, code=None)
    assert "3 devices, but determinism.shards=2" in runner.said()
    assert "hint: trainer.devices=2, or determinism.shards=3" in runner.said()


def test_in_mode_off_shards_still_sum_along_the_tree(runner: Runner, tmp_path: Path) -> None:
    """Nothing is seeded then, so a model without draws is needed: data that is not augmented, no dropout."""
    digests = set()
    for world in (1, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        config = configure("gpt", "uneven", determinism={"mode": "off"})
        config["model"]["dropout"] = 0.0
        digests.add(outcome(Runner(folder).run(config, world=world))["weights_digest"])
    assert len(digests) == 1
