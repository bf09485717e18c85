"""Make an experiment: the cookiecutter template, the locks, and the wheel of this labtrain."""

import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from labtrain.assets import LOCKS, SOURCES, asset
from labtrain.base.console import quoted
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import file_sha256
from labtrain.base.programs import run_program
from labtrain.bootstrap import WHEEL_LOCK

# Next to labtrain, in a folder that other distributions use too.
PLUGINS = ("hydra_plugins/labtrain_searchpath.py", "hydra_plugins/labtrain_parallel.py")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
ZIP_EPOCH = "315532800"  # 1980-01-01, the earliest date in a zip file: the same files give the same wheel
PACK_TIMEOUT_S = 600  # it takes a second, on a slow disk more
SKIPPED = ("__pycache__", "*.pyc")


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


def furnish(experiment: Path) -> None:
    """Copy the locks into an experiment, this labtrain's wheel into `vendor/`, and its hash into labtrain.lock."""
    for name in LOCKS:
        copy_asset(name, experiment / name)
    wheel = build_wheel(experiment / "vendor")
    digest = file_sha256(wheel)
    (experiment / WHEEL_LOCK).write_text(f"./vendor/{wheel.name} --hash=sha256:{digest}\n")


def copy_asset(name: str, target: Path) -> None:
    """Copy an asset (a file or folder) to `target`."""
    source = asset(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*SKIPPED))
    else:
        shutil.copyfile(source, target)


def build_wheel(folder: Path) -> Path:
    """Pack this labtrain into a wheel in `folder`; a clone and an installed wheel give the same bytes.

    Raises:
        LabtrainError: labtrain is not installed, or the wheel cannot be written in time.
    """
    try:
        distribution = importlib.metadata.distribution("labtrain")
    except importlib.metadata.PackageNotFoundError as error:
        raise LabtrainError(
            "cannot pack labtrain into the experiment: labtrain is not installed", hint="make setup"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(Path(__file__).parents[1], tree / "labtrain", ignore=shutil.ignore_patterns("assets", *SKIPPED))
        (tree / "hydra_plugins").mkdir()
        for name in PLUGINS:
            shutil.copyfile(Path(__file__).parents[2] / name, tree / name)
        for name in SOURCES:
            copy_asset(name, tree / "labtrain" / "assets" / name)
        info = tree / f"labtrain-{distribution.version}.dist-info"
        info.mkdir()
        for name in ("METADATA", "WHEEL", "entry_points.txt"):
            (info / name).write_text(distribution.read_text(name) or "")
        (info / "licenses").mkdir()
        (info / "licenses" / "LICENSE").write_text(distribution.read_text("licenses/LICENSE") or "")
        for path in tree.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        command = [sys.executable, "-m", "wheel", "pack", str(tree), "--dest-dir", str(folder)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": ZIP_EPOCH}
        hint = f"df {quoted(folder)}; then repeat the command"
        done = run_program(command, environment=environment, timeout_s=PACK_TIMEOUT_S, hint=hint)
    if done.returncode:
        raise LabtrainError(f"cannot pack the wheel: {done.stderr.strip()}", hint="labtrain doctor")
    return folder / f"labtrain-{distribution.version}-py3-none-any.whl"
