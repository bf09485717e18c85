import shutil
import subprocess
from pathlib import Path

import pytest

from labtrain import __version__
from labtrain.record import receipt
from tests.conftest import LABTRAIN, QUICK, ROOT, Experiment


def labtrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LABTRAIN, *arguments], capture_output=True, text=True, check=False)


def test_the_version_and_the_help() -> None:
    assert labtrain("--version").stdout == f"labtrain, version {__version__}\n"
    text = labtrain("--help").stdout
    assert all(command in text for command in ("demo", "diff", "digest", "doctor", "gate", "new", "report", "verify"))


def test_an_unknown_command_is_wrong_usage() -> None:
    assert labtrain("digset").returncode == 2


@pytest.mark.parametrize("command", ["verify", "sign"])
def test_several_runs_are_answered_with_a_loop(command: str) -> None:
    """As a shell gives them for runs/x/*."""
    done = labtrain(command, "runs/x/a", "runs/x/b c", "--key", "k")
    assert (done.returncode, done.stdout) == (2, "")
    loop = f"for run in runs/x/a 'runs/x/b c'; do labtrain {command} \"$run\"; done"
    assert done.stderr == f"error: labtrain {command} takes one run, got 2\n\nhint: {loop}\n"
    assert "No such option" in labtrain(command, "runs/x/a", "--no-such").stderr


def test_the_digest_of_a_run_a_checkpoint_and_a_file(experiment: Experiment) -> None:
    """Computed from the files; the whole state's is the manifest's too."""
    run = experiment.train(*QUICK, "paths.runs=runs", "trainer.max_steps=2")
    checkpoint = run.folder / "checkpoints" / "step-0000000002"
    for target in (run.folder, checkpoint, checkpoint / "weights.safetensors", f"file://{checkpoint.resolve()}"):
        done = labtrain("digest", str(target))
        assert (done.returncode, done.stdout) == (0, run.digest + "\n"), done.stderr
    whole = labtrain("digest", str(run.folder), "--all")
    assert (whole.returncode, whole.stdout.strip()) == (0, run.receipt["results"]["state_digest"])

    wrong = run.receipt
    wrong["results"]["weights_digest"] = "0" * 64
    receipt.write(run.folder, wrong)
    claimed = labtrain("digest", str(run.folder))
    assert (claimed.returncode, claimed.stdout) == (1, run.digest + "\n")
    assert f"digest mismatch: the receipt or manifest records {'0' * 64}" in claimed.stderr


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nothing", "neither a run nor a checkpoint: looked for receipt.json, manifest.json and step-*"),
        ("gopher://host/run", "gopher is not supported for checkpoints"),
        ("gs://bucket/run", "gcsfs is not installed"),
    ],
)
def test_a_target_that_has_no_digest(target: str, says: str, tmp_path: Path) -> None:
    done = labtrain("digest", target)
    assert done.returncode == 2
    assert says in done.stderr
    assert "hint: " in done.stderr


def test_every_command_takes_a_runs_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also its beginning; an unknown or ambiguous one is an error with candidates, before anything is done."""
    monkeypatch.chdir(tmp_path)
    golden = ROOT / "tests" / "golden"
    for name in ("906ca0b1c2d3", "0b6395aaaaaa", "0b6395bbbbbb"):
        shutil.copytree(golden, tmp_path / "runs" / "digits" / name)
    assert labtrain("diff", "906c", "0b6395aaaaaa").returncode == 0
    assert labtrain("report", "906c").returncode == 0
    assert labtrain("crate", "906c", "-o", "x.zip").returncode == 0
    for command in (
        ("diff", "906c"),
        ("verify",),
        ("report",),
        ("gate",),
        ("sign",),
        ("crate", "-o", "x.zip"),
        ("digest",),
    ):
        for name, says in (("0b63", "0b63: 2 runs begin with it: runs/digits/0b6395aaaaaa; "),
                           ("dead", "dead: no run of this id in runs, which has runs/digits/0b6395aaaaaa; ")):  # fmt: skip
            done = labtrain(*command, name)
            assert (done.returncode, done.stdout) == (2, ""), command
            assert f"error: {says}" in done.stderr, command
            assert "\n\nhint: " in done.stderr
