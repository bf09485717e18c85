"""Merge two folders' difference into a git repository, by git: a three-way merge that nothing can leave half done.

git computes the merge as a tree (git-merge-tree(1)) before a file of the person's is touched. Then the index is
replaced in one step, and the files after it. So from the first changed byte on, `git reset --hard` goes back, whatever
interrupted the rest: the index knows every file that may have been written, and HEAD has every file of before.

Everything temporary belongs to one worktree (git-worktree(1)): a lock, the refs, and the record of an update. So
updates in two worktrees of a repository do not meet, and of two in the same worktree the second is refused.
"""

import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from labtrain.base.console import few, quoted
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.git import GitError, ask_git, git_variables, run_git
from labtrain.base.permissions import open_lock
from labtrain.base.signals import postponed

NEEDS = (2, 38)  # of git: merge-tree --write-tree
LOCK = "labtrain-update.lock"  # in .git, as these: it has MARK while files are written, then WRITTEN
MARK, WRITTEN = "labtrain-update", "labtrain-update.written"
REFS = "worktree/labtrain"  # below refs/ while git merges: names in conflict markers. git keeps them per worktree
YOURS = f"{REFS}/yours"
BLOCKED = (errno.EPERM, errno.EACCES, errno.EROFS, errno.EBUSY)  # a file cannot be written, and room would not help
FLAGS = (
    "hsmS"  # git-ls-files(1): lower case: assume-unchanged; S: skip-worktree, as all that a sparse checkout leaves out
)
UNFINISHED = {
    "MERGE_HEAD": "git merge --abort",
    "CHERRY_PICK_HEAD": "git cherry-pick --abort",
    "REVERT_HEAD": "git revert --abort",
    "rebase-merge": "git rebase --abort",
    "rebase-apply": "git rebase --abort",
}
WHO = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER")
       for what, value in (("NAME", "labtrain"), ("EMAIL", "labtrain"), ("DATE", "@0 +0000"))}  # fmt: skip
Entries = Mapping[str, str | None]  # "MODE OBJECT" by path in the experiment; None: not there


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A clean git repository with an experiment in it.

    Attributes:
        top: its folder.
        prefix: of the experiment's paths: "" or "sub/folder/".
        head: the commit.
        entries: the experiment's files in the commit.
    """

    top: Path
    prefix: str
    head: str
    entries: Entries

    def git(
        self,
        *arguments: str,
        text: str = "",
        codes: Sequence[int] = (0,),
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run git with the user's own configuration; `variables` are added to the environment."""
        environment = git_variables(filters=True) | {"GIT_LITERAL_PATHSPECS": "1", **variables}
        return run_git(self.top, *arguments, text=text, variables=environment, codes=codes)

    def inside(self, paths: Iterable[str]) -> list[str]:
        """Return paths relative to the experiment, sorted."""
        return sorted(path.removeprefix(self.prefix) for path in paths)

    def path(self, name: str) -> Path:
        """Return the path of one of git's own files."""
        return self.top / self.git("rev-parse", "--git-path", name).removesuffix("\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    r"""The result of a merge.

    Attributes:
        tree: of the whole repository; files with conflicts contain git's markers.
        stages: git's lines of each file with a conflict, "MODE OBJECT STAGE\tPATH".
        said: git's message about each conflict.
        changed: status (A, M, D, T) of each file that differs from HEAD, by path in the repository.
        edited: files that the experiment began with and that have other contents in HEAD, as git stores them.
    """

    tree: str
    stages: list[str]
    said: list[str]
    changed: dict[str, str]
    edited: set[str]

    @property
    def conflicts(self) -> list[str]:
        """Return the paths with conflicts."""
        return sorted({line.partition("\t")[2] for line in self.stages})

    def lacking(self, stage: int) -> list[str]:
        """Return the paths with conflicts that one side does not have: 2: yours, 3: the new labtrain's."""
        has = {line.partition("\t")[2] for line in self.stages if line.partition("\t")[0].endswith(f" {stage}")}
        return [path for path in self.conflicts if path not in has]


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keep other updates out of the worktree that a folder is in; a killed one lets the next one in.

    Raises:
        LabtrainError: another update is running there, or git's folder cannot be written.
    """
    private = ask_git(root, "rev-parse", "--absolute-git-dir", variables=git_variables(filters=True))
    if not private:  # open_repository says why
        yield
        return
    path = Path(private.removesuffix("\n")) / LOCK
    try:
        descriptor = open_lock(path)
    except OSError as error:
        raise LabtrainError(f"cannot lock {path}: {error.strerror}", hint=f"ls -ld {quoted(path.parent)}") from error
    try:
        _lock(descriptor, root)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise LabtrainError(f"another update of {root} is running", hint="wait for it, then labtrain update") from error


def open_repository(root: Path) -> Repository:
    """Return the repository of an experiment.

    Raises:
        ConfigError: the experiment is not committed, something is not committed, or git is busy or too old.
    """
    commit = f"cd {quoted(root)} && git add -A . && git commit -m before"
    try:
        top, prefix = run_git(root, "rev-parse", "--show-toplevel", "--show-prefix",
                              variables=git_variables(filters=True)).split("\n")[:2]  # fmt: skip
        head = run_git(root, "rev-parse", "--verify", "HEAD^{commit}", variables=git_variables(filters=True)).strip()
    except GitError as error:
        if "dubious ownership" in str(error) or "not installed" in str(error):
            raise
        raise ConfigError(
            f"{root} is not committed in a git repository: nothing could bring your files back",
            hint=f"cd {quoted(root)} && git init && git add -A && git commit -m before",
        ) from error
    version = run_git(root, "version")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < NEEDS:
        raise ConfigError(f"found {version.strip()}, need git 2.38 or later", hint="apt-get install git")
    repository = Repository(top=Path(top), prefix=prefix, head=head, entries={})
    repository = replace(repository, entries=_committed(repository))
    if not repository.entries:
        raise ConfigError(f"{root} is not committed in the git repository {top}", hint=commit)
    _refuse_unfinished(repository)
    _refuse_sparse(repository)
    return repository


def _refuse_sparse(repository: Repository) -> None:
    if repository.git("config", "--type=bool", "--default=false", "core.sparseCheckout").strip() != "true":
        return
    left_out = [path for path in _flagged(repository, "Ss") if path.startswith(repository.prefix)]
    if left_out:
        raise ConfigError(
            f"a sparse checkout leaves files of the experiment out: {few(left_out)}", hint="git sparse-checkout disable"
        )


def _committed(repository: Repository) -> Entries:
    listed = repository.git(
        "ls-tree", "-r", "-z", "--full-tree", repository.head, *([repository.prefix] if repository.prefix else [])
    )
    found: dict[str, str | None] = {}
    for line in filter(None, listed.split("\0")):
        facts, _, path = line.partition("\t")
        mode, _, name = facts.split()
        found[path.removeprefix(repository.prefix)] = f"{mode} {name}"
    return found


def _refuse_unfinished(repository: Repository) -> None:
    for name, command in UNFINISHED.items():
        if repository.path(name).exists():
            raise ConfigError(
                f"{repository.top}: git has not finished: there is a {name}", hint=f"finish it, or: {command}"
            )
    if repository.path("index.lock").exists():
        raise ConfigError(f"{repository.top}: another git is working here", hint=f"{_unlock(repository)}")
    lines = repository.git("status", "--porcelain", "-z", "--untracked-files=no", "--ignore-submodules=dirty")
    unmerged = {line.partition("\t")[2] for line in repository.git("ls-files", "-u", "-z").split("\0")} - {""}
    conflicts = f" and has conflicts: {few(sorted(unmerged))}" if unmerged else ""
    finish = "git status, edit the files with conflicts, git add them, git commit" if unmerged else "git commit"
    if _is_at(repository, MARK):
        raise ConfigError(
            "an earlier update was interrupted while it wrote files", hint="git reset --hard, then labtrain update"
        )
    if _is_at(repository, WRITTEN):
        raise ConfigError(
            f"{repository.top}: an earlier update is not committed{conflicts}",
            hint=f"finish it: {finish} -m update; or go back to before it: git reset --hard",
        )
    if conflicts:
        raise ConfigError(f"{repository.top} is not committed{conflicts}", hint=f"{finish} -m resolved")
    if not lines:
        return
    listed = few([line[3:] for line in lines.split("\0") if len(line) > 3])
    raise ConfigError(
        f"{repository.top} has changes that are not committed: {listed}",
        hint="git stash, or git commit -am before; then labtrain update",
    )


def _is_at(repository: Repository, name: str) -> bool:
    """Return whether an update that got this far is still in the index; forget one that was undone or committed."""
    record = repository.path(name)
    if not record.exists():
        return False
    staged = set(repository.git("diff", "--cached", "--name-only", "--no-renames", "-z").split("\0")) - {""}
    changed, *rest = (set(part.split("\0")) for part in os.fsdecode(record.read_bytes()).split("\0\0"))
    if staged and changed.difference(*rest) <= staged:  # the person may have resolved a conflict to what HEAD has
        return True
    record.unlink()
    return False


def _unlock(repository: Repository) -> str:
    return f"wait for it; if no git is running: rm {quoted(repository.path('index.lock'))}"


def merge(repository: Repository, base: Path, theirs: Path, *, name: str, generated: Collection[str]) -> Merged:
    """Merge what differs between two folders into the experiment. No file or index is changed.

    Args:
        repository: of the experiment.
        base: the folder that the experiment began as.
        theirs: the folder that it would be today.
        name: of `theirs`, for conflict markers.
        generated: files that are not merged: `theirs` replaces them.

    Raises:
        LabtrainError: git failed, for example on a full disk.
    """
    try:
        return _merge(repository, base, theirs, name=name, generated=generated)
    except (GitError, OSError) as error:
        raise _not_written(repository, error) from error


def _merge(repository: Repository, base: Path, theirs: Path, *, name: str, generated: Collection[str]) -> Merged:
    before, now = store(repository, base), store(repository, theirs)
    yours = {path: before.get(path) for path in generated if path in repository.entries and path in {*before, *now}}
    gone: dict[str, str | None] = dict.fromkeys(repository.entries)
    first, new = _commit(repository, {**gone, **before}), f"{REFS}/{name}"
    commits = {YOURS: _commit(repository, yours, parent=first), new: _commit(repository, {**gone, **now}, parent=first)}
    with _refs(repository, commits):
        said = repository.git("merge-tree", "--write-tree", "-z", YOURS, new, codes=(0, 1))
    tree, _, rest = said.partition("\0")
    stages, messages = _parse(rest)
    differ = repository.git("diff-tree", "-r", "-z", "--no-renames", "--name-status", repository.head, tree).split("\0")
    return Merged(
        tree=tree,
        stages=stages,
        said=messages,
        changed=dict(zip(differ[1::2], differ[::2], strict=False)),
        edited={f"{repository.prefix}{path}" for path, entry in repository.entries.items()
                if path in before and _object(entry) != _object(before[path])},
    )  # fmt: skip


def _object(entry: str | None) -> str:
    return (entry or "").partition(" ")[2]


def store(repository: Repository, folder: Path) -> dict[str, str | None]:
    """Write a folder's files to the repository's objects, as git would at their paths in the experiment."""
    found: dict[str, str | None] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        mode = "100755" if os.access(path, os.X_OK) else "100644"
        found[name] = (
            f"{mode} {repository.git('hash-object', '-w', f'--path={repository.prefix}{name}', str(path)).strip()}"
        )
    return found


def _commit(repository: Repository, entries: Entries, *, parent: str = "") -> str:
    """Make a commit of HEAD's tree with other entries in the experiment; return its name."""
    nothing = "0" * len(repository.head)
    lines = (f"{entry or f'0 {nothing}'}\t{repository.prefix}{path}\0" for path, entry in entries.items())
    with tempfile.TemporaryDirectory() as folder:
        own = {"GIT_INDEX_FILE": f"{folder}/index"}
        repository.git("read-tree", repository.head, variables=own)
        repository.git("update-index", "-z", "--index-info", text="".join(lines), variables=own)
        tree = repository.git("write-tree", variables=own).strip()
    return repository.git(
        "commit-tree", tree, *(["-p", parent] if parent else []), "-m", "labtrain update", variables=WHO
    ).strip()


@contextmanager
def _refs(repository: Repository, commits: Mapping[str, str]) -> Iterator[None]:
    _remove_refs(repository)  # of a killed update
    try:
        for name, commit in commits.items():
            repository.git("update-ref", f"refs/{name}", commit)
        yield
    finally:
        with suppress(GitError):
            _remove_refs(repository)


def _remove_refs(repository: Repository) -> None:
    for name in repository.git("for-each-ref", "--format=%(refname)", f"refs/{REFS}/").split():
        repository.git("update-ref", "-d", name)


def _parse(text: str) -> tuple[list[str], list[str]]:
    """Return the stages and the messages about conflicts in the output of `git merge-tree -z` after the tree."""
    listed, _, rest = text.partition("\0\0") if not text.startswith("\0") else ("", "", text[1:])
    fields, messages = rest.split("\0"), []
    while len(fields) > 1:
        count = int(fields[0])
        kind, said = fields[count + 1 : count + 3]
        messages += [said.strip()] if kind.startswith("CONFLICT") else []
        fields = fields[count + 3 :]
    return list(filter(None, listed.split("\0"))), messages


def apply(repository: Repository, merged: Merged) -> None:
    """Write a merge to the index and to the files.

    Raises:
        ConfigError: it would overwrite a file that git does not have. Nothing was changed.
        LabtrainError: it could not be written. git reset --hard was done, or is in the hint.
    """
    _refuse_unfinished(repository)  # again: the merge took seconds
    if repository.git("rev-parse", "HEAD").strip() != repository.head:
        raise ConfigError(f"{repository.top}: a commit was made during the update", hint="labtrain update")
    _refuse_overwriting(repository, merged)
    with postponed():
        mark, record = repository.path(MARK), repository.path(WRITTEN)
        try:
            mark.write_bytes(os.fsencode("\0\0".join("\0".join(names) for names in (merged.changed, merged.conflicts))))
            _write(repository, merged)
        except (LabtrainError, OSError) as error:
            _undo(repository, merged, mark, error)
        mark.replace(record)


def _write(repository: Repository, merged: Merged) -> None:
    """Write the index, then the files. Conflicts come first, so that the index tells them from then on."""
    repository.git("read-tree", "-m", repository.head, merged.tree)
    conflicts = set(merged.conflicts)
    written = [path for path, status in merged.changed.items() if status != "D"]
    for path in (path for path, status in merged.changed.items() if status == "D"):
        _remove(repository.top, path)
    _check_out(repository, [path for path in written if path in conflicts])
    _mark_conflicts(repository, merged)
    _check_out(repository, [path for path in written if path not in conflicts])


def _undo(repository: Repository, merged: Merged, mark: Path, error: LabtrainError | OSError) -> NoReturn:
    """Go back after an error, and raise it in words."""
    try:
        _go_back(repository, merged)
        mark.unlink(missing_ok=True)
    except (LabtrainError, OSError):
        raise LabtrainError(
            f"cannot write the update: {_reason(error)}. Your files are in git, but not all of them in the folder",
            hint=f"{_remedy(repository, error, merged.changed)}, then: git reset --hard",
        ) from error
    raise _not_written(repository, error, merged.changed) from error


def _go_back(repository: Repository, merged: Merged) -> None:
    """Bring back HEAD's files and index. Files with the right contents are not touched, so one may be immutable."""
    if not repository.git("diff", "--cached", "--name-only"):  # the index comes first: nothing was written
        return
    for path, status in merged.changed.items():
        if status == "A":
            _remove(repository.top, path)
    repository.git("reset", "--quiet")
    _check_out(repository, [path for path, status in merged.changed.items() if status != "A"])
    if left := repository.git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty"):
        raise GitError(left)


def _not_written(repository: Repository, error: Exception, changed: Iterable[str] = ()) -> LabtrainError:
    hint = f"{_remedy(repository, error, changed)}, then labtrain update"
    return LabtrainError(f"cannot write the update: {_reason(error)}. No file has changed", hint=hint)


def _remedy(repository: Repository, error: Exception, changed: Iterable[str]) -> str:
    """Return what to do about an error: about git's lock, a file that cannot be written, or else a full disk."""
    reason = _reason(error)
    if "index.lock" in reason:
        return _unlock(repository)
    blocked = sorted((path for path in changed if path in reason), key=len)
    if blocked and any(os.strerror(number) in reason for number in BLOCKED):
        path = quoted(repository.top / blocked[-1])
        return f"make it writable (ls -ld {path}; lsattr -d {path})"
    return f"make room (df -h {quoted(repository.top)} {quoted(tempfile.gettempdir())})"


def _reason(error: Exception) -> str:
    return " ".join(str(error.args[0] if isinstance(error, LabtrainError) else error).split())


def _refuse_overwriting(repository: Repository, merged: Merged) -> None:
    """Refuse to overwrite what git does not have: untracked and ignored files, and edits that it was told to ignore."""
    found = [_in_the_way(repository.top, path, merged.changed) for path, status in merged.changed.items()
             if status == "A"]  # fmt: skip
    if lost := sorted(set(filter(None, found))):
        raise ConfigError(
            f"the update brings files that are already here, but not in git: {few(lost)}",
            hint=f"mv {quoted(repository.top / lost[0])} {quoted(repository.top / (lost[0] + '.mine'))}",
        )
    if hidden := [path for path in _flagged(repository, FLAGS) if path in merged.changed]:
        file = quoted(repository.top / hidden[0])
        # Two commands: of both options together, git obeys one.
        hint = " && ".join(f"git update-index --no-{flag} {file}" for flag in ("assume-unchanged", "skip-worktree"))
        raise ConfigError(f"git was told not to look at files that the update changes: {few(hidden)}", hint=hint)


def _flagged(repository: Repository, flags: str) -> list[str]:
    """Return the paths with a flag by which git does not look at a file (FLAGS)."""
    lines = repository.git("ls-files", "-v", "-z").split("\0")
    return [line[2:] for line in lines if line and line[0] in flags]


def _in_the_way(top: Path, path: str, changed: Mapping[str, str]) -> str:
    """Return what git does not have at a path, or where one of its folders must be; empty if nothing is in the way."""
    parts = path.split("/")
    for number in range(1, len(parts)):
        above = "/".join(parts[:number])
        is_folder = (top / above).is_dir() and not (top / above).is_symlink()
        if os.path.lexists(top / above) and not is_folder:
            return "" if changed.get(above) == "D" else above
    return path if os.path.lexists(top / path) else ""


def _remove(top: Path, path: str) -> None:
    """Remove a file, and folders that become empty."""
    (top / path).unlink(missing_ok=True)
    with suppress(OSError):
        for folder in (top / path).parents:
            if folder == top:
                return
            folder.rmdir()


def _check_out(repository: Repository, paths: list[str]) -> None:
    repository.git("checkout-index", "-f", "-u", "-z", "--stdin", text="".join(f"{path}\0" for path in paths))


def _mark_conflicts(repository: Repository, merged: Merged) -> None:
    nothing = "0" * len(repository.head)
    lines = [*(f"0 {nothing}\t{path}" for path in merged.conflicts), *merged.stages]
    repository.git("update-index", "-z", "--index-info", text="".join(f"{line}\0" for line in lines))
