"""Lightning's finders: the search for a learning rate is no part of the training, and happens once."""

from typing import Any

from labtrain.base.errors import EXIT_STOPPED
from labtrain.checkpoints.format import load_folder
from tests.support.exact import Runner, configure, outcome


def config(finder: str, **options: Any) -> Any:
    found = configure("mlp", "even", determinism={"shards": 4}, trainer={"max_epochs": 3, "enable_progress_bar": True})
    found["model"] = {"_target_": "tests.support.finder_models.WithRate"}
    found["callbacks"]["finder"] = {"_target_": f"lightning.pytorch.callbacks.{finder}", **options}
    return found


def test_a_learning_rate_is_found_once_on_any_devices(runner: Runner, other: Runner) -> None:
    """Nothing of the search is saved; a training that goes on has the rate that was found, and does not search."""
    options = config("LearningRateFinder", num_training_steps=14, min_lr=1e-4)
    whole = outcome(other.run(options))
    assert whole["steps"] == len(whole["trail"]) == 15
    [saved] = other.folder.glob("runs/*/*/checkpoints/step-0000000015")
    assert load_folder(saved)["optimizer_states"][0]["param_groups"][0]["lr"] != 0.01
    assert not list(other.folder.rglob(".lr_find*"))
    runner.run(options, world=2, code=EXIT_STOPPED, signal_at="7 15 0")
    assert "Finding best initial lr" in runner.said()
    assert outcome(runner.run(options)) == whole
    assert "Finding best initial lr" not in runner.said()


def test_a_batch_size_that_depends_on_the_machine_is_refused(runner: Runner) -> None:
    """It would be another than the one that names the run."""
    runner.run(config("BatchSizeFinder"), code=2)
    assert "error: a BatchSizeFinder would replace data.batch_size" in runner.said()
    assert "labtrain batch-size prints the largest data.batch_size that fits" in runner.said()
    assert not list(runner.folder.glob("runs/*/*/receipt.json"))
