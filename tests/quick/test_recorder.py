"""What real runs leave in their receipts."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from labtrain import receipt
from labtrain.errors import EXIT_STOPPED
from labtrain.provenance import uncommitted_change
from labtrain.store import file_sha256
from tests.conftest import Experiment
from tests.support.exact import Runner, configure

SCHEMA = json.loads(Path(receipt.__file__).with_name("receipt.schema.json").read_text())


def read(runner: Runner) -> dict[str, Any]:
    """Return the one receipt, once it has been held against the schema and its own digest."""
    (path,) = runner.folder.glob("runs/*/*/receipt.json")
    found = receipt.read(path.parent)
    assert found is not None
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def test_the_schema_is_one_and_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert tuple(SCHEMA["properties"]) == receipt.KEYS
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate({"schema": receipt.SCHEMA})


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_a_complete_one(runner: Runner, model: str) -> None:
    run_dir = runner.run(configure(model, "even"))
    assert run_dir is not None
    found = read(runner)
    assert found["trail"]["sha256"] == file_sha256(run_dir / "trail.jsonl")
    assert found["environment"]["files"] > 10_000
    assert found["data"]["train"]["samples"] == 40
    assert found["data"]["val"]["samples"] == 7
    assert found["data"]["train"]["opaque"] == []
    (segment,) = found["segments"]
    assert (segment["status"], segment["why"], segment["from_step"], segment["to_step"]) == ("complete", None, 0, 15)


def test_one_byte_of_the_data_is_another_digest(runner: Runner) -> None:
    """And it is said where the run goes on with it."""
    config = configure("mlp", "even", resume="never")
    runner.run(config, code=EXIT_STOPPED, signal_at=f"7 {int(signal.SIGTERM)} 0")
    before = read(runner)["data"]
    (path,) = runner.folder.glob("runs/*/*")
    runner.run(configure("mlp", "even", resume=str(path), data={"flip": 3}))
    found = read(runner)
    assert found["data"]["train"]["digest"] != before["train"]["digest"]
    assert found["data"]["val"] == before["val"]
    assert {"config.data.flip", "data.train.digest"} <= {each["key"] for each in found["segments"][1]["changed"]}


def test_each_end_is_told(runner: Runner) -> None:
    """Stopped, killed, broken, complete: the next start closes what was killed."""
    config = configure("mlp", "even", checkpoint={"every_n_steps": 1})
    config["callbacks"]["broken"] = {"_target_": "tests.support.exact_worker.Broken"}
    runner.run(config, code=EXIT_STOPPED, signal_at=f"3 {int(signal.SIGTERM)} 0")
    assert read(runner)["status"] == "interrupted"
    runner.run(config, code=None, signal_at=f"7 {int(signal.SIGKILL)} 0")
    assert read(runner)["segments"][-1]["status"] == "running"
    runner.run(config, code=1, environment={"BREAK_AT": "9"})
    assert read(runner)["status"] == "failed"
    runner.run(config)
    found = read(runner)
    told = [(each["status"], each["why"], each["to_step"]) for each in found["segments"]]
    assert told == [("interrupted", "SIGTERM", 3), ("killed", None, 7), ("failed", "ZeroDivisionError", 9),
                    ("complete", None, 15)]  # fmt: skip
    assert all(each["ended"] for each in found["segments"])


def git(folder: Path, *arguments: str) -> str:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    done = subprocess.run(
        ["git", "-C", folder, *arguments], env=os.environ | who, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_patch_turns_the_commit_into_the_code(own_experiment: Experiment, tmp_path: Path) -> None:
    """A change, and a source that git does not know; the repository is left as it was."""
    root = own_experiment.root
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "model.py").write_text((root / "model.py").read_text() + "\n# a change\n")
    (root / "more.py").write_text("x = 1\n")
    (root / "notes.txt").write_text("mine\n")
    before = git(root, "status", "--porcelain"), sorted(path.name for path in (root / ".git" / "objects").rglob("*"))
    run = own_experiment.train("trainer.max_steps=1", "logger=none", cwd=root)
    code = run.receipt["code"]
    assert (code["dirty"], code["untracked"], code["commit"]) == (
        True,
        ["more.py"],
        git(root, "rev-parse", "HEAD").strip(),
    )
    assert code["patch"] == uncommitted_change(str(root), ["more.py"]) == (run.folder / "code.patch").read_text()
    shutil.rmtree(root / "runs")
    assert before == (
        git(root, "status", "--porcelain"),
        sorted(path.name for path in (root / ".git" / "objects").rglob("*")),
    )
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(root), str(clone))
    subprocess.run(["git", "-C", clone, "apply", "-"], input=code["patch"], text=True, check=True)
    for name in ("model.py", "more.py"):
        assert (clone / name).read_bytes() == (root / name).read_bytes()
    assert not (clone / "notes.txt").exists()


def test_the_patch_is_the_change_byte_for_byte(own_experiment: Experiment, tmp_path: Path) -> None:
    """Lines as Windows ends them, a text that is no UTF-8, git's settings, staged files; what it ignores is only named."""
    root = own_experiment.root
    (root / "windows.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (root / ".gitignore").write_text("keys.py\nruns/\n.venv/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    for name, value in (("color.ui", "always"), ("diff.noprefix", "true"), ("diff.external", "false"),
                        ("diff.relative", "true"), ("diff.context", "0")):  # fmt: skip
        git(root, "config", name, value)
    (root / "staged.py").write_text("x = 1\n")
    git(root, "add", "staged.py")
    git(root, "mv", "data.py", "moved.py")
    (root / "data.py").write_text("from moved import *  # noqa: F403\n")
    (root / "windows.py").write_bytes(b"x = 1\r\ny = 3\r\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\nx = 1\n")
    (root / "keys.py").write_text("PASSWORD = 'correct-horse'\n")
    run = own_experiment.train("trainer.max_steps=1", "logger=none", cwd=root)
    assert (run.receipt["code"]["untracked"], run.receipt["code"]["ignored"]) == (
        ["data.py", "latin.py"],
        ["keys.py"],
    )
    assert b"correct-horse" not in (run.folder / "code.patch").read_bytes() + (run.folder / "receipt.json").read_bytes()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(root), str(clone))
    git(clone, "apply", str(run.folder.resolve() / "code.patch"))
    for name in ("windows.py", "latin.py", "staged.py", "moved.py", "data.py"):
        assert (clone / name).read_bytes() == (root / name).read_bytes()


def test_no_credential_is_in_what_a_run_leaves(runner: Runner) -> None:
    """In variables, the configuration and the command."""
    value = "s3cr3t-abcdefgh-0123"
    config = configure("mlp", "even")
    config["callbacks"]["hub"] = {"_target_": "tests.support.exact_worker.Hub", "hub_token": value}
    variables = {"WANDB_API_KEY": value, "AWS_SECRET_ACCESS_KEY": value, "DB_PASSWORD": value}
    run_dir = runner.run(config, environment=variables)
    assert run_dir is not None
    for path in run_dir.rglob("*"):
        assert not path.is_file() or value.encode() not in path.read_bytes(), path
    assert read(runner)["config"]["callbacks"]["hub"]["hub_token"] == receipt.NOT_RECORDED


def test_a_credential_in_the_change_is_not_recorded(own_experiment: Experiment) -> None:
    root, value = own_experiment.root, "ghp_abcdefghijklmnopqrstuvwxyz0123456789"
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "model.py").write_text((root / "model.py").read_text() + f"\nTOKEN = '{value}'\n")
    run = own_experiment.train("trainer.max_steps=1", "logger=none", cwd=root)
    for name in ("receipt.json", "code.patch"):
        text = (run.folder / name).read_text()
        assert value not in text
        assert receipt.NOT_RECORDED in text
