"""What a run that goes on finds of its own: a history that was edited, a folder of another name."""

import re
import signal
from pathlib import Path
from typing import Any

from labtrain.base.errors import EXIT_STOPPED
from labtrain.record import receipt as receipts
from labtrain.record.trail import BEST_UNSURE
from tests.quick.base.test_untrusted import told
from tests.support.exact import Runner, configure, newest_manifest


def stop(runner: Runner, config: Any) -> Path:
    runner.run(config, code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    (run_dir,) = runner.folder.glob("runs/exact/*")
    return run_dir


def receipt(run_dir: Path) -> dict[str, Any]:
    found = receipts.read(run_dir)
    assert found is not None
    return found


def test_a_score_that_was_edited_is_said(runner: Runner) -> None:
    """The best value in the receipt is read off the history: the receipt says that it may be wrong."""
    best: dict[str, Any] = {"keep_best": 1, "monitor": "val/loss", "mode": "min"}
    config = configure("mlp", "even", checkpoint={"every_n_steps": 3, **best})
    run_dir = stop(runner, config)
    history = run_dir / "history.jsonl"
    edited = re.sub(r'"val/loss": [0-9.]+', '"val/loss": 0.001', history.read_text(), count=1)
    assert edited != history.read_text()
    history.write_text(edited)
    runner.run(config, code=EXIT_STOPPED, signal_at=f"9 {signal.SIGTERM} 0")
    assert "history.jsonl was changed after step-0000000007 was saved" in runner.said()
    runner.run(config)  # a later start finds the history as the last checkpoint knows it
    assert any(note.endswith(BEST_UNSURE) for note in receipt(run_dir)["determinism"]["notes"])


def test_a_monitor_that_nothing_logs_is_said_once(runner: Runner) -> None:
    run_dir = runner.run(configure("mlp", "even", checkpoint={"monitor": "val/typo"}))
    assert run_dir is not None
    (said,) = receipt(run_dir)["determinism"]["notes"]
    assert said.startswith(
        "checkpoint.monitor=val/typo: no such metric, so no best value is recorded; logged metrics: "
    )
    assert receipt(run_dir)["results"]["best"] is None


def test_a_trail_that_is_gone_is_said_beside_an_older_manifest_too(runner: Runner) -> None:
    """One that does not say what the trail was: on stderr, in the receipt, and in the manifests from then on."""
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    told(run_dir / "checkpoints" / "step-0000000007", trail=None, history=None)
    (run_dir / "trail.jsonl").unlink()
    runner.run(config)
    said = "trail.jsonl was changed after step-0000000007 was saved: the lines of these steps are missing"
    assert f"{said} or different: 1 to 7" in runner.said()
    assert receipt(run_dir)["trail"]["missing"] == [[1, 7]]
    assert newest_manifest(runner)["trail"]["missing"] == [[1, 7]]


def test_a_run_whose_folder_got_another_name_goes_on_under_its_own(runner: Runner) -> None:
    config = configure("mlp", "even")
    run_dir = stop(runner, config)
    renamed = run_dir.rename(run_dir.with_name("mine"))
    assert runner.run(configure("mlp", "even", resume=str(renamed))) == renamed
    assert receipt(renamed)["run_id"] == run_dir.name
