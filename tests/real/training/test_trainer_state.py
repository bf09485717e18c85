"""What code changes outside of the model is kept by a checkpoint, or said when one is saved."""

import signal
from typing import Any

import pytest
import torch

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure, outcome

HERE = "tests.support.outside_models"


def config(model: str, **options: Any) -> Any:
    found = configure("mlp", "even", determinism={"shards": 2})
    found["model"] = {"_target_": f"{HERE}.{model}", **options}
    return found


def stopped_and_gone_on(runner: Runner, config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the outcome of a run, and of the same that was stopped in the middle of an epoch and at its end."""
    folder = runner.folder / "whole"
    folder.mkdir()
    whole = outcome(Runner(folder).run(config))
    for step in (7, 10):
        runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    return whole, outcome(runner.run(config))


def _made(runner: Runner, name: str) -> Any:
    (folder := runner.folder / name).mkdir()
    return folder


def test_what_a_data_module_counts_is_kept(runner: Runner) -> None:
    """Numbers, a list of tensors and an object's attributes; what is too large, and a generator, are said by name."""
    options = config("Pulls")
    options["data"]["_target_"] = f"{HERE}.Counting"
    whole, found = stopped_and_gone_on(runner, options)
    assert found == whole
    for name in ("data.large", "data.noise"):
        assert f"warning: {name} was changed during the training, and no checkpoint" in runner.logs[0].read_text()
    (path,) = runner.folder.glob("runs/exact/*/checkpoints/step-0000000015/state.pt")
    assert set(torch.load(path, weights_only=True)["labtrain"]["outside"]["data"][""]) == {"steps", "seen"}


def test_what_an_optimizer_keeps_is_kept(runner: Runner) -> None:
    """Slow weights in a list, counters; a list of the weights themselves stays one."""
    whole, found = stopped_and_gone_on(runner, config("Optimized", optimizer="Lookahead"))
    assert found == whole


def test_a_scheduler_that_changes_the_state_it_loads_is_kept(runner: Runner) -> None:
    """CyclicLR's load removes a key, and a resume in mid-epoch loads twice."""
    options = config("Optimized", optimizer="Lookahead")
    options["model"] = {"_target_": "tests.support.resume_models.Scheduled", "kind": "cyclic"}
    whole, found = stopped_and_gone_on(runner, options)
    assert found == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_curriculum_in_a_dataset_is_kept(runner: Runner, workers: int) -> None:
    """Its numbers and texts; not what counts the loads, which another number of workers counts otherwise."""
    options = config("Teaches", each="epoch")
    options["data"] |= {"_target_": f"{HERE}.Curriculum", "num_workers": workers}
    whole, found = stopped_and_gone_on(runner, options)
    assert found == whole
    assert "was changed in mid-epoch" not in runner.logs[-1].read_text()


def test_what_a_hook_writes_into_a_tensor_dataset_is_kept(runner: Runner) -> None:
    """A resume in mid-epoch runs the hook again, with other weights: the rest of the epoch is what it was."""
    options = config("Plays")
    options["data"]["_target_"] = f"{HERE}.Rollouts"
    whole, found = stopped_and_gone_on(runner, options)
    assert found == whole


def test_a_dataset_that_is_changed_in_mid_epoch_is_said(runner: Runner) -> None:
    options = config("Teaches", each="batch")
    options["data"]["_target_"] = f"{HERE}.Curriculum"
    runner.run(options, code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    text = runner.logs[0].read_text()
    assert "warning: level of Grows was changed in mid-epoch" in text
    assert "loads of Grows was changed" not in text


def test_it_is_said_at_the_end_of_the_epoch_too(runner: Runner) -> None:
    """Its weights depend on the number of workers, though nothing is saved in between."""
    options = config("Teaches", each="batch")
    options["data"]["_target_"] = f"{HERE}.Curriculum"
    options["trainer"]["max_epochs"] = 1
    runner.run(options)
    said = "warning: level of Grows was changed in mid-epoch, but later batches may already be loaded,"
    assert f"{said} and workers have a copy of the dataset: the result depends on data.num_workers" in runner.said()


def test_what_code_sets_on_an_optimizer_of_torchs_is_kept(runner: Runner) -> None:
    whole, found = stopped_and_gone_on(runner, config("Scales"))
    assert found == whole
