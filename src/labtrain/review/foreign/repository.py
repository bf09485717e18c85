"""Find a run in a git repository: clone it, find its receipt, and check out the receipt's code. Nothing of it runs.

Targets are URL, PATH, URL@COMMIT and PATH@COMMIT, as in pip. COMMIT may be a tag or a branch, too.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from labtrain.base.console import few, one_line, quoted
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.git import (
    COMMIT,
    TRANSPORTS,
    GitError,
    ask_git,
    borrow_commit,
    clone_bare,
    fetch_commit,
    git_variables,
    run_git,
)
from labtrain.record.differences import open_run
from labtrain.record.identity import enclosing, lock_digest
from labtrain.record.receipt import FILE, Receipt
from labtrain.record.sources import source_digests
from labtrain.review.replay import checked_out
from labtrain.review.verification import alone

GIT_TIMEOUT_S = 3600
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(/.*)", re.DOTALL)
SCP = re.compile(r"((?:[\w.-]+@)?[\w.-]+:)(?!:)(?!//)(.+)", re.DOTALL)  # git-clone(1): user@host:path
REVISION = re.compile(r"[A-Za-z0-9_][\w.+/-]{0,250}", re.ASCII)
BUNDLED = (b"# v2 git bundle\n", b"# v3 git bundle\n")  # gitformat-bundle(5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What the user named.

    Attributes:
        url: of the repository, or its absolute path.
        revision: a commit, tag or branch; empty: HEAD.
    """

    url: str
    revision: str

    def __str__(self) -> str:
        return f"{without_secrets(self.url)}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A run that came from elsewhere.

    Attributes:
        run: its folder, or its receipt.
        home: the experiment's folder with the receipt's code.
        whence: where the code is from, in words.
        facts: what was read, for the answer.
    """

    run: Path
    home: Path
    whence: str
    facts: dict[str, str]


def repository_in(text: str) -> Target | None:
    """Return the repository that a command-line word names; None if it names something else.

    A word is a repository if it has the form of a URL or of user@host:path, or if it is the path of a git repository's
    root, a bare repository or a git bundle. An existing path with a receipt is a run.
    """
    path = Path(text)
    if _is_repository(path):
        return Target(url=str(path.resolve()), revision="")
    if path.exists():
        return None
    before, at, revision = text.rpartition("@")
    if found := URL.fullmatch(text):
        scheme, authority, rest = found.groups()
        rest, revision = _split(rest)
        return Target(url=f"{scheme}://{authority}{rest}", revision=_revision(revision, text))
    if at and _is_repository(Path(before)):
        return Target(url=str(Path(before).resolve()), revision=_revision(revision, text))
    if "::" in text or ((found := SCP.fullmatch(text)) and not text.startswith(("/", "."))):
        host, rest = found.groups() if found else ("", text)
        rest, revision = _split(rest)
        return Target(url=f"{host}{rest}", revision=_revision(revision, text))
    return None


def _split(path: str) -> tuple[str, str]:
    """Split a URL's path from its revision: at the last @ that does not begin a folder's name, as in /@lab/digits."""
    found = re.fullmatch(r"(.*[^/])@(.*)", path, re.DOTALL)
    return (found[1], found[2]) if found else (path, "")


def _is_repository(path: Path) -> bool:
    """Return whether a path is a git repository's root, a bare repository or a git bundle, and not a run."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(BUNDLED[0])) in BUNDLED
        bare = (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()
        return path.is_dir() and not (path / FILE).exists() and (bare or (path / ".git").exists())
    except OSError:
        return False


def _revision(text: str, whole: str) -> str:
    """Return a commit, tag or branch; raise ConfigError if it can be something else in git's grammar."""
    if text and (not REVISION.fullmatch(text) or ".." in text):
        raise ConfigError(
            f"{whole}: {text!r} is not a commit, tag or branch; other forms, such as HEAD~1, are not taken",
            hint=f"git rev-parse {quoted(text)} in a clone shows the commit; then URL@COMMIT",
        )
    return text


def fetch(target: Target, scratch: Path, *, named: str | None) -> Found:
    """Clone a repository and return its run, with the receipt's code checked out.

    Args:
        target: the repository.
        scratch: an empty folder.
        named: the receipt's path in the repository; None: there must be only one.

    Raises:
        ConfigError: the repository, the commit, the receipt or its code cannot be found.
        DamagedError: the receipt is not valid.
    """
    clone, tree = scratch / "repository", scratch / "tree"
    _clone(target, clone)
    commit = _commit(target, clone)
    path = _receipt(target, clone, commit, named)
    tree.mkdir()
    root = _checked_out(clone, commit, tree)
    file = root / path
    try:
        with alone(file if file.name != FILE else file.parent) as (run_dir, _):
            run_dir, receipt = open_run(run_dir)
            home, whence = _code(target, receipt, run_dir, file, root, clone, scratch)
    except DamagedError as error:
        raise DamagedError(str(error.args[0]).replace(f"{root}/", ""), hint="ask its author") from error
    check_lock(receipt, home)
    facts = {"repository": without_secrets(target.url), "commit": commit, "receipt": path}
    return Found(run=file if file.name != FILE else file.parent, home=home, whence=whence, facts=facts)


def _clone(target: Target, folder: Path) -> None:
    found = URL.match(target.url)
    if target.url.startswith("-") or "::" in target.url or (found and found[1] not in TRANSPORTS):
        raise ConfigError(
            f"{target}: labtrain clones only {', '.join(TRANSPORTS)} and paths",
            hint="labtrain verify https://HOST/PATH",
        )
    try:
        clone_bare(target.url, folder, timeout_s=GIT_TIMEOUT_S)
    except GitError as error:
        said = without_secrets(str(error.args[0]).partition(": ")[2])
        if remedy := re.search(r"git config --global --add safe\.directory \S.*", said):
            raise ConfigError(
                f"cannot clone {target}: it belongs to another account, whose folder git does not trust",
                hint=f"{remedy[0].strip()}   # then start it again",
            ) from error
        raise ConfigError(
            f"cannot clone {target}: {said}", hint=f"git clone {quoted(target.url)}; then labtrain verify that folder"
        ) from error


def _commit(target: Target, clone: Path) -> str:
    """Return the commit of a revision: 40 hex digits, or 64."""
    quiet = git_variables(filters=False)
    wanted = target.revision or "HEAD"
    ask = ("rev-parse", "--verify", "--quiet", f"{wanted}^{{commit}}")
    found = ask_git(clone, *ask, variables=quiet).strip()
    if not found and fetch_commit(clone, wanted, timeout_s=GIT_TIMEOUT_S):
        found = wanted
    if not COMMIT.fullmatch(found):
        if not target.revision:
            raise ConfigError(
                f"{target} has no commit that HEAD names", hint="name a branch, tag or commit: URL@BRANCH"
            )
        names = ask_git(clone, "for-each-ref", "--format=%(refname:short)", "--count=10", variables=quiet).split()
        raise ConfigError(f"{target}: no such commit, tag or branch; it has {few(names) or 'none'}",
                          hint="git log in a clone shows the commits")  # fmt: skip
    return found


def _receipt(target: Target, clone: Path, commit: str, named: str | None) -> str:
    """Return the path of the receipt in the commit.

    Raises:
        ConfigError: there is none, or several and none is named.
    """
    files = list(_files(clone, commit))
    if named is not None:
        path = PurePosixPath(named).as_posix()
        for wanted in (path, f"{path}/{FILE}"):
            if wanted in files:
                return wanted
    found = [path for path in files if PurePosixPath(path).name == FILE]
    if named is None and len(found) == 1:
        return found[0]
    what = f"no {named}" if named is not None else f"{len(found)} receipts" if found else f"no {FILE}"
    listed = "".join(f"\n{one_line(path)}" for path in found[:20]) + ("\n..." if len(found) > 20 else "")
    where = f"{what} in commit {commit[:12]} of {target}"
    if not found:
        raise ConfigError(where, hint=f"its author can add it: git add -f runs/EXPERIMENT/RUN/{FILE}, and trail.jsonl")
    raise ConfigError(f"{where}:{listed}" if named is None else f"{where}; it has:{listed}",
                      hint=f"labtrain verify {quoted(str(target))} --receipt {quoted(found[0])}")  # fmt: skip


def _files(clone: Path, commit: str) -> Iterator[str]:
    """Yield the paths of a commit's regular files; a link is none."""
    listed = run_git(clone, "ls-tree", "-r", "-z", "--full-tree", commit, variables=git_variables(filters=False))
    for line in listed.split("\0"):
        kind, _, path = line.partition("\t")
        if kind.startswith("100"):
            yield path


def _checked_out(clone: Path, commit: str, folder: Path) -> Path:
    """Check out a commit of the clone, without filters, and return its folder."""
    made = folder / "code"
    borrow_commit(str(clone), commit, made, filters=False)
    quiet = git_variables(filters=False)
    run_git(made, "checkout", "-q", "--detach", commit, variables=quiet, timeout_s=GIT_TIMEOUT_S)
    return made


def _code(
    target: Target, receipt: Receipt, run_dir: Path, file: Path, root: Path, clone: Path, scratch: Path
) -> tuple[Path, str]:
    """Return the folder with the receipt's code, and its origin in words."""
    commit = receipt["code"]["commit"]
    if commit is None:
        home = enclosing(file.parent)
        if home is None or not home.is_relative_to(root.resolve()):
            raise ConfigError("the receipt names no commit, and no train.py is above it", hint="ask its author")
        if source_digests(home) != receipt["code"]["sources"]:
            raise ConfigError("the receipt names no commit, and the sources above it differ from its own",
                              hint="ask its author for: labtrain bundle RUN -o run.zip")  # fmt: skip
        return home, "the sources above the receipt, which names no commit"
    quiet = git_variables(filters=False)
    has_it = ask_git(clone, "cat-file", "-t", commit, variables=quiet).strip() == "commit"
    if not has_it and not fetch_commit(clone, commit, timeout_s=GIT_TIMEOUT_S):
        raise ConfigError(
            f"the receipt's commit {commit[:12]} is not in {target}: it was not pushed, or the repository is shallow",
            hint="its author can push it: git push; or send the run: labtrain bundle RUN -o run.zip",
        )
    return checked_out(receipt, run_dir, str(clone), scratch)


def check_lock(receipt: Receipt, home: Path) -> None:
    """Raise ConfigError if the lock beside the code is not the receipt's, so another environment would train."""
    recorded = receipt["environment"]
    if recorded["route"] in ("wheels", "nix") and recorded["lock_digest"] != (found := lock_digest(home, "wheels")):
        raise LabtrainError(
            f"requirements.lock with the receipt's code has digest {found[:12] or '(missing)'}, the receipt records"
            f" {(recorded['lock_digest'] or '(none)')[:12]}",
            hint="ask its author: the run was trained with another lock",
        )
