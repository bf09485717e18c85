"""`labtrain upgrade`: raise pins, make the new environment beside the old one, and judge it. No torch.

Everything happens in a git worktree of HEAD (https://git-scm.com/docs/git-worktree), in a folder beside the
repository, with an environment of its own. So the user's files, environment and branch do not change. The last step
makes the new branch. If a step fails, the worktree is removed; if labtrain is killed, the next start removes it.
"""

import datetime
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from labtrain.base.console import few, one_line, quoted
from labtrain.base.credentials import without_secrets
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.git import GitError, ask_git, run_git
from labtrain.base.permissions import open_lock
from labtrain.base.programs import labtrain_command
from labtrain.base.untrusted import remove_tree, scratch_folder
from labtrain.environment.doctor.cliffs import shown_ends
from labtrain.environment.lock import conda
from labtrain.environment.lock.files import PROJECT
from labtrain.environment.lock.newer import changed_pins, check_packages, raise_pins
from labtrain.environment.lock.pins import require_locks
from labtrain.environment.lock.write import WRITTEN, is_labtrain
from labtrain.record import receipt
from labtrain.record.identity import LOCK_FILE, route
from labtrain.review.gate import GateOptions, admit_baselines
from labtrain.review.retrace import Say
from labtrain.review.trust import Ask

STATE = "labtrain-upgrade"  # in the repository's .git: a lock, and the worktree that is being made
MARK = "LABTRAIN_UPGRADE"  # in the environment of each process that this starts: the worktree
PAGE = "upgrade.html"
GIT_TIMEOUT_S = 600  # a checkout of a large repository on a slow disk
END_TIMEOUT_S = 60  # a killed process that waits for its disk
COMMITTED = (PROJECT, conda.SPEC, *WRITTEN)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpgradeOptions:
    """What to raise, and how to judge it.

    Attributes:
        packages: NAME or NAME==VERSION; empty: all that pyproject.toml allows.
        baselines: runs to train again; empty: those in baselines/, in labtrain's repository the golden run.
        branch: to make.
        tree: the folder for the worktree; None: beside the repository, named after the branch.
        judged: the gate's options.
    """

    packages: tuple[str, ...] = ()
    baselines: tuple[Path, ...] = ()
    branch: str
    tree: Path | None = None
    judged: GateOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The result of a step that judges.

    Attributes:
        passed: whether it speaks for the upgrade.
        lines: what it found.
    """

    passed: bool
    lines: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Upgrade:
    """A finished upgrade, on its branch.

    Attributes:
        branch: its name.
        tree: the worktree.
        home: the project's folder in it, with the new environment in .venv.
        pins: each raised pin, such as `einops 0.7.0 -> 0.8.1`.
        doctor: what the doctor found in the new environment.
        gate: what the gate found, a line for each experiment.
        page: the report; None if there is none.
    """

    branch: str
    tree: Path
    home: Path
    pins: list[str]
    doctor: Found
    gate: Found
    page: Path | None

    @property
    def passed(self) -> bool:
        return self.doctor.passed and self.gate.passed


def default_branch() -> str:
    """Return the branch of an upgrade that begins today."""
    return f"upgrade-{datetime.datetime.now().astimezone():%Y-%m-%d}"


def make_upgrade(folder: Path, options: UpgradeOptions, *, ask: Ask | None, say: Say) -> Upgrade | None:
    """Raise a project's pins on a new branch and judge them; return None if nothing can be raised.

    Args:
        folder: labtrain's repository, or an experiment.
        options: what to raise, and how to judge it.
        ask: shows the user what would run, and returns whether it may; None: only this user's own runs may.
        say: receives a line for each step.

    Raises:
        LabtrainError: it cannot begin, or a step failed. Nothing is left behind.
    """
    project = _Project.find(folder, options)
    check_packages(folder, options.packages)
    baselines = _baselines(folder, options)
    with scratch_folder("labtrain-upgrade-") as scratch:
        admit_baselines(baselines, options.judged, scratch=scratch, ask=ask, say=say)
    with project.worktree() as keep:
        home = project.home
        for line in raise_pins(home, options.packages):
            say(f"locks        {line}")
        if not (pins := changed_pins(folder / LOCK_FILE, home / LOCK_FILE)):
            return None
        for pin in pins:
            say(f"pin          {pin}")
        say(f"environment  {os.path.relpath(home / '.venv')}: takes minutes")
        _make_environment(project)
        doctor = _examine(project)
        for line in doctor.lines:
            say(f"doctor       {line}")
        gate, page = _judge(project, baselines, options.judged)
        for line in gate.lines:
            say(f"gate         {line}")
        made = Upgrade(branch=options.branch, tree=project.tree, home=home, pins=pins, doctor=doctor, gate=gate,
                       page=page)  # fmt: skip
        _commit(made)
        keep()
    return made


def _baselines(folder: Path, options: UpgradeOptions) -> list[Path]:
    """Return the runs to train again, as absolute paths; none in labtrain's repository, which has the golden run.

    Raises:
        ConfigError: an experiment has none.
    """
    found = [each.absolute() for each in options.baselines]
    found = found or sorted(path.parent for path in folder.absolute().glob(f"baselines/*/{receipt.FILE}"))
    if found or is_labtrain(folder):
        return found
    raise ConfigError(
        "no baselines: labtrain trains recorded runs again to see whether the upgrade changes results",
        hint="labtrain upgrade runs/*/*; or copy a run that matters to baselines/NAME",
    )


# -------------------------------------------------------------------------------------------------- the worktree


@dataclass(frozen=True, kw_only=True, slots=True)
class _Project:
    """A project in a git repository, and the worktree for its upgrade.

    Attributes:
        folder: of the project.
        top: the repository's working tree.
        state: the file in .git that a running upgrade locks.
        tree: the worktree.
        home: the project's folder in the worktree.
    """

    folder: Path
    top: Path
    state: Path
    tree: Path
    home: Path

    @classmethod
    def find(cls, folder: Path, options: UpgradeOptions) -> "_Project":
        """Return the project in `folder`, if an upgrade of it can begin.

        Raises:
            ConfigError: it is not committed, git cannot commit here, or the branch exists.
        """
        folder = folder.resolve()
        _refuse(folder, options.branch)
        top = Path(run_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
        common = run_git(folder, "rev-parse", "--path-format=absolute", "--git-common-dir").removesuffix("\n")
        tree = (options.tree or top.with_name(f"{top.name}-{options.branch.replace('/', '-')}")).absolute()
        if tree.is_relative_to(top):
            raise ConfigError(f"{tree} is in the repository itself", hint=f"--dir ../{tree.name}")
        if not tree.parent.is_dir() or not os.access(tree.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{tree.parent}: no such folder, or no write permission", hint="--dir DIR")
        return cls(folder=folder, top=top, state=Path(common) / STATE, tree=tree, home=tree / folder.relative_to(top))

    @contextmanager
    def worktree(self) -> "Iterator[_Keep]":
        """Make the worktree of HEAD, and remove it at the end unless it is kept."""
        keep = _Keep()
        with self._alone() as descriptor:
            if self.tree.exists():
                raise ConfigError(
                    f"{self.tree} already exists", hint=f"--dir DIR; or git worktree remove --force {quoted(self.tree)}"
                )
            _note(descriptor, str(self.tree))
            try:
                run_git(self.folder, "worktree", "add", "-q", "--detach", str(self.tree), "HEAD",
                        timeout_s=GIT_TIMEOUT_S)  # fmt: skip
                yield keep
            finally:
                if not keep.kept:
                    self._remove(self.tree)
                _note(descriptor, "")

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Keep other upgrades of this repository out, and remove what a killed one has left."""
        descriptor = open_lock(self.state)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise LabtrainError("another upgrade of this repository is running", hint="wait for it") from error
            if left := os.pread(descriptor, 10_000, 0).decode("utf-8", "surrogateescape"):
                self._remove(Path(left))
            yield descriptor
        finally:
            os.close(descriptor)

    def _remove(self, tree: Path) -> None:
        """Remove a worktree that an upgrade made, and end what it left running there."""
        known = ask_git(self.folder, "worktree", "list", "--porcelain", "-z").split("\0")
        _end_processes(tree)
        if tree.is_dir() and f"worktree {tree.resolve()}" in known:
            remove_tree(tree)
        ask_git(self.folder, "worktree", "prune")


class _Keep:
    """Says that the worktree stays."""

    def __init__(self) -> None:
        self.kept = False

    def __call__(self) -> None:
        self.kept = True


def _refuse(folder: Path, branch: str) -> None:
    """Raise ConfigError if there is no commit to begin from, or none could be made at the end."""
    require_locks(folder)
    if route() != "wheels":
        raise ConfigError(
            f"this environment is of the route {route()}; upgrade compares environments of wheels",
            hint="make setup, then .venv/bin/labtrain upgrade",
        )
    if not ask_git(folder, "rev-parse", "--verify", "-q", "HEAD"):
        raise ConfigError(
            f"{folder} is not in a git repository with a commit", hint="git init; git add -A; git commit -m first"
        )
    names = [name for name in COMMITTED if (folder / name).exists()]
    if changed := run_git(folder, "status", "--porcelain", "--", *names).splitlines():
        listed = few([line[3:] for line in changed])
        raise ConfigError(
            f"uncommitted changes of {listed}: the upgrade begins from the last commit",
            hint="git commit -a; or git stash",
        )
    if missing := [name for name in names if not ask_git(folder, "ls-files", "--", name)]:
        raise ConfigError(f"git does not have {few(missing)}", hint=f"git add -f {missing[0]}; git commit -m locks")
    try:
        run_git(folder, "var", "GIT_COMMITTER_IDENT")
        run_git(folder, "check-ref-format", "--branch", branch)
    except GitError as error:
        who = "git config user.name NAME; git config user.email ADDRESS"
        raise ConfigError(
            one_line(str(error.args[0])), hint=who if "IDENT" in str(error) else "--branch NAME"
        ) from error
    if ask_git(folder, "rev-parse", "--verify", "-q", f"refs/heads/{branch}"):
        raise ConfigError(f"the branch {branch} already exists", hint=f"--branch {branch}-2; or git branch -D {branch}")


def _note(descriptor: int, text: str) -> None:
    """Write to the state file, so that it survives a kill."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode("utf-8", "surrogateescape"), 0)
    os.fsync(descriptor)


def _end_processes(tree: Path) -> None:
    """End the processes that an upgrade started for a worktree: a killed one leaves its installer running."""
    mark = f"{MARK}={tree}".encode("utf-8", "surrogateescape")
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError), ExitStack() as opened:  # another user's, or already gone
            process = os.pidfd_open(int(path.parent.name))
            opened.callback(os.close, process)
            if mark in path.read_bytes().split(b"\0"):
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], END_TIMEOUT_S)


# ----------------------------------------------------------------------------------------------------- the steps


def _start(project: _Project, command: Sequence[str | Path], folder: Path, **more: str) -> tuple[int, str]:
    """Run a step's program and return its exit code and its standard output; its errors go to the terminal."""
    left_out = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | more
    environment[MARK] = str(project.tree)
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def _make_environment(project: _Project) -> None:
    """Make the new environment as `make setup` does in the worktree.

    Raises:
        LabtrainError: it cannot be made.
    """
    home, python = project.home, os.path.realpath(sys.executable)
    if (home / "setup.sh").exists():
        code, _ = _start(project, ["sh", "setup.sh"], home, PYTHON=python)
    else:
        command = [python, "-B", "-m", "labtrain.bootstrap", "--editable"]
        code, _ = _start(project, command, home, PYTHONPATH=str(home / "src"))
    if code:
        raise LabtrainError(
            f"the new environment cannot be made: setup ended with exit code {code}",
            hint="see the lines above for the reason; then repeat the command",
        )


def _labtrain(home: Path) -> str:
    return str(home / ".venv" / "bin" / "labtrain")


def _examine(project: _Project) -> Found:
    """Run the doctor in the new environment. What fails in the old one, too, does not speak against the upgrade."""
    failed, warned = _problems(project, [_labtrain(project.home)], project.home)
    old, _ = _problems(project, labtrain_command(), project.folder) if failed else ({}, {})
    lines = [f"{name}: {text}{' (as in the old environment)' if name in old else ''}" for name, text in failed.items()]
    lines += [f"{name}: {text} (a warning)" for name, text in warned.items()]
    return Found(passed=failed.keys() <= old.keys(), lines=lines or ["no problems"])


def _problems(project: _Project, labtrain: list[str], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the doctor found in each failed check, and in each with a warning, by the check's name."""
    code, out = _start(project, [*labtrain, "doctor", "--json"], folder)
    try:
        checks = json.loads(out)
    except ValueError:
        return {"doctor": f"ended with exit code {code}"}, {}
    failed = {
        each["name"]: f"{each['found']}; expected {each['wanted']}" for each in checks if each["status"] == "failed"
    }
    return failed, {each["name"]: each["found"] for each in checks if each["status"] == "warned"}


def _judge(project: _Project, baselines: list[Path], judged: GateOptions) -> tuple[Found, Path | None]:
    """Train the baselines again in the new environment; without baselines, labtrain's golden run."""
    home = project.home
    if not baselines:
        code, out = _start(project, [_labtrain(home), "demo", "--dir", home / ".demo"], home)
        page = home / ".demo" / "report.html"
        told = [line for line in out.splitlines() if line.startswith(("differs", "trained")) or "one digest" in line]
        return Found(passed=not code, lines=[f"demo: {line}" for line in told or [f"ended with exit code {code}"]]), (
            page if page.exists() else None
        )
    options = ["--old-python", sys.executable, "--alpha", str(judged.alpha)]
    options += ["--seeds", str(judged.seeds)] if judged.seeds else []
    options += ["--metric", judged.metric] if judged.metric else []
    options += ["--margin", str(judged.margin)] if judged.margin is not None else []
    page = home / PAGE
    # --trust: all that it would ask was asked before the first step.
    command: list[str | Path] = [_labtrain(home), "gate", *baselines, *options, "--trust", "--json", "--report", page]
    code, out = _start(project, command, project.folder)
    try:
        lines = [f"{each['experiment']}: {each['found']}" for each in json.loads(out)]
    except ValueError:
        lines = [f"ended with exit code {code} and no verdict"]
    return Found(passed=not code, lines=lines), page if page.exists() else None


def _commit(made: Upgrade) -> None:
    """Commit the locks with the verdict as message, and make the branch."""
    names = [name for name in COMMITTED if (made.home / name).exists()]
    run_git(made.home, "add", "-f", "--", *names)
    run_git(made.home, "commit", "-q", "--no-verify", "--no-gpg-sign", "-F", "-", text=message_of(made))
    run_git(made.tree, "checkout", "-q", "-b", made.branch)


def message_of(made: Upgrade) -> str:
    """Return the commit's message, which holds the verdict."""
    verdict = "yes" if made.passed else "no"
    pins = made.pins[0] if len(made.pins) == 1 else f"{len(made.pins)} pins"
    parts = {
        "Pins, old -> new": made.pins,
        "Doctor in the new environment": made.doctor.lines,
        "Gate, old environment against new": made.gate.lines,
        "What ends when": list(shown_ends()),
    }
    body = "\n\n".join(
        f"{name}:\n" + "\n".join(f"- {one_line(line)}" for line in lines) for name, lines in parts.items()
    )
    return without_secrets(f"upgrade: {verdict}: {pins}\n\nVerdict of labtrain upgrade: {verdict}.\n\n{body}\n")
