"""Never silent: each thing that cannot be exact is refused in strict mode, said and recorded in warn, left alone in off."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labtrain.base.errors import ConfigError
from labtrain.training.guard import Guard, left_out_asserts
from tests.quick.training.test_strategy import faulty
from tests.support.exact import Runner, configure


def notes(run_dir: Path | None) -> list[str]:
    assert run_dir is not None
    return list(json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("benchmark", "torch.backends.cudnn.benchmark is True, but determinism.mode set False"),
        ("threads", "torch.get_num_threads() is 2, but determinism.mode set 1"),
    ],
)
def test_refused_in_strict_said_in_warn_left_alone_in_off(fault: str, says: str, runner: Runner) -> None:
    runner.run(faulty(fault), code=2)
    assert says in runner.said()
    assert "determinism.mode=warn" in runner.said()
    assert not list(runner.folder.glob("runs/*/*"))
    assert any(says in note for note in notes(runner.run(faulty(fault, determinism={"mode": "warn"}))))
    assert f"warning: {says}" in runner.said()
    runner.run(faulty(fault, determinism={"mode": "off"}))
    assert says not in runner.said()


def test_an_operation_without_a_deterministic_kernel_is_named_with_its_module(runner: Runner) -> None:
    runner.run(faulty("forward"), code=2)
    assert "put_ has no deterministic kernel here; it is used in net.5 (NoDeterministicForward), line " in runner.said()
    assert "Traceback" not in runner.said()


def test_one_in_a_backward_is_named_too(runner: Runner) -> None:
    runner.run(faulty("backward"), code=2)
    assert "put_ has no deterministic kernel here; it is used in the backward of " in runner.said()
    assert "net.5 (NoDeterministicBackward)" in runner.said()


def test_tf32_from_outside_is_refused(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("mlp", "even")
    runner.run(config, code=2, environment={"NVIDIA_TF32_OVERRIDE": "1"})
    assert "the environment has NVIDIA_TF32_OVERRIDE=1: it changes bits" in runner.said()


@pytest.mark.parametrize("mode", ["strict", "portable", "warn", "off"])
def test_code_without_its_asserts_is_refused(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PYTHONOPTIMIZE leaves them out, and what they call: another result under the same name."""
    said: list[str] = []
    guard = Guard(mode=mode, shards=4, threads=1, say=said.append, code=None, there=set(), root=tmp_path)
    guard._judge(left_out_asserts())
    assert said == []
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=1))
    if mode in ("strict", "portable"):
        with pytest.raises(ConfigError, match=r"Python skips asserts .*\n\nhint: unset PYTHONOPTIMIZE"):
            guard._judge(left_out_asserts())
    else:
        guard._judge(left_out_asserts())
    assert len(said) == (mode == "warn")


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"val_check_interval": "00:00:01:00"}, "trainer.val_check_interval is a time"),
        ({"max_time": "00:00:01:00"}, "trainer.max_time ends the training by the clock"),
        ({"reload_dataloaders_every_n_epochs": 1}, "trainer.reload_dataloaders_every_n_epochs"),
    ],
)
def test_clocks_are_refused(trainer: dict[str, Any], says: str, runner: Runner) -> None:
    runner.run(configure("mlp", "even", trainer=trainer), code=2)
    assert says in runner.said()


def test_an_iterator_is_refused_with_shards(runner: Runner) -> None:
    """It is the only loader that is left to refuse: it has no second epoch, and a resume has nothing to begin with."""
    config = configure("mlp", "even", data={"loader": "once"}, determinism={"mode": "warn"})
    runner.run(config, code=2)
    assert "its batches cannot be cut into determinism.shards=4" in runner.said()
    assert "determinism.shards=null" in runner.said()


@pytest.mark.parametrize("loader", ["once", "val once"])
def test_an_iterator_is_refused_in_strict_said_in_warn(loader: str, runner: Runner) -> None:
    says = {"once": "the training data comes from builtins.generator: it can be iterated only once",
            "val once": "the validation data comes from builtins.generator"}[loader]  # fmt: skip
    config = configure("mlp", "even", data={"loader": loader}, determinism={"shards": None})
    config["trainer"] |= {"max_epochs": 1, "num_sanity_val_steps": 0}
    runner.run(config, code=2)
    assert says in runner.said()
    config["determinism"]["mode"] = "warn"
    assert any(says in note for note in notes(runner.run(config)))


def test_a_batch_that_leaves_a_rank_without_samples_is_refused(runner: Runner) -> None:
    """Without shards the other rank would wait for it. A limit may leave the batch out."""
    config = configure("mlp", "even", data={"size": 33}, determinism={"shards": None})
    config["trainer"] |= {"max_epochs": 1, "strategy": "ddp_find_unused_parameters_true"}
    runner.run(config, world=2, code=2)
    assert "a batch of Images has 1 sample for 2 devices: without determinism.shards" in runner.said()
    assert not list(runner.folder.glob("runs/*/*/checkpoints/step-*"))
    config["trainer"]["limit_train_batches"] = 4
    runner.run(config, world=2)


def test_tf32_in_code_and_the_rest_are_in_the_receipt(runner: Runner) -> None:
    run_dir = runner.run(faulty("tf32"))
    assert run_dir is not None
    flags = json.loads((run_dir / "receipt.json").read_text())["determinism"]
    assert flags["float32_matmul_precision"] == "high"
    assert flags["notes"] == []
