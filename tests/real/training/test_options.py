"""What the new command says is what happens: options, schedules and callbacks of a training that goes on."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure


def config(trainer: dict[str, Any] | None = None, resume: Path | None = None, **options: Any) -> Any:
    found = configure("mlp", "even", trainer=trainer or {}, resume=str(resume) if resume else "auto")
    found["model"] = {"_target_": "tests.support.resume_models.Scheduled", **options}
    return found


def stopped(runner: Runner, step: int, **options: Any) -> Path:
    runner.run(config(**options), code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    (run_dir,) = runner.folder.glob("runs/exact/*")
    return run_dir


def used(runner: Runner) -> dict[int, tuple[float, float]]:
    """Return the learning rate and the momentum that each step of the last training really had."""
    found = re.findall(r"^step (\d+) used (\S+) (\S+)$", runner.said(), re.MULTILINE)
    return {int(step): (float(lr), float(momentum)) for step, lr, momentum in found}


def whole(runner: Runner, **options: Any) -> dict[int, tuple[float, float]]:
    """Return what each step of an uninterrupted training has."""
    folder = runner.folder / "whole"
    folder.mkdir()
    other = Runner(folder)
    other.run(config(**options))
    return used(other)


def test_a_changed_option_takes_effect(runner: Runner) -> None:
    """The learning rate and the momentum of the command are those of the next step; said, and in the receipt."""
    run_dir = stopped(runner, 7)
    runner.run(config(lr=0.0001, momentum=0.5, resume=run_dir))
    assert used(runner) == dict.fromkeys(range(8, 16), (0.0001, 0.5))
    assert "from step 7 on, lr is 0.0001, and was 0.05 (SGD)" in runner.said()
    notes = json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"]
    assert "from step 7 on, momentum is 0.5, and was 0.9 (SGD)" in notes


def test_a_schedule_that_learns_keeps_what_it_has_learned(runner: Runner) -> None:
    """ReduceLROnPlateau: the new rate is the next step's, and the plateau that was counted still counts."""
    run_dir = stopped(runner, 12, kind="plateau")
    runner.run(config(kind="plateau", lr=0.01, resume=run_dir))
    assert used(runner) == dict.fromkeys((13, 14, 15), (0.01, 0.9))
    manifest = sorted(run_dir.glob("checkpoints/*/state.pt"))[-1]
    import torch

    (state,) = torch.load(manifest, weights_only=True)["lr_schedulers"]
    assert state["best"] == 1.0
    assert state["_last_lr"] == [0.01]


def test_an_unchanged_configuration_changes_nothing(runner: Runner) -> None:
    """Another number of epochs alone leaves the schedule as it stood: no option is touched."""
    run_dir = stopped(runner, 7, kind="epochs")
    runner.run(config(kind="epochs", trainer={"max_epochs": 4}, resume=run_dir))
    assert [lr for lr, _ in used(runner).values()] == [0.025] * 3 + [0.0125] * 5 + [0.00625] * 5
    assert "from step 7 on" not in runner.said()


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ({"kind": "cycle"}, {"kind": "cycle", "trainer": {"max_epochs": 1}}, "cannot continue at step 7"),
        ({}, {"adam": True}, "the checkpoint holds the state of torch.optim.sgd.SGD, which does not fit torch"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(
    runner: Runner, before: dict[str, Any], now: dict[str, Any], says: str
) -> None:
    """Before anything is touched: receipt, trail and checkpoints are as they were."""
    run_dir = stopped(runner, 7, **before)
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    runner.run(config(**now, resume=run_dir), code=2)
    assert says in runner.said()
    assert "hint:" in runner.said()
    assert {path: path.read_bytes() for path in files} == files


def test_an_attribute_that_the_training_changes_keeps_its_value_and_that_is_said(runner: Runner) -> None:
    """The receipt holds the new configuration: without a word it was not what trained."""
    options = config()
    options["model"] = {"_target_": "tests.support.resume_models.Anneals", "smoothing": 0.2}
    runner.run(options, code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    (run_dir,) = runner.folder.glob("runs/exact/*")
    options["model"]["smoothing"] = 0.9
    runner.run(options | {"resume": str(run_dir)})
    said = "smoothing starts as 0.9 in the code, but the training had changed it: it resumes with the value"
    assert f"warning: {said}" in runner.said()
    assert said in (run_dir / "receipt.json").read_text()
    assert "started starts" not in runner.said()
