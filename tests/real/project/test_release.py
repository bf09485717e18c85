"""`make release`: what it refuses, and that the wheel it builds makes an experiment in an empty environment."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from labtrain import __version__
from tests.conftest import ROOT, need, skip_or_fail


def git(repository: Path, *words: str) -> str:
    identity = ("-c", "user.name=a test", "-c", "user.email=test@localhost")
    command = ["git", *identity, *words]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with this working tree, committed: whoever tests a change need not commit it."""
    need("git", "git")
    target = tmp_path_factory.mktemp("release") / "labtrain"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        skip_or_fail("not a git repository")
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    git(target, "init", "-q")
    git(target, "add", "-A")
    git(target, "commit", "-qm", "all")
    return target


def release(repository: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"VENV": str(Path(sys.executable).parent)}
    return subprocess.run(
        [repository / ".ci" / "release"], env=environment, capture_output=True, text=True, check=False, timeout=900
    )


def test_changes_that_are_not_committed_are_refused(repository: Path) -> None:
    (repository / "note.txt").write_text("a thought\n")
    done = release(repository)
    (repository / "note.txt").unlink()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: the tree has changes that are not committed:\n?? note.txt\n\nhint: git commit"
    )
    assert not (repository / "dist").exists()


def test_a_version_that_has_a_tag_is_refused(repository: Path) -> None:
    git(repository, "tag", f"v{__version__}")
    done = release(repository)
    git(repository, "tag", "-d", f"v{__version__}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the tag v{__version__} exists\n\nhint: raise __version__ in src/labtrain/__init__.py" in done.stderr
    assert not (repository / "dist").exists()


def test_the_citation_gets_the_version(repository: Path) -> None:
    """A person raises `__version__` alone: the release writes it into CITATION.cff, for them to commit."""
    citation = repository / "CITATION.cff"
    before = citation.read_text()
    dated = before + "date-released: 2020-02-02\n"
    citation.write_text(dated.replace(f"\nversion: {__version__}\n", "\nversion: 0.0.9\n"))
    git(repository, "commit", "-qam", "an earlier version")
    done = release(repository)
    written = citation.read_text()
    citation.write_text(before)
    git(repository, "commit", "-qam", "the version of now")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: CITATION.cff had another version: it now has {__version__}" in done.stderr
    assert "hint: git commit -m 'release: " in done.stderr
    assert re.sub(r"date-released: 20[2-9]\d-\d\d-\d\d\n", "", written) == before
    assert "2020-02-02" not in written
    assert not (repository / "dist").exists()


@pytest.mark.release
def test_the_wheel_makes_and_trains_an_experiment_in_an_empty_environment(repository: Path) -> None:
    """The sdist holds the committed files; nothing is tagged or pushed: the commands are printed."""
    done = release(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "yes          the same bits to the end" in done.stdout
    wheel, sdist = (repository / "dist" / f"labtrain-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz"))
    for path in (wheel, sdist):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  dist/{path.name}\n" in done.stdout
    assert f"git push origin HEAD v{__version__}\n" in done.stdout
    assert git(repository, "tag") == ""
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    assert packed == set(git(repository, "ls-files").splitlines())
