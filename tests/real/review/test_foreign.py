"""A reviewer's minute: `labtrain verify` of a git repository and of a bundle, as a reviewer types it."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import DamagedError
from labtrain.record import receipt as receipts
from labtrain.review.foreign.bundle import unpack
from tests.conftest import LABTRAIN, QUICK, Experiment, changed, need
from tests.support.old import RUNS
from tests.support.old import unpack as unpack_old
from tests.support.template import WHEEL
from tests.support.verification import git

SHORT = (*QUICK, "trainer.max_steps=6")
# A judge without the packages that only a training needs: a small core.
WITHOUT = (
    "torch",
    "lightning",
    "numpy",
    "scipy",
    "torchmetrics",
    "tensorboard",
    "safetensors",
    "pandas",
    "rocrate",
    "plotly",
    "psutil",
    "xxhash",
    "wheel",
)
JUDGE = f"import sys; sys.modules.update(dict.fromkeys({WITHOUT})); from labtrain.cli import main; main()"
# Model code that fails where it is verified, if it can reach the network or the author's or the reviewer's files.
PROBE = """
import os as _os, pathlib as _pathlib, socket as _socket

if "labtrain-verify-" in _os.environ.get("HOME", ""):
    for _action in (lambda: _socket.create_connection(("127.0.0.1", {port}), 3),
                    lambda: _pathlib.Path({secret!r}).read_text()):
        try:
            _action()
        except OSError:
            continue
        raise RuntimeError("not in a sandbox")
"""


def verify(*words: str | Path, cwd: Path, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `labtrain verify` without a terminal, by a judge without torch."""
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, "verify", *map(str, words)], capture_output=True, text=True, check=False,
        timeout=900, cwd=cwd, env=os.environ | env, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def listening() -> Iterator[int]:
    """The port of a server on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(scope="module")
def published(
    shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory, listening: int
) -> tuple[Path, Path]:
    """An author's repository in lab/digits with a receipt, its trail and an uncommitted change; and the run's folder."""
    need("bwrap", "bubblewrap")
    top = tmp_path_factory.mktemp("author") / "lab"
    root = top / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (top / "secret").write_text("the author's")
    probe = PROBE.format(port=listening, secret=str(top / "secret"))
    (root / "model.py").write_text((root / "model.py").read_text() + probe)
    (top / ".gitignore").write_text("secret\n")
    git(top, "init", "-q", "-b", "main")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "code")
    (root / "data.py").write_text((root / "data.py").read_text() + "\nCHANGED = True  # and not committed\n")
    run_dir = Experiment(root).train(*SHORT, cwd=root).folder
    git(top, "checkout", "-q", "digits/data.py")
    git(top, "add", "-f", *(str(run_dir / name) for name in ("receipt.json", "trail.jsonl")))
    git(top, "commit", "-qm", "the run")
    git(top, "tag", "paper")
    return top, run_dir


def test_a_repository_is_verified_with_one_command(published: tuple[Path, Path], tmp_path: Path) -> None:
    """In this environment, since the lock and the wheel are its own; patched, in the sandbox, and nothing is left."""
    top, run_dir = published
    before = {path: path.stat().st_mtime_ns for path in top.rglob("*")}
    cache = str(tmp_path / "cache")
    done = verify(f"file://{top}@paper", "--json", cwd=tmp_path, TMPDIR=str(tmp_path), XDG_CACHE_HOME=cache)
    found = json.loads(done.stdout)
    assert found["same"] is True
    assert found["whole"] is True
    assert found["found"] == "the same bits to the end"
    about = found["about"]
    assert about["commit"] == subprocess.check_output(["git", "-C", top, "rev-parse", "HEAD"], text=True).strip()
    assert about["receipt"] == (run_dir / "receipt.json").relative_to(top).as_posix()
    assert "this one: it has exactly what the lock names" in about["environment"]
    assert "sandbox      no network, no home" in done.stderr
    assert "data.py" in done.stderr  # the patch
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}  # no verdict, and no clone
    assert not (tmp_path / "cache" / "labtrain" / "environments").exists()
    assert {path: path.stat().st_mtime_ns for path in top.rglob("*")} == before


def test_a_false_receipt_is_answered_with_no_and_where(published: tuple[Path, Path], tmp_path: Path) -> None:
    """Its author changed the seed after the training. A signed verdict is handed over in the working directory."""
    git(tmp_path, "clone", "-q", str(published[0]), "clone")
    run_dir = tmp_path / "clone" / published[1].relative_to(published[0])
    changed(run_dir, "config/seed", 7)
    git(tmp_path / "clone", "commit", "-qam", "forged")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    done = verify(tmp_path / "clone", "--steps", "2", "--key", tmp_path / "key", cwd=tmp_path, code=1,
                  XDG_CACHE_HOME=str(tmp_path / "cache"))  # fmt: skip
    assert "no           not the same bits: first at step 1" in done.stdout
    (line,) = (tmp_path / f"{run_dir.name}.verified.jsonl").read_text().splitlines()
    assert json.loads(line)["same"] is False
    assert "signature" in json.loads(line)


def test_what_cannot_be_verified_says_why(published: tuple[Path, Path], tmp_path: Path) -> None:
    """A commit that was not pushed; a shallow clone; no sandbox on this machine; a lock that is not the receipt's."""
    top, run_dir = published
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{top}", "shallow")
    said = verify(tmp_path / "shallow", "--steps", "0", cwd=tmp_path, code=2).stderr
    assert "was not pushed, or the repository is shallow" in said
    (tmp_path / "bin").mkdir()
    for program in ("git", "uv"):
        (tmp_path / "bin" / program).symlink_to(
            shutil.which(program, path=f"{Path(sys.executable).parent}:/usr/bin") or ""
        )
    said = verify(top, cwd=tmp_path, code=2, PATH=str(tmp_path / "bin")).stderr
    assert "code from elsewhere runs in the sandbox, which cannot work here: bubblewrap is not installed" in said
    assert "or --trust, which runs it as you" in said
    git(tmp_path, "clone", "-q", str(top), "forged")
    changed(tmp_path / "forged" / run_dir.relative_to(top), "environment/lock_digest", "0" * 64)
    git(tmp_path / "forged", "commit", "-qam", "forged")
    said = verify(tmp_path / "forged", cwd=tmp_path, code=2).stderr
    assert "the run was trained with another lock" in said
    assert verify(top, "--steps", "0", cwd=tmp_path).stdout.splitlines()[-1].startswith("unverified")


def test_a_bundle_needs_nothing_else_and_its_environment_is_made(
    published: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from the repository, with another labtrain than the judge: from uv's cache, and offline while it trains.

    The other labtrain has a .pth file, which runs only in the sandbox. Bundles of one run have the same bytes. One
    changed file is named.
    """
    top, canary = tmp_path / "lab", tmp_path / "ran"
    shutil.copytree(published[0], top)
    root = top / "digits"
    _add_to_wheel(root, "evil.pth", f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n")
    git(top, "commit", "-qam", "another labtrain")
    run_dir = Experiment(root).train(*SHORT, "seed=5", cwd=root).folder
    for name in ("run.zip", "again.zip"):
        subprocess.run([LABTRAIN, "bundle", run_dir, "-o", tmp_path / name], check=True, capture_output=True)
    assert (tmp_path / "run.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    (tmp_path / "away").mkdir()
    (tmp_path / "run.zip").rename(tmp_path / "away" / "run.zip")
    shutil.rmtree(top)
    uv_cache = subprocess.check_output([Path(sys.executable).with_name("uv"), "cache", "dir"], text=True).strip()
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "UV_CACHE_DIR": uv_cache}
    done = verify("run.zip", "--json", cwd=tmp_path / "away", **env)
    found = json.loads(done.stdout)
    assert found["same"] is True
    assert found["whole"] is True
    assert "made now" in found["about"]["environment"]
    assert "different from this one, which only compares" in done.stderr
    assert not canary.exists()
    _names_what_was_changed(tmp_path / "away")


def test_an_old_run_is_verified_in_its_old_environment(tmp_path: Path) -> None:
    """`--locked`: labtrain 38c3d00 trains it again, with the packages of its lock; this labtrain only compares.

    Without a terminal it is refused before anything is made, because another user trained it.
    """
    root = unpack_old(tmp_path)
    uv_cache = subprocess.check_output([Path(sys.executable).with_name("uv"), "cache", "dir"], text=True).strip()
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "UV_CACHE_DIR": uv_cache}
    for name in ("requirements.lock", "model.py"):  # its commit has them as they were
        (root / name).write_text((root / name).read_text() + "# changed since\n")
    refused = verify(RUNS[0], "--locked", cwd=root, code=2, **env)
    assert "its code is untrusted" in refused.stderr
    assert not (tmp_path / "cache").exists()
    done = verify(RUNS[0], "--locked", "--trust", cwd=root, **env)
    assert "made now: 303 pins" in done.stdout
    assert "different from this one, which only compares" in done.stdout
    assert done.stdout.splitlines()[-1] == "yes          the same bits to the end"


def _add_to_wheel(root: Path, name: str, text: str) -> None:
    """Put a file into an experiment's labtrain wheel, and the wheel's new hash into labtrain.lock."""
    with zipfile.ZipFile(root / WHEEL, "a") as archive:
        archive.writestr(name, text)
    digest = hashlib.sha256((root / WHEEL).read_bytes()).hexdigest()
    (root / "labtrain.lock").write_text(f"./{WHEEL} --hash=sha256:{digest}\n")


def _names_what_was_changed(folder: Path) -> None:
    """Pack a bundle anew with one byte of one file changed: each time the error names the file."""
    with zipfile.ZipFile(folder / "run.zip") as archive:
        files: dict[str, Any] = {name: archive.read(name) for name in archive.namelist()}
    for name in files:
        if name == "ro-crate-metadata.json":
            continue
        with zipfile.ZipFile(folder / "changed.zip", "w") as archive:
            for each, data in files.items():
                archive.writestr(each, data[:-1] + bytes([data[-1] ^ 1]) if each == name else data)
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        (folder / "scratch").mkdir()
        with pytest.raises(DamagedError, match=f"{re.escape(name)} was changed"):
            unpack(folder / "changed.zip", folder / "scratch")
    assert receipts.SCHEMA in files["receipt.json"].decode()
