"""Make an experiment: the cookiecutter template, and beside it the lock and the very labtrain that made it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from labtrain.assets import LOCKS, SOURCES, asset
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import file_sha256
from labtrain.bootstrap import WHEEL_LOCK

PLUGIN = "hydra_plugins/labtrain_searchpath.py"  # beside labtrain, in a folder that other distributions share
ZIP_EPOCH = "315532800"  # 1980-01-01, the first day that a zip file can name: the same wheel from the same files
SKIPPED = ("__pycache__", "*.pyc")


def make_experiment(target: Path, *, author: str) -> None:
    """Make the experiment `target`, named by its last part.

    Raises:
        ConfigError: the folder exists, cannot be written, or its name is no identifier; nothing is left.
    """
    from cookiecutter.exceptions import CookiecutterException, FailedHookException
    from cookiecutter.main import cookiecutter

    target = target.resolve()
    if target.exists():
        raise ConfigError(f"{target} exists already", hint=f"labtrain new {target.name}2, or remove it first")
    if not target.name.isidentifier() or not target.name.isascii():
        raise ConfigError(
            f"{target.name!r} is no identifier: letters, digits and _ are, a digit not first",
            hint="labtrain new digits",
        )
    missing = target.parent
    while not missing.exists():
        missing = missing.parent
    if not os.access(missing, os.W_OK | os.X_OK):
        raise ConfigError(f"{missing}: no write permission", hint=f"ls -ld {missing}")
    with tempfile.TemporaryDirectory() as scratch:
        # cookiecutter would leave its replay files in the home directory, and its rendered hooks in the temporary one
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
                f"{target}: the experiment could not be made", hint="the lines above say why"
            ) from error
        except (CookiecutterException, OSError) as error:
            raise LabtrainError(f"{target}: {error}", hint=f"ls -ld {target.parent}") from error
        finally:
            tempfile.tempdir = before


def furnish(experiment: Path) -> None:
    """Copy the locks into an experiment, this labtrain's wheel into `vendor/`, and its hash into labtrain.lock."""
    for name in LOCKS:
        copy_asset(name, experiment / name)
    wheel = build_wheel(experiment / "vendor")
    digest = file_sha256(wheel)
    (experiment / WHEEL_LOCK).write_text(f"./vendor/{wheel.name} --hash=sha256:{digest}\n")


def copy_asset(name: str, target: Path) -> None:
    """Copy an asset, a file or a folder, to `target`."""
    source = asset(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*SKIPPED))
    else:
        shutil.copyfile(source, target)


def build_wheel(folder: Path) -> Path:
    """Pack the labtrain that runs into a wheel in `folder`: the same bytes from a clone and from an installed wheel.

    Raises:
        LabtrainError: labtrain runs without being installed.
    """
    try:
        distribution = importlib.metadata.distribution("labtrain")
    except importlib.metadata.PackageNotFoundError as error:
        raise LabtrainError(
            "labtrain is not installed, so it cannot be packed into an experiment", hint="make setup"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(Path(__file__).parents[1], tree / "labtrain", ignore=shutil.ignore_patterns("assets", *SKIPPED))
        (tree / "hydra_plugins").mkdir()
        shutil.copyfile(Path(__file__).parents[2] / PLUGIN, tree / PLUGIN)
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
        done = subprocess.run(
            command, env={**os.environ, "SOURCE_DATE_EPOCH": ZIP_EPOCH}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise LabtrainError(f"the wheel could not be packed: {done.stderr.strip()}", hint="labtrain doctor")
    return folder / f"labtrain-{distribution.version}-py3-none-any.whl"
