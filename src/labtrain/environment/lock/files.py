"""Read the text of locks and of their sources. A file that cannot be read is an error that names it."""

import tomllib
from pathlib import Path

from labtrain.base.console import quoted
from labtrain.base.contracts import Options
from labtrain.base.errors import DamagedError

PROJECT = "pyproject.toml"


def read_text(folder: Path, name: str) -> str:
    """Return a file's text.

    Args:
        folder: a project or an experiment.
        name: the file, relative to it.

    Raises:
        DamagedError: it cannot be read, or is not UTF-8.
    """
    path = folder / name
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}", hint=restore(name)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"byte 0x{error.object[error.start]:02x} in line {line} is not UTF-8"
        raise DamagedError(f"{path}: {found}", hint=restore(name)) from error


def read_project(folder: Path) -> Options:
    """Return the table `project` of pyproject.toml.

    Raises:
        DamagedError: it cannot be read, is not TOML, or has no such table.
    """
    try:
        project = tomllib.loads(read_text(folder, PROJECT)).get("project")
    except tomllib.TOMLDecodeError as error:
        raise DamagedError(f"{folder / PROJECT}: {error}", hint=restore(PROJECT)) from error
    if not isinstance(project, dict):
        raise DamagedError(f"{folder / PROJECT}: must have a table [project]", hint=restore(PROJECT))
    return project


def restore(name: str) -> str:
    """Return the command that brings back a file as it was committed."""
    return f"git checkout {quoted(name)}"
