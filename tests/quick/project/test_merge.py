"""The merge of an update, by real git, in small repositories: what it refuses, and that git goes back from any moment."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.project import merge
from labtrain.project.update import _next
from tests.support.template import files
from tests.support.update import git

BASE = {
    "model.py": "a\nb\nc\nd\ne\n",
    "conf/one.yaml": "x: 1\n",
    "old/gone.txt": "gone\n",
    "lock": "1\n",
    "setup.sh": "s\n",
}
YOURS = BASE | {"model.py": "A\nb\nc\nd\ne\n", "own.py": "mine\n", "lock": "1\nmine\n"}
THEIRS = {
    "model.py": "a\nb\nc\nd\nE\n",
    "conf/one.yaml": "x: 2\n",
    "new/file.txt": "new\n",
    "lock": "2\n",
    "setup.sh": "s\n",
}
MERGED = {"model.py": "A\nb\nc\nd\nE\n", "conf/one.yaml": "x: 2\n", "new/file.txt": "new\n", "lock": "2\n", "setup.sh": "s\n",
          "own.py": "mine\n"}  # fmt: skip


def write(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def texts(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*")
            if path.is_file() and ".git" not in path.relative_to(root).parts}  # fmt: skip


@pytest.fixture(params=["", "deep/er/"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An experiment, alone in its repository or in a folder of a larger one."""
    top = tmp_path / "repository"
    top.mkdir()
    git(top, "init", "-q")
    (top / "outside.txt").write_text("not of the experiment\n")
    root = write(top / request.param, YOURS)
    (root / "setup.sh").chmod(0o755)
    git(top, "add", "-A")
    git(top, "commit", "-qm", "yours")
    return root


def merged(root: Path, theirs: dict[str, str] = THEIRS, base: dict[str, str] = BASE) -> merge.Merged:
    """Merge into an experiment, with `lock` as a generated file, and write it."""
    repository = merge.open_repository(root)
    with tempfile.TemporaryDirectory() as scratch:
        folders = write(Path(scratch, "base"), base), write(Path(scratch, "theirs"), theirs)
        found = merge.merge(repository, *folders, name="2", generated=["lock"])
    merge.apply(repository, found)
    return found


def test_both_sides_are_merged_and_what_is_generated_is_replaced(root: Path) -> None:
    """The person's mode of a file and everything outside the experiment stay."""
    found = merged(root)
    assert found.conflicts == found.said == []
    expected = MERGED | ({} if (root / "outside.txt").exists() is False else {"outside.txt": "not of the experiment\n"})
    assert texts(root) == expected
    assert not (root / "old").exists()
    assert os.access(root / "setup.sh", os.X_OK)
    assert git(root, "diff", "--name-only") == ""
    assert git(root, "ls-files", "--others") == ""
    assert len(git(root, "diff", "--cached", "--name-only").splitlines()) == 5


def test_the_work_tree_of_a_second_checkout_is_merged_alike(root: Path, tmp_path: Path) -> None:
    """git worktree: its index and its unfinished merges are elsewhere than in .git."""
    prefix = git(root, "rev-parse", "--show-prefix").strip()
    git(root, "worktree", "add", "-q", str(tmp_path / "second"))
    merged(tmp_path / "second" / prefix)
    assert (tmp_path / "second" / prefix / "model.py").read_text() == MERGED["model.py"]
    assert (root / "model.py").read_text() == YOURS["model.py"]


def test_filters_and_the_style_of_conflicts_are_those_of_the_person(root: Path) -> None:
    """As Git LFS has them: git stores other bytes than the files have. Both sides are stored so before they are merged."""
    top = Path(git(root, "rev-parse", "--show-toplevel").strip())
    git(top, "config", "filter.other.clean", "tr a-z A-Z")
    git(top, "config", "filter.other.smudge", "tr A-Z a-z")
    git(top, "config", "merge.conflictStyle", "diff3")
    (top / ".gitattributes").write_text("one.yaml filter=other\nlock filter=other\n")
    git(top, "add", "-A")
    git(top, "add", "--renormalize", ".")
    git(top, "commit", "-qm", "filters")
    prefix = git(root, "rev-parse", "--show-prefix").strip()
    assert git(top, "show", f"HEAD:{prefix}lock") == "1\nMINE\n"
    found = merged(root, THEIRS | {"lock": "two\n", "own.py": "theirs\n"})
    assert [path.removeprefix(prefix) for path in found.conflicts] == ["own.py"]
    assert (root / "conf" / "one.yaml").read_text() == "x: 2\n"
    assert git(top, "show", f":{prefix}conf/one.yaml") == "X: 2\n"
    assert (git(top, "show", f":{prefix}lock"), (root / "lock").read_text()) == ("TWO\n", "two\n")
    assert "||||||| " in (root / "own.py").read_text()


@pytest.mark.parametrize(
    ("base", "theirs", "status"),
    [
        ({}, {"model.py": "0\nb\n"}, "UU model.py"),
        ({}, {"own.py": "theirs\n"}, "AA own.py"),
        ({"away.py": "1\n2\n3\n"}, {"away.py": "1\n2\n4\n"}, "DU away.py"),
        ({}, {"model.py": None}, "UD model.py"),
    ],
)
def test_conflicts_are_marked_and_git_goes_back(
    root: Path, base: dict[str, str], theirs: dict[str, str | None], status: str
) -> None:
    before = files(root)
    now = {name: text for name, text in (THEIRS | theirs).items() if text is not None}
    found = merged(root, now, BASE | base)
    name = status.split()[1]
    assert [path.rpartition("/")[2] for path in found.conflicts] == [name]
    assert [said.startswith("CONFLICT (") for said in found.said] == [True]
    lines = [line for line in git(root, "status", "--porcelain").splitlines() if line[0] in "UDA" and line[1] != " "]
    assert [line[:3] + line.rpartition("/")[2].split()[-1] for line in lines] == [status]
    git(root, "reset", "-q", "--hard")
    assert {name: digest for name, digest in files(root).items() if not name.startswith(".git/")} == {
        name: digest for name, digest in before.items() if not name.startswith(".git/")
    }
    assert git(root, "status", "--porcelain") == ""


def _ignored(root: Path) -> None:
    (root / ".git" / "info").mkdir(exist_ok=True, parents=True)
    (root / ".git" / "info" / "exclude").write_text("new/\n")
    write(root, {"new/file.txt": "mine, and ignored\n"})


def _hidden(root: Path) -> None:
    git(root, "update-index", "--assume-unchanged", "model.py")
    (root / "model.py").write_text("hidden edit\n")


def _skipped(root: Path) -> None:
    git(root, "update-index", "--skip-worktree", "--assume-unchanged", "model.py")
    (root / "model.py").write_text("hidden edit\n")


def _sparse(root: Path) -> None:
    git(root, "sparse-checkout", "set", "old")


def _unmerged(root: Path) -> None:
    (root / "model.py").write_text("stashed\n")
    git(root, "stash", "-q")
    (root / "model.py").write_text("committed\n")
    git(root, "commit", "-qam", "another")
    subprocess.run(["git", "stash", "pop", "-q"], cwd=root, capture_output=True, check=False)


def _merging(root: Path) -> None:
    (root / ".git" / "MERGE_HEAD").write_text(git(root, "rev-parse", "HEAD"))


def _rebasing(root: Path) -> None:
    (root / ".git" / "rebase-merge").mkdir()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "edited": (lambda root: (root / "own.py").write_text("edited\n"), "has changes that are not committed: own.py"),
    "outside": (lambda root: (root / "outside.txt").write_text("edited\n"), "not committed: outside.txt"),
    "staged": (lambda root: [write(root, {"x": "x"}), git(root, "add", "x")], "has changes that are not committed: x"),
    "deleted": (lambda root: (root / "own.py").unlink(), "has changes that are not committed: own.py"),
    "untracked": (lambda root: write(root, {"new/file.txt": "mine\n"}), "already here, but not in git: new/file.txt"),
    "a file for a folder": (lambda root: write(root, {"new": "mine\n"}), "already here, but not in git: new\n"),
    "a link for a folder": (lambda root: (root / "new").symlink_to("/nowhere"), "not in git: new\n"),
    "a link to a folder": (lambda root: (root / "new").symlink_to("conf"), "not in git: new\n"),
    "ignored": (_ignored, "already here, but not in git: new/file.txt"),
    "hidden": (_hidden, "git was told not to look at files that the update changes: model.py"),
    "skipped": (_skipped, "git was told not to look at files that the update changes: model.py"),
    "sparse": (_sparse, "a sparse checkout leaves files of the experiment out: conf/one.yaml"),
    "unmerged": (_unmerged, "is not committed and has conflicts: model.py"),
    "another git": (lambda root: write(root, {".git/index.lock": ""}), "another git is working here"),
    "a merge": (_merging, "there is a MERGE_HEAD"),
    "a rebase": (_rebasing, "there is a rebase-merge"),
}


@pytest.mark.parametrize("root", [""], indirect=True)
@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_lost_is_refused_and_nothing_changes(root: Path, case: str) -> None:
    prepare, says = REFUSED[case]
    prepare(root)
    before, status = texts(root), git(root, "status", "--porcelain", "--ignored")
    with pytest.raises(ConfigError, match="hint: ") as caught:
        merged(root)
    assert says in str(caught.value)
    assert texts(root) == before
    assert git(root, "status", "--porcelain", "--ignored") == status


# What a hint says, typed after it; and the files that are then as they were.
TYPED = {
    "hidden": "not committed: model.py",
    "skipped": "not committed: model.py",
    "a file for a folder": "",
    "a link to a folder": "",
    "untracked": "",
    "sparse": "",
}


@pytest.mark.parametrize("root", [""], indirect=True)
@pytest.mark.parametrize("case", TYPED)
def test_the_hint_works_when_typed(root: Path, case: str) -> None:
    REFUSED[case][0](root)
    with pytest.raises(ConfigError) as caught:
        merged(root)
    subprocess.run(caught.value.hint, shell=True, cwd=root, check=True, capture_output=True)
    if TYPED[case]:
        with pytest.raises(ConfigError, match=TYPED[case]):
            merged(root)
    else:
        merged(root)
        assert (root / "new" / "file.txt").read_text() == "new\n"


@pytest.mark.parametrize("root", [""], indirect=True)
def test_updates_in_two_worktrees_at_the_same_time_do_not_meet(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One runs from begin to end while the other is about to merge. Its branch has other edits."""
    second, real, begun = tmp_path / "second", merge.run_git, []
    git(root, "worktree", "add", "-q", "-b", "second", str(second))
    (second / "second.py").write_text("second\n")
    git(second, "add", "-A")
    git(second, "commit", "-qm", "second")

    def meeting(folder: Path, *words: str, **options: object) -> str:
        if words[0] == "merge-tree" and not begun:
            begun.append(folder)
            merged(second)
        return real(folder, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "run_git", meeting)
    git(root, "update-ref", "refs/worktree/labtrain/0.0.9", "HEAD")  # of an update that was killed
    merged(root)
    assert begun == [root]
    outside = {"outside.txt": "not of the experiment\n"}
    assert texts(root) == MERGED | outside
    assert {name: text for name, text in texts(second).items() if name != ".git"} == (
        MERGED | outside | {"second.py": "second\n"}
    )
    for each in (root, second):
        assert git(each, "for-each-ref", "refs/worktree", "refs/labtrain") == ""


TAKE = "import sys; from pathlib import Path; from labtrain.project.merge import alone\nwith alone(Path(sys.argv[1])): pass"


@pytest.mark.parametrize("root", ["deep/er/"], indirect=True)
def test_two_updates_in_one_worktree_exclude_each_other(root: Path, tmp_path: Path) -> None:
    """From any folder of it; another worktree is free, and so is this one afterwards."""
    git(root, "worktree", "add", "-q", str(tmp_path / "second"))

    def takes(folder: Path) -> str:
        return subprocess.run(
            [sys.executable, "-c", TAKE, str(folder)], capture_output=True, text=True, check=False
        ).stderr

    with merge.alone(root):
        assert "another update of " in takes(root.parents[1])
        assert takes(tmp_path / "second") == ""
    assert takes(root) == ""


@pytest.mark.parametrize("root", [""], indirect=True)
def test_a_finished_update_is_committed_or_undone_before_the_next(root: Path) -> None:
    """Its conflict markers are never offered for a commit; once it is committed, it is forgotten."""
    merged(root, THEIRS | {"own.py": "theirs\n"})
    with pytest.raises(
        ConfigError, match=r"not committed and has conflicts: own\.py\n\nhint: finish it: git status"
    ) as caught:
        merge.open_repository(root)
    assert "git reset --hard" in caught.value.hint
    git(root, "checkout", "-q", "--ours", "own.py")  # nothing of it is then staged
    git(root, "add", "own.py")
    with pytest.raises(ConfigError, match=r"an earlier update is not committed\n\nhint: finish it: git commit -m"):
        merge.open_repository(root)
    git(root, "commit", "-qm", "update")
    (root / "own.py").write_text("edit\n")
    with pytest.raises(ConfigError, match="hint: git stash"):
        merge.open_repository(root)


@pytest.mark.parametrize("root", [""], indirect=True)
def test_the_next_step_of_a_deleted_file_is_to_keep_it_deleted(root: Path) -> None:
    repository = merge.open_repository(root)
    base = BASE | {"away.py": "1\n2\n", "own.py": "0\n"}
    found = merged(root, THEIRS | {"away.py": "1\n3\n"}, base)
    said = " ".join("\n".join(_next(repository, found, [])).split())
    assert "git rm away.py # keeps it deleted; or keep it: git add away.py" in said
    assert "git add own.py # keeps it; or delete it: git rm own.py" in said
    assert "edit the files" not in said
    git(root, "rm", "-q", "away.py")
    git(root, "add", "own.py")
    assert git(root, "ls-files", "-u") == ""


@pytest.mark.parametrize("root", [""], indirect=True)
def test_another_git_that_begins_in_the_meantime_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = texts(root), merge.run_git

    def locked(folder: Path, *words: str, **options: object) -> str:
        if words[:2] == ("read-tree", "-m"):
            write(root, {".git/index.lock": ""})
        return real(folder, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "run_git", locked)
    with pytest.raises(
        LabtrainError, match=r"index\.lock.*No file has changed\n\nhint: wait for it; .*: rm .*index\.lock"
    ):
        merged(root)
    (root / ".git" / "index.lock").unlink()
    assert texts(root) == before
    assert git(root, "status", "--porcelain") == ""


@pytest.mark.parametrize("root", [""], indirect=True)
def test_ends_of_lines_that_git_converts_are_not_edits(root: Path) -> None:
    (root / ".gitattributes").write_text("* text=auto eol=crlf\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "ends of lines")
    for name in ("conf/one.yaml", "model.py"):
        (root / name).unlink()
        git(root, "checkout", "-q", name)
    assert b"\r\n" in (root / "conf" / "one.yaml").read_bytes()
    assert merged(root).edited == {"model.py", "lock"}


def test_what_is_not_committed_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "digits", YOURS)
    for _ in ("no repository", "no commit"):
        with pytest.raises(ConfigError, match="is not committed in"):
            merge.open_repository(root)
        git(root, "init", "-q")


KILL = """
import os, signal, sys
from pathlib import Path
from labtrain.project import merge
from tests.quick.project import test_merge

count, real = int(sys.argv[2]), merge.run_git
begun = False

def counting(folder, *words, text="", **options):
    global count, begun
    begun = begun or words[:2] == ("read-tree", "-m")
    count -= begun
    if begun and count < 0:
        if words[0] == "checkout-index" and text:  # half of it: one file, cut short
            name = text.split("\\0")[0]
            real(folder, *words, text=f"{name}\\0", **options)
            os.truncate(Path(folder, name), 1)
        os.kill(os.getpid(), int(sys.argv[3]))
        if sys.argv[3] == "9":
            signal.pause()
    return real(folder, *words, text=text, **options)

merge.run_git = counting
test_merge.merged(Path(sys.argv[1]), test_merge.THEIRS | {"own.py": "theirs\\n"})
"""


def killed(root: Path, step: int, number: int) -> int:
    """Merge in another process, which gets a signal at a step; return its exit code."""
    command = [sys.executable, "-c", KILL, str(root), str(step), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -number), done.stderr
    return done.returncode


def is_whole(root: Path) -> bool:
    return (
        texts(root) == MERGED | {"own.py": (root / "own.py").read_text()}
        and "<<<<<<<" in (root / "own.py").read_text()
        and git(root, "ls-files", "-u") != ""
        and [path.name for path in (root.parents[1] / ".git").glob("labtrain*")] == [merge.WRITTEN]
    )


@pytest.mark.parametrize("root", ["deep/er/"], indirect=True)
def test_killed_at_any_step_git_goes_back_and_the_update_can_be_repeated(root: Path) -> None:
    """SIGKILL before each call of git that writes the index or files, and within one that writes files."""
    before, index = texts(root), git(root, "ls-files", "-s")
    steps = 0
    while killed(root, steps, signal.SIGKILL):
        if git(root, "status", "--porcelain", "--untracked-files=no"):
            with pytest.raises(ConfigError, match="git reset --hard, then labtrain update"):
                merge.open_repository(root)
        git(root, "reset", "-q", "--hard")
        assert (texts(root), git(root, "ls-files", "-s")) == (before, index)
        assert git(root, "status", "--porcelain") == ""
        steps += 1
    assert steps == 4
    assert is_whole(root)


@pytest.mark.parametrize("root", ["deep/er/"], indirect=True)
def test_an_interrupted_update_that_was_undone_is_forgotten(root: Path) -> None:
    """The hint to reset everything is not given to somebody who has new edits."""
    killed(root, 2, signal.SIGKILL)
    git(root, "reset", "-q", "--hard")
    (root / "model.py").write_text("a new edit\n")
    for _ in ("as it is", "staged"):
        with pytest.raises(
            ConfigError, match=r"has changes that are not committed: deep/er/model\.py\n\nhint: git stash"
        ):
            merge.open_repository(root)
        git(root, "add", "-u")


@pytest.mark.parametrize("root", ["deep/er/"], indirect=True)
def test_a_sigterm_ends_it_once_the_files_are_whole(root: Path) -> None:
    assert killed(root, 1, signal.SIGTERM) == -signal.SIGTERM
    assert is_whole(root)


@pytest.mark.parametrize("root", [""], indirect=True)
def test_what_cannot_be_written_is_undone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """git fails in the middle, as on a full disk: the files are those of before."""
    before, real = texts(root), merge.run_git

    def failing(folder: Path, *words: str, **options: object) -> str:
        if words[0] == "update-index" and "GIT_INDEX_FILE" not in options["variables"]:  # type: ignore[operator]
            raise merge.GitError("no space left on device")
        return real(folder, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "run_git", failing)
    with pytest.raises(LabtrainError, match=r"no space left on device\. No file has changed"):
        merged(root)
    assert texts(root) == before
    assert git(root, "status", "--porcelain") == ""
