"""`init_from`: a training starts with the weights of a run or a file, and is a run of its own."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from labtrain import digest, load_weights
from labtrain.base.errors import EXIT_STOPPED, ConfigError
from labtrain.record.config import check
from labtrain.training.state.initial import renamed
from tests.support.exact import Runner, configure, outcome

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of an epoch."""
    found = Runner(tmp_path_factory.mktemp("pretrained")).run(configure("cnn", trainer={"max_epochs": 1}))
    assert found is not None
    return found


def tuned(place: object, **more: Any) -> Any:
    first = place if isinstance(place, dict) else str(place)
    return configure("cnn", trainer={"max_epochs": 2}, seed=7, init_from=first, **more)


def other_model(place: object, rename: dict[str, str] | None = None, *, strict: bool = True, **model: Any) -> Any:
    config = tuned({"path": str(place), "rename": rename, "strict": strict})
    config["model"] = {"_target_": "tests.support.initial_models.Renamed", **model}
    return config


def notes(run_dir: Path | None) -> list[str]:
    assert run_dir is not None
    found = json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"]
    return [note for note in found if note.startswith("init_from")]


def test_a_run_begins_with_the_weights_and_is_named_by_them(pretrained: Path, runner: Runner, other: Runner) -> None:
    """A run's folder, a checkpoint's URL and three kinds of files of the same weights name the same run.

    It is another run than one that begins without them, and one without the weights of that run's first step.
    """
    weights: Weights = load_weights(pretrained)  # type: ignore[assignment]
    folder = runner.folder
    save_file(weights, folder / "w.safetensors")
    torch.save({"state_dict": weights, "epoch": 3, "global_step": 7, "loops": {}}, folder / "w.ckpt")
    torch.save(weights, folder / "w.pt")
    shutil.copytree(pretrained, folder / "elsewhere")
    first = outcome(runner.run(tuned(pretrained)))
    places = ["w.safetensors", "w.ckpt", "w.pt", "elsewhere"]
    for place in [*(folder / name for name in places), f"file://{pretrained}/checkpoints"]:
        assert outcome(runner.run(tuned(place)))["run_id"] == first["run_id"]
    [run_dir] = folder.glob("runs/*/*")
    recorded = json.loads((run_dir / "receipt.json").read_text())["config"]["init_from"]
    assert recorded["digest"] == digest(weights)
    assert recorded["path"] == str(pretrained)
    fresh = outcome(other.run(configure("cnn", trainer={"max_epochs": 2}, seed=7)))
    assert fresh["run_id"] != first["run_id"]
    assert fresh["trail"][0]["loss"] != first["trail"][0]["loss"]
    weights["net.8.bias"] += 1
    save_file(weights, folder / "w.safetensors")
    assert outcome(runner.run(tuned(folder / "w.safetensors")))["run_id"] != first["run_id"]


def test_on_any_devices_and_through_kills_without_the_file(pretrained: Path, runner: Runner, other: Runner) -> None:
    """A killed run resumes from its own checkpoint, when the weights are gone, and on two devices."""
    shutil.copytree(pretrained, other.folder / "weights")
    whole = outcome(runner.run(tuned(pretrained)))
    config = tuned(other.folder / "weights", checkpoint={"every_n_steps": 2})
    other.run(config, code=EXIT_STOPPED, signal_at=f"3 {int(signal.SIGTERM)} 1", world=2)
    shutil.rmtree(other.folder / "weights")
    assert outcome(other.run(config)) == whole
    assert "/weights is gone: the digest of its weights comes from" in other.said()


def test_names_and_shapes_that_do_not_fit_are_refused_with_what_helps(pretrained: Path, runner: Runner) -> None:
    """By name, before the first step, and nothing is left; then each hint is followed."""
    runner.run(other_model(pretrained), code=2)
    assert "the weights do not fit into Renamed: not in them: backbone.0.weight; " in runner.said()
    assert "; not in the model: net." in runner.said()
    assert "hint: init_from.rename={OLD: NEW} for the prefixes of names" in runner.said()
    runner.run(other_model(pretrained, strict=False), code=2)
    assert "error: init_from=" in runner.said()
    assert "none of its 16 weights fits into Renamed" in runner.said()
    wider = other_model(pretrained, {"net": "backbone"}, classes=5)
    runner.run(wider, code=2)
    assert (
        ": of another shape: backbone.8.bias (3,), here (5,); backbone.8.weight (3, 96), here (5, 96)" in runner.said()
    )
    assert "hint: init_from.strict=false loads the weights that fit" in runner.said()
    assert not list(runner.folder.glob("runs/*/*"))
    wider["init_from"]["strict"] = False
    [note] = notes(runner.run(wider))
    assert note.endswith(
        "14 of 16 weights of the model are loaded; of another shape: backbone.8.bias (3,), here (5,);"
        " backbone.8.weight (3, 96), here (5, 96)"
    )


def test_a_model_of_other_names_begins_alike(pretrained: Path, runner: Runner) -> None:
    """With new prefixes, and if its layers are made late, its first loss is that of the model with the old names."""
    first = outcome(runner.run(tuned(pretrained)))["trail"][0]["loss"]
    for late in (False, True):
        found = runner.run(other_model(pretrained, {"net": "backbone"}, late=late))
        assert outcome(found)["trail"][0]["loss"] == first
        assert notes(found) == []


def test_a_tied_weight_may_be_in_the_file_once(runner: Runner) -> None:
    """As in files that others share; the model has both names."""
    config = configure("mlp", "even", trainer={"max_epochs": 1})
    config["model"] = {"_target_": "tests.support.initial_models.Tied"}
    run_dir = runner.run(config)
    assert run_dir is not None
    weights: Weights = load_weights(run_dir)  # type: ignore[assignment]
    del weights["net.3.weight"]
    save_file(weights, runner.folder / "w.safetensors")
    config["init_from"] = str(runner.folder / "w.safetensors")
    assert notes(runner.run(config)) == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file, and no run: looked for "),
        (lambda path: path.write_bytes(b"no weights"), "w.ckpt"),
        (lambda path: torch.save({"state_dict": {"a": 1}}, path), "its state_dict holds a int under 'a'"),
        (lambda path: torch.save({"state_dict": {}, "x": Runner}, path), "cannot be read without running code from it"),
        (lambda path: path.mkdir(), "is neither a run nor a checkpoint"),
    ],
)
def test_a_place_without_weights_is_refused(make: Any, says: str, runner: Runner) -> None:
    place = runner.folder / "w.ckpt"
    make(place)
    runner.run(tuned(place), code=2)
    assert says in runner.said()
    assert "hint: " in runner.said()
    assert "Traceback" not in runner.said()
    assert not list(runner.folder.glob("runs/*/*"))


def test_a_digest_may_be_asked_for(pretrained: Path, runner: Runner) -> None:
    runner.run(tuned({"path": str(pretrained), "digest": "0" * 64}), code=2)
    assert "expected 000000000000" in runner.said()


def test_a_resume_does_not_ignore_it(pretrained: Path, runner: Runner) -> None:
    """resume=RUN continues with RUN's weights: other ones are refused, its own are not."""
    config = configure("cnn", trainer={"max_epochs": 2}, resume=str(pretrained), init_from=str(pretrained))
    runner.run(config, code=2)
    assert f"so init_from={pretrained} would have no effect" in runner.said()
    first = runner.run(tuned(pretrained))
    longer = tuned(pretrained, resume=str(first))
    longer["trainer"]["max_epochs"] = 3
    assert outcome(runner.run(longer))["steps"] == 15


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"path": "a", "strct": True}, "unknown key init_from.strct"),
        ({"path": 12}, "init_from.path=12: must be a text"),
        ({"strict": False}, "init_from has options, but no path"),
        ({"path": "a", "rename": ["b"]}, "init_from.rename=\\['b'\\]: must be a mapping of prefixes"),
        ({"path": "a", "digest": "abc"}, "init_from.digest=abc: must be 64 hex digits"),
        ("http://example.org/w.pt", "http is not supported"),
    ],
)
def test_a_wrong_value_is_refused(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(configure("mlp", init_from=value))


def test_prefixes_are_whole_parts_of_names() -> None:
    """The longest wins, an empty one is the beginning of each name, and one that fits nothing is an error."""
    weights = {name: torch.ones(1) for name in ("a.b.w", "a.c.w", "ab.w")}

    def names(prefixes: dict[str, str]) -> list[str]:
        return [name for name, _ in renamed(weights, prefixes, "w.pt")]

    assert names({"a": "x", "a.b": "y.z"}) == ["y.z.w", "x.c.w", "ab.w"]
    assert names({"a": ""}) == ["b.w", "c.w", "ab.w"]
    assert names({"": "net"}) == ["net.a.b.w", "net.a.c.w", "net.ab.w"]
    with pytest.raises(ConfigError, match=r"no weight of w.pt has the prefix b; its weights: a.b.w; a.c.w; ab.w"):
        names({"b": "x"})
    with pytest.raises(ConfigError, match=r"gives a.b.w and a.c.w the same name: q.w"):
        names({"a.b": "q", "a.c": "q"})
