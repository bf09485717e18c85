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


CASES = [("world_size", 1), ("world_size", 2), ("num_devices", 1), ("num_devices", 2), ("strategy", 1), ("schedule", 2)]


@pytest.mark.parametrize(("kind", "world"), CASES)
def test_an_optimizer_made_for_a_number_of_devices_is_said(kind: str, world: int, runner: Runner) -> None:
    """With file and line, in helpers and schedules too."""
    (note,) = said(runner, kind, world)
    place, _, text = note.partition(" reads ")
    file, _, line = place.rpartition(":")
    assert file.endswith("tests/support/devices_models.py")
    assert "the line that is named" in LINES[int(line) - 1]
    assert text.startswith(f"trainer.{'num_devices' if kind == 'num_devices' else 'world_size'}: a batch is the whole")


def test_a_batch_size_made_for_a_number_of_devices_is_said(runner: Runner) -> None:
    (note,) = said(runner, "none", 2, "tests.support.devices_models.Divides")
    assert "devices_models.py" in note


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_asks_whether_there_are_several_is_not(world: int, runner: Runner) -> None:
    """sync_dist=self.trainer.world_size > 1 changes nothing."""
    assert said(runner, "none", world) == []
