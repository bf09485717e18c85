"""validate=RUN and test=RUN: the numbers of the training, on several devices."""

import json
import shutil
from pathlib import Path

from tests.conftest import QUICK, Experiment, Run
from tests.real.training.test_evaluation import OPTIONS, stage, trained

__all__ = ["trained"]


def test_the_numbers_are_those_of_the_training(trained: tuple[Experiment, Run]) -> None:
    """Of the test and of the last validation, by folder and by id, on one device and on three."""
    experiment, run = trained
    receipt = (run.folder / "receipt.json").read_bytes()
    metrics = run.receipt["results"]["metrics"]
    for word, name in (("validate", "val"), ("test", "test")):
        for where in (run.folder.name, str(run.folder)):
            found = experiment.train(f"{word}={where}", *QUICK, cwd=experiment.root)
            assert json.loads(found.out) == stage(metrics, name)
            assert "┃" in found.err
            assert "warning" not in found.err
        moved = experiment.train(f"{word}={run.folder.name}", "trainer.devices=3", *QUICK, cwd=experiment.root)
        assert moved.out == found.out
    assert (run.folder / "receipt.json").read_bytes() == receipt


def test_weights_that_changed_after_the_last_step_are_in_the_end(
    trained: tuple[Experiment, Run], tmp_path: Path
) -> None:
    """They are in a checkpoint of their own; without it, or without any, labtrain refuses."""
    experiment, _ = trained
    ending = "+callbacks.ending._target_=model.Ending"
    run = experiment.train(*QUICK, *OPTIONS, ending, cwd=experiment.root)
    found = experiment.train(f"test={run.folder}", *QUICK, cwd=experiment.root)
    assert json.loads(found.out) == stage(run.receipt["results"]["metrics"], "test")
    copy = tmp_path / run.folder.name
    shutil.copytree(run.folder, copy)
    [final] = copy.glob("checkpoints/*-end")
    shutil.rmtree(final)
    found = experiment.train(f"test={copy}", *QUICK, cwd=experiment.root, code=2)
    assert "does not have the final weights of" in found.err
    shutil.rmtree(copy / "checkpoints")
    found = experiment.train(f"test={copy}", *QUICK, cwd=experiment.root, code=2)
    assert "has no checkpoint any more" in found.err
