"""A run's folder that is removed while the run is trained."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.support.exact import Runner, configure, outcome


class Remover(pl.Callback):
    """Removes a folder after the third step, once."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and not (done := self.folder.with_name("removed")).exists():
            done.touch()
            shutil.rmtree(self.folder)


def test_a_removed_folder_is_one_error_and_the_next_start_trains_anew(runner: Runner, other: Runner) -> None:
    """Nothing is left of the run: the same command gives the same weights as one that nobody disturbed."""
    config = configure("mlp", "even", checkpoint={"every_n_steps": 2})
    undisturbed = outcome(other.run(config))
    config["callbacks"]["remover"] = {
        "_target_": "tests.quick.training.test_removed.Remover",
        "folder": str(runner.folder / "runs"),
    }
    runner.run(config, code=2)
    said = runner.said()
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert "could not be written: No such file or directory" in said
    found = outcome(runner.run(config))
    assert (found["weights_digest"], found["trail"]) == (undisturbed["weights_digest"], undisturbed["trail"])
