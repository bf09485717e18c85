"""Code that computes something from the number of devices is named, with what it means: on one device too."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import devices_models
from tests.support.exact import Runner, configure

LINES = Path(devices_models.__file__).read_text().splitlines()


def said(runner: Runner, kind: str, world: int, data: str = "tests.support.exact_worker.Data") -> list[str]:
    """Return the notes about reads of a short training; each is a warning too."""
    config: Any = configure("mlp", "even", trainer={"max_epochs": 1}, determinism={"shards": 2})
    config["model"] = {"_target_": "tests.support.devices_models.Asks", "kind": kind}
    config["data"]["_target_"] = data
    run_dir = runner.run(config, world=world)
    assert run_dir is not None
    notes = json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"]
    found = [note for note in notes if " reads trainer." in note]
    assert all(runner.said().count(f"warning: {note}") == 1 for note in found)
    return found


CASES = [("world_size", 1), ("world_size", 2), ("num_devices", 1), ("num_devices", 2), ("strategy", 1), ("schedule", 2),
         ("hook", 1)]  # fmt: skip


@pytest.mark.parametrize(("kind", "world"), CASES)
def test_an_optimizer_made_for_a_number_of_devices_is_said(kind: str, world: int, runner: Runner) -> None:
    """With file and line, in helpers and schedules too."""
    (note,) = said(runner, kind, world)
    place, _, text = note.partition(" reads ")
    file, _, line = place.rpartition(":")
    assert file.endswith("tests/support/devices_models.py")
    assert "the line that is named" in LINES[int(line) - 1]
    assert text.startswith(
        f"trainer.{'num_devices' if kind == 'num_devices' else 'world_size'}: a learning rate or a batch"
    )


def test_a_batch_size_made_for_a_number_of_devices_is_said(runner: Runner) -> None:
    (note,) = said(runner, "none", 2, "tests.support.devices_models.Divides")
    assert "devices_models.py" in note


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_asks_whether_there_are_several_is_not(world: int, runner: Runner) -> None:
    """sync_dist=self.trainer.world_size > 1 changes nothing."""
    assert said(runner, "none", world) == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_is_read_in_setup_is_said(world: int, runner: Runner) -> None:
    """Each process multiplies its loss by another number."""
    (note,) = said(runner, "setup", world)
    place, _, text = note.partition(" reads ")
    assert "the line that is named" in LINES[int(place.rpartition(":")[2]) - 1]
    assert text.startswith("trainer.global_rank: values computed from it differ between devices")


STEPS = {"penalty": "trainer.is_global_zero", "global rank": "trainer.global_rank", "local rank": "trainer.local_rank",
         "a division": "trainer.world_size", "environment": "RANK, LOCAL_RANK or WORLD_SIZE of the environment"}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
def test_a_loss_that_depends_on_the_process_is_refused(kind: str, runner: Runner) -> None:
    """On one device too, before the first update: two devices gave other weights, without a word."""
    config: Any = configure("mlp", "even", determinism={"shards": 2})
    config["model"] = {"_target_": "tests.support.devices_models.Asks", "kind": kind}
    runner.run(config, code=2)
    assert "error: training_step's loss depends on the process that computes it, through " in runner.said()
    assert STEPS[kind] in runner.said()
    assert not any(path.read_text() for path in runner.folder.glob("runs/*/*/trail.jsonl"))
