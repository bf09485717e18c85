"""Run git, with a time limit, and keep every byte of its output. No torch."""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from labtrain.base.errors import LabtrainError

TIMEOUT_S = 60.0
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
TRANSPORTS = ("file", "git", "https", "ssh")  # of git clone; ext:: and fd:: start programs (git-remote-ext(1))
# The user's ways to reach a server; other variables could lead git to another repository.
ACCESS = ("GIT_ASKPASS", "GIT_PROXY_COMMAND", "GIT_SSH", "GIT_SSH_COMMAND", "GIT_SSL_CAINFO", "GIT_SSL_CERT")


class GitError(LabtrainError):
    """git failed, is not installed, or did not end in time."""


def run_git(
    folder: str | Path,
    *arguments: str,
    text: str = "",
    variables: dict[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
    codes: Sequence[int] = (0,),
) -> str:
    """Return what git prints. Bytes that are not UTF-8 are kept (surrogateescape).

    Args:
        folder: the working directory.
        arguments: git's arguments.
        text: standard input.
        variables: the environment; None: this process's.
        timeout_s: kill git after this time.
        codes: exit codes that are not a failure.

    Raises:
        GitError: git failed, is not installed, or did not end in time; contains git's message.
    """
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=variables, input=text.encode("utf-8", "surrogateescape"),
                              capture_output=True, check=False, timeout=timeout_s)  # fmt: skip
    except FileNotFoundError as error:
        raise GitError("git is not installed", hint="apt-get install git") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        ended = (
            f"did not end within {timeout_s:g} seconds" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        )
        raise GitError(f"git {' '.join(arguments[:4])}: {ended}", hint="git status") from error
    if done.returncode not in codes:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise GitError(f"git {' '.join(arguments[:4])}: {said}", hint="git status")
    return done.stdout.decode("utf-8", "surrogateescape")


def ask_git(folder: str | Path, *arguments: str, variables: dict[str, str] | None = None) -> str:
    """Return what git prints; empty if it fails or is not installed."""
    try:
        return run_git(folder, *arguments, variables=variables)
    except GitError:
        return ""


def borrow_commit(top: str, commit: str, clone: Path, *, filters: bool) -> bool:
    """Make a repository that borrows a commit's objects from another one; return whether that one has the commit.

    The other repository may be untrusted, and its configuration can start programs: hooks, filters, a file system
    monitor, a fetch in a partial clone (git-config(1)). It is asked only for the place of its objects, which starts no
    program.

    Args:
        top: the other repository's folder.
        commit: 40 hex digits, or 64.
        clone: a folder to make.
        filters: use the user's own git configuration, such as the filters of Git LFS.
    """
    objects = ask_git(top, "rev-parse", "--path-format=absolute", "--git-path", "objects").removesuffix("\n")
    kind = ask_git(top, "rev-parse", "--show-object-format").strip()
    if not objects or not COMMIT.fullmatch(commit) or "\n" in objects:
        return False
    variables = git_variables(filters=filters)
    clone.mkdir()
    ask_git(str(clone), "init", "-q", "--template=", f"--object-format={kind or 'sha1'}", variables=variables)
    ask_git(str(clone), "config", "remote.origin.url", top, variables=variables)  # Git LFS finds its files there
    alternates = clone / ".git" / "objects" / "info" / "alternates"
    alternates.parent.mkdir(exist_ok=True)
    alternates.write_bytes(f"{json.dumps(objects, ensure_ascii=False)}\n".encode("utf-8", "surrogateescape"))
    return ask_git(str(clone), "cat-file", "-t", commit, variables=variables).strip() == "commit"


def clone_bare(url: str, folder: Path, *, timeout_s: float) -> None:
    """Clone a repository without a working tree, so that nothing of it runs: no hook, filter, submodule or LFS.

    git uses the user's own configuration and keys to reach the server, and asks nothing.

    Args:
        url: of the repository, or a path; must not be an option.
        folder: to make.
        timeout_s: when to kill git.

    Raises:
        GitError: git failed or took longer.
    """
    # --no-local: git reads the other repository as from a server, so links in it lead nowhere.
    arguments = ("clone", "--bare", "--quiet", "--no-local", "--template=", "--", url, str(folder))
    _run_remote(folder.parent, *arguments, timeout_s=timeout_s)


def fetch_commit(clone: Path, commit: str, *, timeout_s: float) -> bool:
    """Ask the server of a clone for a commit that no branch or tag contains; return whether it gave it."""
    if not COMMIT.fullmatch(commit):
        return False
    try:
        _run_remote(clone, "fetch", "--quiet", "--no-tags", "origin", commit, timeout_s=timeout_s)
    except GitError:
        return False
    return True


def _run_remote(folder: Path, *arguments: str, timeout_s: float) -> None:
    """Run a git command that reaches a server, with the user's own access and no program of the repository."""
    variables = git_variables(filters=True) | {name: os.environ[name] for name in ACCESS if name in os.environ}
    variables |= {"GIT_ALLOW_PROTOCOL": ":".join(TRANSPORTS), "GIT_NO_LAZY_FETCH": "1", "GIT_LFS_SKIP_SMUDGE": "1"}
    run_git(folder, "-c", f"core.hooksPath={os.devnull}", *arguments, variables=variables, timeout_s=timeout_s)


def git_variables(*, filters: bool) -> dict[str, str]:
    """Return the environment for git in a repository of labtrain's, independent of this process's GIT_* variables.

    Args:
        filters: use the user's own configuration; else none.
    """
    variables = {name: value for name, value in os.environ.items()
                 if not name.startswith("GIT_") or name.startswith("GIT_CONFIG")}  # fmt: skip
    if not filters:
        variables = {name: value for name, value in variables.items() if not name.startswith("GIT_CONFIG")}
        variables |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "GIT_ATTR_NOSYSTEM": "1"}
    return variables | {"GIT_TERMINAL_PROMPT": "0"}
