"""The copy of the newest state in memory: a survivor saves it, with the bytes of a checkpoint of that step."""

import json
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from labtrain.stores.layout import list_checkpoints
from labtrain.training.callbacks import kept
from labtrain.training.callbacks.kept import Kept
from tests.support.exact import Runner, configure, newest_manifest, outcome

EACH_STEP = {"COPY_SHARE": "1e6"}


def survived(runner: Runner, config: dict[str, Any], dead: int) -> dict[str, Any]:
    """Kill a rank of two after step 8, let the other one save, and return the newest manifest."""
    runner.run(config, world=2, code=None, signal_at=f"8 9 {dead}", environment=EACH_STEP, patience_s=30)
    return newest_manifest(runner)


@pytest.mark.parametrize("dead", [0, 1])
def test_the_survivor_saves_what_a_checkpoint_of_that_step_holds(runner: Runner, other: Runner, dead: int) -> None:
    """Rank 1 becomes the writer where rank 0 is dead. Both digests are those of a run that was stopped at that step."""
    config = configure("cnn", "uneven")
    found = survived(runner, config, dead)
    assert found["step"] in (7, 8), "an epoch has five steps: its checkpoints are those of steps 5 and 10"
    other.run(config, code=EXIT_STOPPED, signal_at=f"{found['step']} 15 0")
    stopped = newest_manifest(other)
    assert stopped["step"] == found["step"]
    for key in ("state_digest", "weights_digest", "epoch", "batch", "metrics", "scores", "files"):
        assert found.get(key) == stopped.get(key), key
    assert found["before"]["name"] == "step-0000000005"
    assert not list(runner.folder.glob("runs/*/*/checkpoints/.writer.json"))
    assert outcome(runner.run(config)) == outcome(other.run(config))


def test_no_copy_of_other_weights_than_the_trail_has(runner: Runner) -> None:
    """Rank 1's copy does not count where its weights are not those that rank 0 wrote into the trail."""
    config = configure("mlp", "even")
    runner.run(config, world=2, code=None, signal_at="8 9 0", environment=EACH_STEP)
    (run,) = runner.folder.glob("runs/*/*")
    lines = [json.loads(line) for line in (run / "trail.jsonl").read_text().splitlines()]
    state = {"state_dict": {}}
    copy = Kept(None, run)  # type: ignore[arg-type]
    assert copy._differs(state, {"step": lines[-1]["step"]})
    assert not copy._differs(state, {"step": 99}), "a step that the trail does not have"
    assert list_checkpoints(run / "checkpoints")


def test_copies_take_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the clock, or by the processor's time: where other processes need the processor, a copy takes long."""
    now = [0.0, 0.0]
    monkeypatch.setattr(kept, "CLOCKS", (lambda: now[0], lambda: now[1]))
    copy = Kept(None, tmp_path)  # type: ignore[arg-type]
    assert copy.due()
    with copy.timed():
        now[:] = [2.0, 0.5]
    now[:] = [201.0, 50.0]
    assert not copy.due()
    now[1] = 50.5
    assert copy.due()
    now[:] = [202.0, 1.0]
    assert copy.due()


def test_a_rank_that_is_not_asked_to_makes_no_copy(tmp_path: Path) -> None:
    copy = Kept(None, tmp_path)  # type: ignore[arg-type]
    copy.put({"a": 1}, {"step": 1})
    assert copy.held is None
    assert copy.write(leads=True, take_over=lambda: True) is None
