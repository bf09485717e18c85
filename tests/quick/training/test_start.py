"""What a training begins with: a configuration that is whole, and data that each stage splits alike."""

import json
import os
import re
import shutil
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import labtrain
from labtrain.base.errors import EXIT_STOPPED, ConfigError
from labtrain.environment.doctor.environment import unlike_lock
from labtrain.environment.lock.conda import PROFILES, Profile, read_conda_lock
from labtrain.record.identity import route
from labtrain.review.replay import _git
from tests.conftest import QUICK, ROOT, Experiment
from tests.support.exact import Runner, configure, outcome


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "labtrain.train(None): must be a configuration, a mapping"),
        (3, "labtrain.train(3): must be a configuration, a mapping"),
        ("x", "labtrain.train('x'): must be a configuration, a mapping"),
        (OmegaConf.create([1]), "labtrain.train([1]): must be a configuration, a mapping"),
        ({}, "the configuration lacks experiment, logger, seed, resume, model and "),
        ({"trainer": 3}, "trainer=3: must be a mapping"),
        (configure() | {"trainer": {"devices": 1}}, "the configuration lacks trainer.accelerator, trainer.strategy, "),
        ({key: value for key, value in configure().items() if key != "seed"}, "the configuration lacks seed"),
        (configure() | {"data": {"_target_": "x"}}, "the configuration lacks data.batch_size, data.num_workers"),
    ],
)
def test_a_configuration_that_was_not_composed_is_refused_by_name(config: Any, says: str) -> None:
    """labtrain.train takes a dict: it names the keys that it lacks, and how they are had."""
    with pytest.raises(ConfigError, match=re.escape(says)) as found:
        labtrain.train(config)
    assert "defaults: [labtrain, _self_]" in found.value.hint


def test_each_setup_of_the_data_splits_alike(runner: Runner, other: Runner) -> None:
    """A split at random in setup() gives fit, test, each rank and a resumed start the same parts."""

    def split(folder: Path, **more: Any) -> Any:
        config = configure("mlp", "even", **more)
        config["model"] = {"_target_": "tests.support.small_models.Tested"}
        config["data"] = {"_target_": "tests.support.small_models.Split", "folder": str(folder), "batch_size": 8,
                          "num_workers": 0}  # fmt: skip
        return config

    folder = runner.folder / "stages"
    folder.mkdir()
    whole = outcome(runner.run(split(folder)))
    other.run(split(folder), code=EXIT_STOPPED, signal_at=f"4 {int(signal.SIGTERM)} 0")
    assert outcome(other.run(split(folder), world=2))["weights_digest"] == whole["weights_digest"]
    stages = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(stages) == {"fit-0", "fit-1", "test-0", "test-1"}
    assert len(set(stages.values())) == 1


def test_under_srun_the_digest_is_the_last_line_of_one_stream(experiment: Experiment) -> None:
    """srun joins the two streams in any order: the table then goes to the digest's, before it; else to the other."""
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "1"}
    command = (*QUICK, "trainer.max_epochs=1", "paths.runs=runs")
    run = experiment.train(*command, env=step)
    assert re.fullmatch(r"runs/\S+ [0-9a-f]{64}", run.out.splitlines()[-1])
    assert "metric" in run.out
    assert "metric" not in run.err
    run = experiment.train(*command, "resume=never")
    assert re.fullmatch(r"runs/\S+ [0-9a-f]{64}\n", run.out)
    assert "metric" in run.err


def test_git_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git that waits, for a lock or a person, is an error with its command after a time."""
    program = tmp_path / "git"
    program.write_text("#!/bin/sh\nexec sleep 600\n")  # fixed: over its time limit
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("labtrain.review.replay.GIT_TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError, match=r"git checkout there: did not end within 0\.5 seconds"):
        _git(tmp_path, "checkout", "there", filters=True)


def notes(run_dir: Path | None) -> list[str]:
    assert run_dir is not None
    return list(json.loads((run_dir / "receipt.json").read_text())["determinism"]["notes"])


def test_an_environment_that_is_not_the_locks_is_said_at_the_start(runner: Runner) -> None:
    """In the receipt too, with what makes it so; in mode off not, and nothing where the experiment has no lock."""
    text = (ROOT / "requirements.lock").read_text()
    assert "\nxxhash==" in text
    config = configure("mlp", "even", trainer={"max_epochs": 1})
    assert notes(runner.run(config)) == []
    experiment = runner.folder / "none"
    experiment.mkdir()
    (experiment / "requirements.lock").write_text(re.sub(r"\nxxhash==\S+", "\nxxhash==1.0.0", text))
    (said,) = notes(runner.run(config))
    assert "this environment differs from the experiment's lock: " in said
    assert f"xxhash {metadata.version('xxhash')} (locked 1.0.0)" in said
    assert said.endswith(". make setup")
    assert f"warning: {said}" in runner.said()
    assert notes(runner.run(config | {"determinism": config["determinism"] | {"mode": "off"}})) == []
    (experiment / "requirements.lock").write_text(text)
    assert unlike_lock(experiment) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_of_condas_environment_builds_are_compared_and_what_pip_put_beside_them(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of the files in conda-meta, and by requirements-conda.lock."""
    for name in (profile.lock, "requirements-conda.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    meta = tmp_path / "prefix" / "conda-meta"
    meta.mkdir(parents=True)
    for entry in read_conda_lock(ROOT, profile)["package"]:
        (meta / f"{entry['url'].rpartition('/')[2].removesuffix('.conda').removesuffix('.tar.bz2')}.json").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    assert route() == profile.route
    beside = unlike_lock(tmp_path)
    assert not [each for each in beside if "locked" not in each]  # of pip's some are of other platforms than this
    (torch,) = meta.glob("pytorch-2.9.1-*.json")
    other = torch.stem.replace("2.9.1", "2.9.0")
    torch.rename(meta / f"{other}.json")
    assert set(unlike_lock(tmp_path)) - set(beside) == {f"{other} (not locked)", f"{torch.stem} missing"}
    (tmp_path / profile.lock).unlink()  # an experiment of before there was a lock for a CPU
    assert unlike_lock(tmp_path) == [f"{profile.lock} is missing in {tmp_path}"]
    (tmp_path / "requirements-conda.lock").unlink()
    assert unlike_lock(tmp_path) == []
