"""What code makes after some steps: a resume has it again, or it is said when it is saved, and a resume is refused."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from labtrain.base.errors import EXIT_STOPPED
from labtrain.checkpoints.format import load_plain
from labtrain.record.digests import PLACE
from labtrain.stores.store import STATE
from tests.quick.base.test_untrusted import put, told
from tests.support.exact import Runner, configure, outcome

PRUNING = {"_target_": "lightning.pytorch.callbacks.ModelPruning", "pruning_fn": "l1_unstructured", "amount": 0.5}


def config(model: str, **more: Any) -> Any:
    found = configure("mlp", "even", determinism={"shards": 2}, **more)
    found["model"] = {"_target_": f"tests.support.late_models.{model}"}
    return found


def stop(runner: Runner, config: Any, step: int = 7) -> None:
    runner.run(config, code=EXIT_STOPPED, signal_at=f"{step} {signal.SIGTERM} 0")


def uninterrupted(runner: Runner, config: Any) -> dict[str, Any]:
    folder = runner.folder / "whole"
    folder.mkdir()
    return outcome(Runner(folder).run(config))


def files(runner: Runner) -> dict[Path, bytes]:
    found = (path for path in runner.folder.glob("runs/exact/*/**/*") if path.is_file())
    return {path: path.read_bytes() for path in found if path.name != ".lock"}


def trained(runner: Runner) -> dict[Path, bytes]:
    """Return what steps leave: the trail, and checkpoints."""
    return {
        path: data for path, data in files(runner).items() if path.name == "trail.jsonl" or "step-" in path.parent.name
    }


@pytest.mark.release
@pytest.mark.parametrize("model", ["Groups", "Registers"])
def test_groups_and_buffers_are_made_as_they_were(runner: Runner, model: str) -> None:
    """A group that is added after step 3; buffers that are new, larger, or None: stopped before, after and again."""
    options = config(model)
    whole = uninterrupted(runner, options)
    for step in (2, 7, 10):
        stop(runner, options, step)
    assert outcome(runner.run(options)) == whole


@pytest.mark.parametrize("model", ["GrowsAgain", "PrunesAgain"])
def test_what_on_load_checkpoint_makes_is_loaded(runner: Runner, model: str) -> None:
    """A layer with a group of its own, and masks: the cure that the hint names gives the same weights and trail."""
    options = config(model)
    whole = uninterrupted(runner, options)
    stop(runner, options)
    assert "cannot be resumed" not in runner.said()
    found = outcome(runner.run(options))
    assert found | {"state_digest": ""} == whole | {"state_digest": ""}  # which flags are new is another thing there


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        ("Grows", "the model (new parameters: extra.weight; extra.bias)"),
        ("Prunes", "the model (new parameters: head.weight_orig; removed: head.weight)"),
        ("Replaces", "the optimizers (torch.optim.adam.Adam instead of torch.optim.sgd.SGD)"),
        ("Strange", "the groups of torch.optim.sgd.SGD (a parameter that is not in the model)"),
        ("Pruning", "the model (new parameters: backbone.1.weight_orig; backbone.1.bias_orig;"),
    ],
)
def test_what_no_process_could_load_is_said_when_it_is_saved(runner: Runner, model: str, changed: str) -> None:
    """On stderr and in the receipt; a resume is refused with a hint, and changes no file of the run."""
    options = config(model if model != "Pruning" else "Small")
    if model == "Pruning":
        options["callbacks"]["pruning"] = PRUNING
    stop(runner, options)
    (path,) = runner.folder.glob("runs/exact/*/receipt.json")
    for text in (runner.said(), " ".join(json.loads(path.read_text())["determinism"]["notes"])):
        assert f"checkpoints from now on cannot be resumed: code has changed {changed}" in text
    before = files(runner)
    runner.run(options, code=2)
    assert f"error: the checkpoint cannot be loaded: code changed {changed}" in runner.said()
    assert "before the save" in runner.said()
    hint = "an on_save_checkpoint has left out backbone.1.weight_orig;" if model == "Pruning" else "make it in "
    assert f"hint: resume=never; for the next run: {hint}" in runner.said()
    assert "Traceback" not in runner.said()
    assert files(runner) == before


def test_weights_of_another_model_are_refused(runner: Runner) -> None:
    """`resume=RUN` with a model that has other parameters."""
    options = config("Small")
    stop(runner, options)
    (run,) = runner.folder.glob("runs/exact/*")
    before = files(runner)
    runner.run(config("Wider", resume=run.name), code=2)
    assert "error: the checkpoint's weights do not fit into Wider: Missing key(s) in state_dict: " in runner.said()
    assert "hint: restore the model; or resume=never" in runner.said()
    assert files(runner) == before


@pytest.mark.parametrize("change", ["shape", "key", "groups", "no optimizer", "no schedule", "another kind"])
def test_an_optimizers_state_that_does_not_fit_is_refused(runner: Runner, change: str) -> None:
    """Of a checkpoint that says of itself that it is whole: a line with a hint, and no traceback of torch's."""
    options = configure("mlp", "even")
    stop(runner, options)
    (folder,) = runner.folder.glob("runs/exact/*/checkpoints/step-*7")
    state = load_plain(folder / STATE)
    optimizer = state["optimizer_states"][0]
    match change:
        case "shape":
            optimizer["state"][0]["exp_avg"] = torch.zeros(3, 7)
        case "key":
            del optimizer["state"][0]["exp_avg"]
        case "groups":
            optimizer["param_groups"][0]["params"].append(99)
        case "no optimizer":  # Lightning loads what both have: in silence, none of it
            state["optimizer_states"] = []
        case "no schedule":
            state["lr_schedulers"] = []
        case "another kind":
            state["lr_schedulers"][0]["lr_lambdas"] = 3
    torch.save(state, folder / STATE)
    told(folder)
    runner.run(options, code=2)
    assert "error: the state of optimizers and schedulers in the checkpoint does not fit the model: " in runner.said()
    assert "hint: restore the model; or resume=never" in runner.said()
    assert "Traceback" not in runner.said()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("pytorch-lightning_version",), "x", "InvalidVersion: Invalid version: 'x' (Version.__init__)"),
        ((PLACE, "ranks", 0, "metrics"), {"nothing": {}}, "KeyError: 'nothing' (EpochLoop._restore_metrics)"),
        ((PLACE, "ranks", 0, "logged", 0, "sync"), [], "ValueError: not enough values to unpack (expected 3, got 0) ("),
        ((PLACE, "ranks", 0, "logged", 0, "meta", "reduce_fx"), "x", "MisconfigurationException: Only `self.log("),
        (
            (PLACE, "outside"),
            {"trainer": {"fit_loop": 3}},
            "ValueError: trainer.fit_loop cannot be 3 (Outside.restore)",
        ),
    ],
)
def test_a_state_that_cannot_be_put_back_is_one_line(runner: Runner, path: Any, value: Any, says: str) -> None:
    """Nothing is trained then."""
    options = configure("mlp", "even")
    stop(runner, options)
    (folder,) = runner.folder.glob("runs/exact/*/checkpoints/step-*7")
    torch.save(put(load_plain(folder / STATE), path, value), folder / STATE)
    told(folder)
    before = trained(runner)
    runner.run(options, code=2)
    assert f"/checkpoints/{folder.name}: {says}" in runner.said()
    assert (
        "hint: ask who wrote it; without this checkpoint the same command resumes from the one before it"
        in runner.said()
    )
    assert "Traceback" not in runner.said()
    assert trained(runner) == before


def test_what_ones_own_hook_raises_keeps_its_traceback(runner: Runner) -> None:
    """It is a fault of that code, and its traceback says where."""
    stop(runner, config("Rejects"))
    runner.run(config("Rejects"), code=1)
    assert "Traceback" in runner.said()
    assert "KeyError: 'nothing'" in runner.said()
    assert "cannot restore" not in runner.said()
