"""`labtrain update`: a kept experiment of 2026-12-01 is brought to a newer labtrain, by git's own merge."""

import re
import shutil
from pathlib import Path

import pytest

from labtrain.environment.lock.check import check_locks
from labtrain.environment.lock.pins import read_pins
from labtrain.project.origin import make_base, read_carried
from tests.conftest import LABTRAIN, ROOT, need
from tests.quick.project import test_merge as small
from tests.real.environment.test_doctor import in_namespace
from tests.support.old import RUNS, unpack
from tests.support.template import files, run
from tests.support.update import IDENTITY, NEWER, TEMPLATE, git, labtrain, newer_labtrain

ZIPP = re.search(r"^zipp==.*\n(?:    --hash.*\n)+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
ANOTHER_ZIPP = """zipp==4.1.1 ; python_full_version < '3.12' \\
    --hash=sha256:7ebb7a44c021b29fd8dbd7cce6812d0d7b5b454521f93cc71af6ccd155aaa70b \\
    --hash=sha256:8979f52d874162f485ff2981e3891f3a3317b7a3dd43ff1e1775b9304f307a9c
"""
# The person edited model.py, conf/config.yaml, README.md and Makefile, and deleted notebooks/. These are elsewhere.
EDITS = {
    f"{TEMPLATE}/model.py": ("        return self.net(images)\n", "        return self.net(images)  # (B, 10)\n"),
    f"{TEMPLATE}/data.py": ('"""', '"""Newer. '),
    f"{TEMPLATE}/Makefile": (
        "test: setup ## run",
        "lint: setup ## lint\n\t@.venv/bin/ruff check .\n\ntest: setup ## run",
    ),
    f"{TEMPLATE}/README.md": ("There are two other ways", "There are (at least) two other ways"),
    f"{TEMPLATE}/extra/newer.json": ("", '{"version": "0.2.0"}\n'),
    "src/labtrain/training/fit.py": ('"""', '"""Newer: '),
    "requirements.lock": (ZIPP[0] if ZIPP else "zipp", ANOTHER_ZIPP),
}
# These are on a line that the person edited, too, and in a file that the person deleted.
CLASHES = {
    f"{TEMPLATE}/conf/config.yaml": ("  width: 16\n", "  width: 20\n"),
    f"{TEMPLATE}/notebooks/start.ipynb": ("cells", "cells "),
}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newer_labtrain(tmp_path_factory.mktemp("newer") / "labtrain", EDITS)


@pytest.fixture(scope="module")
def clashing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return newer_labtrain(tmp_path_factory.mktemp("clashing") / "labtrain", EDITS | CLASHES)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    need("git", "git")
    return unpack(tmp_path)


def content(root: Path) -> dict[str, str]:
    """Return the sha256 of each file, without git's own."""
    return {name: digest for name, digest in files(root).items() if not name.startswith(".git/")}


def test_the_base_is_what_the_older_labtrain_made(old: Path, tmp_path: Path) -> None:
    """Byte for byte the first commit, with the name and the author found in files that the person has edited."""
    git(old, "checkout", "-q", "HEAD^")
    first = {name: digest for name, digest in content(old).items() if not name.startswith("runs/")}
    git(old, "checkout", "-q", "main")
    (tmp_path / "scratch").mkdir()
    base, values = make_base(read_carried(old), tmp_path / "scratch")
    assert values == {"name": "digits", "author": "Ada Lovelace"}
    assert content(base) == first


def test_edits_of_both_sides_are_merged_and_the_old_run_is_verified(old: Path, newer: Path) -> None:
    """The whole way: update, look, commit; then today's labtrain trains a run of the older one again."""
    before, head = content(old), git(old, "rev-parse", "HEAD")
    done = labtrain(newer, "update", cwd=old)
    assert done.returncode == 0, done.stderr + done.stdout
    now = content(old)
    assert {name for name in before if name.startswith("runs/") and now[name] != before[name]} == set()
    model = (old / "model.py").read_text()
    assert "nn.GELU()" in model
    assert "return self.net(images)  # (B, 10)" in model
    makefile = (old / "Makefile").read_text()
    assert [each in makefile for each in ("# ours", "sweep: setup", "lint: setup")] == [True] * 3
    assert "An experiment of Ada Lovelace, created with labtrain. It asks" in (old / "README.md").read_text()
    assert "(at least) two" in (old / "README.md").read_text()
    assert (old / "extra" / "newer.json").exists()
    assert not (old / "notebooks").exists()
    assert (old / "conf" / "experiment" / "wide.yaml").exists()
    assert [path.name for path in (old / "vendor").iterdir()] == [f"labtrain-{NEWER}-py3-none-any.whl"]
    assert git(old, "rev-parse", "HEAD") == head, "update commits nothing"
    assert git(old, "diff", "--name-only") == ""
    assert git(old, "for-each-ref", "refs/worktree") == ""

    said = done.stdout
    assert said.startswith("labtrain 0.1.0 (6002ec354697) -> 0.2.0 (")
    for line in (
        "zipp 4.1.2 -> 4.1.1\n",
        "code           data.py; model.py",
        "merged         with your edits: Makefile; README.md; model.py",
        "configuration  yours is unchanged",
        "git reset --hard",
    ):
        assert line in said, said
    git(old, "commit", "-qam", "labtrain 0.2.0")

    verified = run(LABTRAIN, "verify", f"runs/digits/{RUNS[0]}", "--trust", cwd=old, env=IDENTITY)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.splitlines()[-1].startswith("yes          the same bits to the end")
    assert "differs      code.labtrain" in verified.stdout


def test_a_second_update_says_that_nothing_is_newer(old: Path, newer: Path) -> None:
    labtrain(newer, "update", cwd=old)
    git(old, "commit", "-qam", "labtrain 0.2.0")
    before = content(old)
    done = labtrain(newer, "update", cwd=old)
    assert (done.returncode, done.stdout) == (0, f"up to date: the experiment carries this labtrain, {NEWER}\n")
    assert content(old) == before
    older = run(LABTRAIN, "update", cwd=old, env=IDENTITY)
    assert older.returncode == 2
    assert f"carries labtrain {NEWER}, newer than the labtrain that is running: 0.1.0" in older.stderr
    assert content(old) == before


def test_conflicts_are_left_as_git_marks_them_and_git_goes_back(old: Path, clashing: Path) -> None:
    before = content(old)
    done = labtrain(clashing, "update", cwd=old)
    assert done.returncode == 1, done.stderr
    config = (old / "conf" / "config.yaml").read_text()
    assert "<<<<<<< worktree/labtrain/yours\n  width: 24\n" in config
    assert f"  width: 20\n  dropout: 0.25\n>>>>>>> worktree/labtrain/{NEWER}\n" in config
    status = git(old, "status", "--porcelain").splitlines()
    assert {line for line in status if line[:2] in ("UU", "DU", "UD", "AA")} == {
        "UU conf/config.yaml",
        "DU notebooks/start.ipynb",
    }
    assert "CONFLICT (content): Merge conflict in conf/config.yaml" in done.stdout
    assert "CONFLICT (modify/delete): notebooks/start.ipynb" in done.stdout
    assert "then: git add conf/config.yaml\n" in done.stdout
    assert (
        "git rm notebooks/start.ipynb    # keeps it deleted; or keep it: git add notebooks/start.ipynb" in done.stdout
    )
    again = labtrain(clashing, "update", cwd=old)
    assert again.returncode == 2
    assert (
        "an earlier update is not committed and has conflicts: conf/config.yaml; notebooks/start.ipynb" in again.stderr
    )
    assert "git reset --hard" in again.stderr
    git(old, "reset", "-q", "--hard")
    assert content(old) == before
    assert git(old, "status", "--porcelain") == ""


@pytest.mark.release
def test_packages_of_ones_own_are_locked_again(old: Path, newer: Path) -> None:
    """A lock is replaced, not merged; the command that update names puts the packages in. Asks the registry."""
    project = old / "pyproject.toml"
    project.write_text(project.read_text().replace("dependencies = []", 'dependencies = ["einops>=0.8"]'))
    assert run(LABTRAIN, "lock", "write", cwd=old, env=IDENTITY).returncode == 0
    git(old, "commit", "-qam", "einops")
    done = labtrain(newer, "update", cwd=old)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^  replaced .* requirements.lock.* these are generated, yours were not", done.stdout, re.MULTILINE
    )
    assert ".venv/bin/labtrain lock write && make setup && git add -u  # your own packages: einops>=0.8" in done.stdout
    assert "einops" not in {pin.name for pin in read_pins(old / "requirements.lock")}
    written = labtrain(newer, "lock", "write", cwd=old)
    assert written.returncode == 0, written.stderr
    found = {pin.name: pin.version for pin in read_pins(old / "requirements.lock")}
    assert (found["zipp"], "einops" in found) == ("4.1.1", True)
    assert check_locks(old) == []


def test_in_a_folder_of_a_larger_repository_with_another_name_and_author(
    old: Path, newer: Path, tmp_path: Path
) -> None:
    """The rest of the repository is not touched; a moved experiment keeps its name; hooks of its template do not run."""
    top = tmp_path / "lab"
    (top / "studies").mkdir(parents=True)
    shutil.copytree(old, top / "studies" / "moved", ignore=shutil.ignore_patterns(".git", "runs"))
    readme = top / "studies" / "moved" / "README.md"
    readme.write_text(readme.read_text().replace("Ada Lovelace", "Ada King"))
    git(top, "init", "-q")
    (top / "paper.tex").write_text("a paper\n")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "all")
    done = labtrain(newer, "update", cwd=top / "studies" / "moved" / "conf")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "digits" in (top / "studies" / "moved" / "pyproject.toml").read_text()
    assert "Ada King" in readme.read_text()
    assert "(at least)" in readme.read_text()
    changed = git(top, "diff", "--cached", "--name-only").splitlines()
    assert {name.rpartition("moved/")[0] for name in changed} == {"studies/"}
    git(top, "reset", "-q", "--hard")
    assert git(top, "status", "--porcelain") == ""


FULL = """
import os, sys
from pathlib import Path
from tests.quick.project import test_merge as small

root = Path(sys.argv[1])
# Room for git's objects, which are compressed, and not for the file; then for neither.
for room in (1_400_000, 200_000):
    free = os.statvfs(root).f_bavail * os.statvfs(root).f_bsize
    filler = root.parent / "filler"
    filler.write_bytes(bytes(free - room))
    try:
        small.merged(root, small.THEIRS | {"new/big.txt": os.urandom(600_000).hex()})
    except small.LabtrainError as error:
        print(error.args[0].replace(chr(10), " "))
    filler.unlink()
    small.git(root, "gc", "-q", "--prune=now")
    assert small.texts(root) == small.YOURS
    assert small.git(root, "status", "--porcelain") == ""
small.merged(root)
assert small.texts(root) == small.MERGED
"""


def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """On a real small disk; with room again, the same update works."""
    settings = " ".join(f"{name}={value!r}" for name, value in IDENTITY.items())
    (tmp_path / "full.py").write_text(FULL)
    (tmp_path / "yours.py").write_text(
        "import sys; from pathlib import Path; from tests.quick.project.test_merge import *; write(Path(sys.argv[1]), YOURS)"
    )
    python = Path(LABTRAIN).with_name("python")
    done = in_namespace(f"""
        mkdir {tmp_path}/disk
        mount -t tmpfs -o size=8m none {tmp_path}/disk
        export {settings} PYTHONPATH={ROOT} TMPDIR={tmp_path} PYTHONDONTWRITEBYTECODE=1
        {python} {tmp_path}/yours.py {tmp_path}/disk/digits
        cd {tmp_path}/disk/digits
        git init -q && git add -A && git commit -qm yours
        {python} {tmp_path}/full.py {tmp_path}/disk/digits
    """)
    assert done.returncode == 0, done.stderr
    late, early = done.stdout.splitlines()
    assert late.startswith("cannot write the update: git checkout-index -f -u -z: ")
    assert late.endswith("No file has changed")
    assert early.startswith("cannot write the update: git hash-object ")
    assert early.endswith("No space left on device. No file has changed")


BUSY = """
import sys
from pathlib import Path
from tests.quick.project import test_merge as small

root = Path(sys.argv[1])
try:
    small.merged(root)
except small.LabtrainError as error:
    print(str(error))
assert small.texts(root) == small.YOURS
assert small.git(root, "status", "--porcelain") == ""
"""


def test_a_file_that_cannot_be_replaced_is_named_and_the_rest_is_brought_back(tmp_path: Path) -> None:
    """Immutable files need a capability. A file that is mounted cannot be replaced by anybody, and can be read alike."""
    root = small.write(tmp_path / "digits", small.YOURS)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "yours")
    settings = " ".join(f"{name}={value!r}" for name, value in IDENTITY.items())
    (tmp_path / "busy.py").write_text(BUSY)
    done = in_namespace(f"""
        mount --bind {root}/model.py {root}/model.py
        export {settings} PYTHONPATH={ROOT} TMPDIR={tmp_path} PYTHONDONTWRITEBYTECODE=1
        {Path(LABTRAIN).with_name("python")} {tmp_path}/busy.py {root}
    """)
    assert done.returncode == 0, done.stderr
    assert "'model.py': Device or resource busy. No file has changed" in done.stdout
    assert (
        f"hint: make it writable (ls -ld {root}/model.py; lsattr -d {root}/model.py), then labtrain upd" in done.stdout
    )
    small.merged(root)
    assert small.texts(root) == small.MERGED
