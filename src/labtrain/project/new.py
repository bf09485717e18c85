"""Make an experiment: the cookiecutter template, which its hook furnishes (carried.py)."""

import logging
import os
import re
import tempfile
from pathlib import Path

from labtrain.assets import asset
from labtrain.base.console import quoted
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.bootstrap import WHEEL_LOCK

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def make_experiment(target: Path, *, author: str) -> None:
    """Make the experiment `target`, named after its last part.

    Raises:
        ConfigError: the folder exists or cannot be written, or its name is not valid. Nothing is left behind.
    """
    from cookiecutter.exceptions import CookiecutterException, FailedHookException
    from cookiecutter.main import cookiecutter

    target = target.resolve()
    if target.exists():
        raise ConfigError(f"{target} already exists", hint=f"labtrain new {target.name}2, or remove it first")
    if not NAME.fullmatch(target.name):
        raise ConfigError(
            f"{target.name!r} is not a valid name: use ASCII letters, digits, _ and -, and begin with a letter or _",
            hint="labtrain new digits",
        )
    missing = target.parent
    while not missing.exists():
        missing = missing.parent
    if not os.access(missing, os.W_OK | os.X_OK):
        raise ConfigError(f"{missing}: no write permission", hint=f"ls -ld {missing}")
    with tempfile.TemporaryDirectory() as scratch:
        # cookiecutter would leave replay files in the home directory and rendered hooks in the temporary directory
        # (cookiecutter/hooks.py run_script_with_context).
        before, tempfile.tempdir = tempfile.tempdir, scratch
        logging.getLogger("cookiecutter").addHandler(logging.NullHandler())  # else it prints the hook's failure again
        config = Path(scratch) / "cookiecutter.yaml"
        config.write_text(f"replay_dir: {scratch}/replay\ncookiecutters_dir: {scratch}/templates\n")
        try:
            cookiecutter(
                str(asset("template")),
                no_input=True,
                extra_context={"name": target.name, "author": author},
                output_dir=str(target.parent),
                config_file=str(config),
            )
        except FailedHookException as error:
            raise LabtrainError(
                f"{target}: cannot make the experiment", hint="see the lines above for the reason"
            ) from error
        except (CookiecutterException, OSError) as error:
            raise LabtrainError(f"{target}: {error}", hint=f"ls -ld {target.parent}") from error
        finally:
            tempfile.tempdir = before


def refuse_nested(target: Path) -> None:
    """Refuse to make an experiment inside another one: its files would become part of the other's code.

    Raises:
        ConfigError: a folder above `target` is an experiment.
    """
    for folder in target.resolve().parents:
        if (folder / WHEEL_LOCK).exists():
            raise ConfigError(
                f"{target} is inside the experiment {folder}",
                hint=f"labtrain new {quoted(os.path.relpath(folder.parent / target.name))}",
            )
