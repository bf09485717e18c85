"""Errors for people.

::

    LabtrainError            what happened, what was found, what is expected; `hint` is what to type next
    ├── ConfigError          a key, a value or an override
    ├── DeviceError          devices, precision or memory that this machine does not have
    ├── DamagedError         a damaged or changed receipt, checkpoint or lock
    ├── StoreError           a store that cannot be reached, is full, or refuses access
    ├── WriteError           a file that cannot be written: the disk is full or broken, or the folder was removed
    ├── LostError            lost contact with the other processes of a training
    └── NotThereYetError     an option that is not implemented

Each ends a command with exit code 2, a CallbackError with 1. Any other exception is a bug, or comes from the user's
code, and keeps its traceback.
"""

import errno
import grp
import importlib.metadata
import importlib.util
import json
import os
import pwd
import shlex
import stat
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from labtrain.base.console import message, one_line, quoted, shown

EXIT_USAGE = 2
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE)  # whoever writes
EXIT_LOST = 76  # of a rank that lost contact with the others, without a launcher: EX_PROTOCOL of sysexits.h
EXIT_STOPPED = 75  # stopped by a signal, and saved: EX_TEMPFAIL of sysexits.h


class LabtrainError(Exception):
    """An error that names its cause and, in `hint`, the command that helps."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = message(self.args[0])
        return f"{text}\n\nhint: {one_line(self.hint)}" if self.hint else text


class ConfigError(LabtrainError):
    """A configuration key, group, value or override that cannot be used."""


class DeviceError(LabtrainError):
    """More devices, memory or precision than the machine has."""


class DamagedError(LabtrainError):
    """One of labtrain's files is broken, incomplete, or of an unknown version."""


class StoreError(LabtrainError):
    """A store that cannot be reached, is full, or refuses access."""


class WriteError(LabtrainError):
    """A file that cannot be written: the disk is full or broken, or the folder was removed."""


class LostError(LabtrainError):
    """Lost contact with the other processes of a training."""


class CallbackError(LabtrainError):
    """A configured callback failed: names the callback, the hook, and the place in its code."""

    exit_code = 1


class NotThereYetError(LabtrainError):
    """An option that is not implemented."""

    def __init__(self, what: str, *, hint: str = "CHANGELOG.md lists what each version implements") -> None:
        super().__init__(f"{what}: not implemented", hint=hint)


class JobFailedError(LabtrainError):
    """A job of a sweep failed; it has printed the reason itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.args = (message, exit_code)  # for pickling: it may come from another machine
        self.exit_code = exit_code


def missing_package(error: ModuleNotFoundError, command: Sequence[str]) -> LabtrainError | None:
    """Explain that labtrain cannot import a package that its core does without; None if another program imports it.

    Args:
        error: of an import statement.
        command: what needs the package, as typed.
    """
    package = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    if not error.name or error.name.startswith("labtrain") or not frames or not frames[-1].filename.startswith(package):
        return None
    return LabtrainError(
        f"{' '.join(command[:2])} needs {error.name.partition('.')[0]}, which is not installed: this is labtrain"
        " without its training packages",
        hint=_install_line(shlex.join(command)),
    )


def _install_line(command: str) -> str:
    """Return the line that makes a command's environment: an experiment's own, or of where labtrain came from."""
    if Path("requirements.lock").is_file():
        return f"make setup && .venv/bin/{command}"
    source = ""
    with suppress(importlib.metadata.PackageNotFoundError):  # labtrain runs from its sources
        told = importlib.metadata.distribution("labtrain").read_text("direct_url.json")
        source = f" @ {_address(told)}" if told else ""
    whole = quoted(f"labtrain[train]{source}")
    has_pip = importlib.util.find_spec("pip") is not None
    return f"{quoted(sys.executable)} -m pip install {whole}" if has_pip else f"uvx --from {whole} {command}"


def _address(text: str) -> str:
    """Return the address that pip and uv take, of a direct_url.json (PEP 610)."""
    told = json.loads(text)
    vcs = told.get("vcs_info")
    return f"{vcs['vcs']}+{told['url']}@{vcs['commit_id']}" if vcs else str(told["url"])


def not_readable(path: Path) -> ConfigError:
    """Return the error for an unreadable path: which folder is closed, its owner, and how to open it."""
    path = path.absolute()
    way = [*reversed(path.parents), path]
    place = next((each for each in way if not os.access(each, os.X_OK)), path)
    uid = place.stat().st_uid
    try:
        owner = pwd.getpwuid(uid).pw_name
    except KeyError:
        owner = f"user {uid}"
    command = "chmod -R a+rX" if place == path else "chmod a+x"  # never the whole home
    command = _for_group(place, whole=place == path) or f"{command} {quoted(place)}"
    return ConfigError(f"{place}: no permission to read it; its owner is {owner}", hint=f"{owner} can run: {command}")


def _for_group(place: Path, *, whole: bool) -> str:
    """Return the command that opens a path to the group of the shared folder above it; empty if none is shared."""
    for above in place.parents:
        found = above.stat()
        if found.st_mode & (stat.S_ISGID | stat.S_IWGRP) == stat.S_ISGID | stat.S_IWGRP:
            group = str(found.st_gid)
            with suppress(KeyError):  # in a container the group may have no entry
                group = grp.getgrgid(found.st_gid).gr_name
            at, many, mode = quoted(place), "-R " if whole else "", "g+rwX" if whole else "g+x"
            return f"chgrp {many}{quoted(group)} {at} && chmod {many}{mode} {at}"
    return ""


def write_error(path: Path, error: OSError) -> WriteError:
    """Return the error for a file that cannot be written, with the file that `error` names, if it names one."""
    named = error.filename2 or error.filename
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else path
    place = next(each for each in path.absolute().parents if each.is_dir())
    return WriteError(
        f"{shown(path)} could not be written: {error.strerror or in_words(error)}",
        hint=f"df -h {quoted(shown(place))}; ls -ld {quoted(shown(place))}; then the same command again",
    )


def os_error_in(error: BaseException) -> OSError | None:
    """Return the first OSError of an exception's chain: torch and others raise their own exception after it."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if isinstance(link, OSError):
            return link
        seen.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def explain_disk(error: BaseException, run_dir: Path) -> WriteError | None:
    """Explain an OSError of a full or broken disk, or of a path in a run's folder; None for any other exception."""
    if isinstance(error, LabtrainError) or (found := os_error_in(error)) is None:
        return None
    named = found.filename
    own = isinstance(named, str | os.PathLike) and Path(named).absolute().is_relative_to(run_dir.absolute())
    if own:
        return write_error(run_dir, found)
    if found.errno not in DISK:
        return None
    if named is None:
        return WriteError(
            f"{found.strerror}: a file could not be written, or read{where(found.__traceback__)}",
            hint="df -h; then the same command again. HYDRA_FULL_ERROR=1 before it shows the full traceback",
        )
    return write_error(run_dir, found)


def explain_callback(error: BaseException, callbacks: Mapping[str, object]) -> CallbackError | None:
    """Turn an exception from a callback's hook into a CallbackError; None for any other exception.

    Args:
        error: raised by a training.
        callbacks: the configured callbacks, by name.
    """
    if not isinstance(error, Exception) or isinstance(error, LabtrainError):
        return None
    names = {id(callback): name for name, callback in callbacks.items()}
    trace = error.__traceback__
    while trace is not None and id(trace.tb_frame.f_locals.get("self")) not in names:
        trace = trace.tb_next
    if trace is None:
        return None
    callback, hook = trace.tb_frame.f_locals["self"], trace.tb_frame.f_code.co_name
    return CallbackError(
        f"callbacks.{names[id(callback)]} ({type(callback).__name__}.{hook}): {in_words(error)}{where(trace)}",
        hint="put HYDRA_FULL_ERROR=1 before the same command for the full traceback",
    )


def where(trace: types.TracebackType | None) -> str:
    """Return the lines of a traceback outside installed packages; if there are none, its last line."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if "site-packages" not in Path(frame.filename).parts] or frames[-1:]
    return "".join(f"\n  {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in own)


def in_words(error: BaseException) -> str:
    """Return an exception's type and message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
