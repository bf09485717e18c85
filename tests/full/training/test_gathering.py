"""Outputs that are gathered in lists: in one order on every rank, and refused where a value is of a part of them."""

import json
import signal
from pathlib import Path

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.quick.training.test_hooks import numbered
from tests.real.training.test_gathering import AT, gathered
from tests.support.exact import Runner, outcome


@pytest.mark.parametrize("worlds", [(2, 2), (1, 3), (3, 1)])
def test_a_resumed_epoch_has_the_outputs_of_all_its_batches(worlds: tuple[int, int], tmp_path: Path) -> None:
    """Stopped after two of three steps and moved: the checkpoint has the items of all ranks."""
    config = numbered("Gathering")
    config["callbacks"] = AT
    (whole,), expected = gathered(tmp_path / "whole", 1, config)
    (tmp_path / "moved" / "seen").mkdir(parents=True)
    seen = {"SEEN": str(tmp_path / "moved" / "seen")}
    moved = Runner(tmp_path / "moved")
    moved.run(config, world=worlds[0], code=EXIT_STOPPED, signal_at=f"1 {int(signal.SIGTERM)} 0", environment=seen)
    found = outcome(moved.run(config, world=worlds[1], environment=seen))
    last = worlds[1] - 1
    lines = [json.loads(line) for line in (tmp_path / "moved" / "seen" / f"{last}.jsonl").read_text().splitlines()]
    assert [line for line in lines if "more" in line] == [line for line in whole if "more" in line]
    assert (found["weights_digest"], found["metrics"]) == (expected["weights_digest"], expected["metrics"])
    assert found["state_digest"] == expected["state_digest"]
