"""What no state dict holds is kept by a checkpoint: a run that was stopped ends as one that was not."""

import signal
from typing import Any

import pytest
import torch

from labtrain.base.errors import EXIT_STOPPED
from tests.support.exact import Runner, configure, outcome

FINETUNING = {
    "finetuning": {
        "_target_": "lightning.pytorch.callbacks.BackboneFinetuning",
        "unfreeze_backbone_at_epoch": 1,
        "verbose": False,
    }
}


def config(model: str, **more: Any) -> Any:
    found = configure("mlp", "even", **more)
    found["model"] = {"_target_": f"tests.support.resume_models.{model}"}
    return found


def uninterrupted(runner: Runner, config: Any) -> dict[str, Any]:
    folder = runner.folder / "whole"
    folder.mkdir()
    return outcome(Runner(folder).run(config))


def stopped_and_gone_on(runner: Runner, config: Any, *steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the outcome of a run, and of the same that was stopped after each of these steps."""
    whole = uninterrupted(runner, config)
    for step in steps:
        runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    return whole, outcome(runner.run(config))


@pytest.mark.parametrize("model", ["Unfreezes", "Hidden", "Hides", "Counts", "Accumulates"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(runner: Runner, model: str) -> None:
    """Flags, modes, hidden buffers, plain attributes and waiting gradients: in an epoch's middle and at its end."""
    whole, found = stopped_and_gone_on(runner, config(model, determinism={"shards": 2}), 7, 10)
    assert found == whole


def test_what_a_callback_unfroze_stays_so(runner: Runner) -> None:
    """BackboneFinetuning adds a group to the optimizer in epoch 1; a run that was stopped in epoch 1 and 2 has it too."""
    options = config("Small", callbacks=FINETUNING | configure()["callbacks"])
    whole, found = stopped_and_gone_on(runner, options, 7, 12)
    assert found == whole


@pytest.mark.parametrize("step", [2, 3])
def test_gradients_wait_in_a_checkpoint(runner: Runner, step: int) -> None:
    """With manual optimization a SIGTERM may come between two steps of the optimizer."""
    options = config("Manual", determinism={"shards": None})
    whole = uninterrupted(runner, options)
    runner.run(options, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")
    assert outcome(runner.run(options)) == whole


def test_only_what_changed_is_saved(runner: Runner) -> None:
    """A table in a hidden buffer that never changes is not in the checkpoint."""
    runner.run(config("Hidden"), code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    (path,) = runner.folder.glob("runs/exact/*/checkpoints/step-0000000007/state.pt")
    (kept,) = torch.load(path, weights_only=True)["labtrain"]["ranks"]
    assert set(kept["hidden_buffers"]) == {"scale", "later"}


def test_a_run_moved_to_other_devices_keeps_it(runner: Runner) -> None:
    """Two processes go on with what one has saved, with the same bits."""
    options = config("Counts", determinism={"shards": 2})
    whole = uninterrupted(runner, options)
    runner.run(options, code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    assert outcome(runner.run(options, world=2)) == whole


@pytest.mark.parametrize("world", [1, 2])
def test_sparse_buffers_are_saved(runner: Runner, world: int) -> None:
    """In the state dict and beside it; an entry that occurs twice still does."""
    options = config("Sparse", determinism={"shards": 2})
    whole = uninterrupted(runner, options)
    runner.run(options, code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0", world=world)
    assert outcome(runner.run(options, world=world)) == whole


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_stochastic_weight_averaging_is_saved(runner: Runner, strategy: str) -> None:
    """Its schedule holds a function; stopped before and while it averages, and at the last epoch's end."""
    averaging = {
        "_target_": "lightning.pytorch.callbacks.StochasticWeightAveraging",
        "swa_lrs": 0.02,
        "swa_epoch_start": 2,
        "annealing_epochs": 2,
        "annealing_strategy": strategy,
    }
    options = config("Small", callbacks={"averaging": averaging, **configure()["callbacks"]})
    options["trainer"]["max_epochs"] = 4
    whole, found = stopped_and_gone_on(runner, options, 3, 12, 20)
    assert found == whole


def test_hyperparameters_that_cannot_be_saved_are_refused_before_the_first_step(runner: Runner) -> None:
    """With the line to write; nothing is left of the run."""
    options = config("HyperParameters")
    options["model"] |= {
        "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
        "net": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
    }
    runner.run(options, code=2)
    assert 'hint: self.save_hyperparameters(ignore=["optimizer", "net"]), and self.net = net' in runner.said()
    assert "HyperParameters saves values that a checkpoint cannot hold: optimizer is a" in runner.said()
    assert list(runner.folder.glob("runs/exact/*")) == []


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("complex", "wave of the model's state_dict is of torch.complex128"),
        ("extra", "counter._extra_state of the model's state_dict is a builtins.dict"),
        ("hook", "mine.device is a torch.device"),
        ("key", "mine is a builtins.dict with a key of torch.dtype"),
        ("optimizer", "optimizer_states.0.param_groups.0.schedule is a builtins.function"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(runner: Runner, where: str, says: str) -> None:
    options = config("Extra")
    options["model"]["where"] = where
    runner.run(options, code=2)
    assert says in runner.said()
    assert list(runner.folder.glob("runs/exact/*")) == []


def test_what_cannot_be_kept_is_named(runner: Runner) -> None:
    """A generator before the first step; an object that is made later when it is saved, and a resume is refused."""
    runner.run(config("Late"), code=EXIT_STOPPED, signal_at=f"7 {signal.SIGTERM} 0")
    said = runner.said()
    assert "warning: noise is a numpy.random._generator.Generator: no checkpoint holds its state" in said
    assert "warning: average was made during the training" in said
    runner.run(config("Late"), code=2)
    assert "average.updates cannot be restored" in runner.said()
