"""The labtrain that an experiment carries (vendor/, named in labtrain.lock), and what it made: the base of an update.

Nothing of it is installed. Its template is rendered again with the experiment's own name and author, and the files that
it copied in are taken from its wheel.
"""

import json
import re
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import Version

from labtrain.base.console import quoted
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.files import file_sha256
from labtrain.base.programs import run_program
from labtrain.bootstrap import WHEEL_LOCK
from labtrain.environment.lock.derive import own_wheel

ASSETS = "labtrain/assets"
TIMEOUT_S = 60  # it takes 0.05 s
# Standard library only: -S leaves out site-packages, so the wheel cannot import torch.
LIST_CARRIED = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); from labtrain.assets import LOCKS; print(json.dumps(LOCKS))"
)
VALUE = "labtrain0{}0value"  # stands for a variable of the template; a valid name, too
Values = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Carried:
    """An experiment's own labtrain.

    Attributes:
        root: the experiment's folder.
        wheel: path of the wheel in the experiment.
        sha256: of the wheel; checked.
        version: of this labtrain.
    """

    root: Path
    wheel: str
    sha256: str
    version: Version


def find_experiment(folder: Path) -> Path:
    """Return the experiment's folder: the nearest one with a labtrain.lock, upwards from a folder.

    Raises:
        ConfigError: there is none.
    """
    here = folder.resolve()
    for each in (here, *here.parents):
        if (each / WHEEL_LOCK).is_file():
            return each
    for each in (here, *here.parents):
        if (each / "train.py").is_file():
            another = quoted(each.with_name(f"{each.name}2"))
            raise ConfigError(
                f"{each} has no {WHEEL_LOCK}: nothing says which labtrain made this experiment",
                hint=f"make a new one and copy your files into it: labtrain new {another}",
            )
    raise ConfigError(f"{here} is not in an experiment", hint="cd to an experiment; labtrain new NAME makes one")


def read_carried(root: Path) -> Carried:
    """Return the labtrain that an experiment carries, after a check of its sha256.

    Raises:
        DamagedError: the wheel is missing, or is not the one in labtrain.lock.
    """
    found = own_wheel(root)
    assert found is not None, "find_experiment has seen labtrain.lock"
    path, sha256 = found
    hint = f"git checkout {WHEEL_LOCK} vendor"
    try:
        _, version, *_ = parse_wheel_filename(Path(path).name)
        if not (root / path).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{path} is outside the experiment")
        actual = file_sha256(root / path)
    except ValueError as error:
        raise DamagedError(f"{root / WHEEL_LOCK}: {error}", hint=hint) from error
    except OSError as error:
        raise DamagedError(f"{root / path}: {error.strerror}; {WHEEL_LOCK} names it", hint=hint) from error
    if actual != sha256:
        raise DamagedError(
            f"{root / path} is not the wheel in {WHEEL_LOCK}: its sha256 is {actual[:12]}, expected {sha256[:12]}",
            hint=hint,
        )
    return Carried(root=root, wheel=path, sha256=sha256, version=version)


def make_base(carried: Carried, scratch: Path) -> tuple[Path, Values]:
    """Make the experiment again as its own labtrain made it.

    Args:
        carried: the experiment's labtrain.
        scratch: an empty folder, to write to.

    Returns:
        The folder, and the template's values: name, author.

    Raises:
        LabtrainError: the wheel has no template, or it cannot be rendered.
        OSError: `scratch` cannot be written, for example on a full disk.
    """
    wheel = carried.root / carried.wheel
    try:
        _unpack(wheel, scratch / "wheel")
        variables = json.loads((scratch / "wheel" / ASSETS / "template" / "cookiecutter.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedError(
            f"{wheel} has no template that can be read: {error}",
            hint="make a new experiment and copy your files into it: labtrain new NAME",
        ) from error
    assets = scratch / "wheel" / ASSETS
    names = [name for name, value in variables.items() if isinstance(value, str) and not name.startswith("_")]
    marked = render(assets / "template", {name: VALUE.format(name) for name in names}, scratch / "marked")
    values = recovered(marked, carried.root, names)
    if Path(values.get("name", "")).name != values.get("name"):  # none is left, or it could not name a folder
        values["name"] = carried.root.name
    base = render(assets / "template", values, scratch / "base")
    for name in _carried_names(wheel):
        source, target = assets / name, base / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copyfile(source, target)
    (base / carried.wheel).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(wheel, base / carried.wheel)
    shutil.copyfile(carried.root / WHEEL_LOCK, base / WHEEL_LOCK)
    return base, values


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(f"{ASSETS}/")])


def _carried_names(wheel: Path) -> list[str]:
    """Return the names of the assets that this labtrain copies into an experiment."""
    command = [sys.executable, "-I", "-S", "-B", "-c", LIST_CARRIED, str(wheel)]
    done = run_program(command, timeout_s=TIMEOUT_S, hint="labtrain doctor", folder=wheel.parent)
    try:
        return list(map(str, json.loads(done.stdout)))
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{wheel}: cannot list the files that it copies into an experiment: {done.stderr.strip()[-300:]}",
            hint="make a new experiment and copy your files into it: labtrain new NAME",
        ) from error


def render(template: Path, values: Values, folder: Path) -> Path:
    """Render a template without its hooks; return the rendered folder.

    Raises:
        LabtrainError: cookiecutter refuses the template.
        OSError: `folder` cannot be written.
    """
    from cookiecutter.exceptions import CookiecutterException
    from cookiecutter.main import cookiecutter

    folder.mkdir()
    config = folder.with_suffix(".yaml")
    places = {"replay_dir": f"{folder}.replay", "cookiecutters_dir": f"{folder}.templates"}
    config.write_text(json.dumps(places))  # also YAML; without it cookiecutter writes to the home directory
    try:
        return Path(
            cookiecutter(
                str(template),
                no_input=True,
                extra_context=values,
                output_dir=str(folder),
                config_file=str(config),
                accept_hooks=False,
            )
        )
    except CookiecutterException as error:
        raise LabtrainError(f"the template {template} cannot be rendered: {error}", hint="labtrain doctor") from error


def recovered(marked: Path, experiment: Path, names: list[str]) -> Values:
    """Return the values that a template was rendered with, as far as the experiment's files still tell them.

    Each line of the template with a variable is searched for in the experiment's file. Lines vote for the value that
    they have there, a line with more text for more.

    Args:
        marked: the template, rendered with VALUE for each variable.
        experiment: the experiment.
        names: of the variables.
    """
    votes: dict[str, Counter[str]] = {name: Counter() for name in names}
    for path in sorted(marked.rglob("*")):
        own = experiment / path.relative_to(marked)
        text = _text(path)
        if not any(VALUE.format(name) in text for name in names) or not own.is_file():
            continue
        for pattern, weight in _patterns(text, names):
            for found in pattern.finditer(_text(own)):
                for name, value in found.groupdict().items():
                    votes[name][value] += weight
    return {name: found.most_common(1)[0][0] for name, found in votes.items() if found}


def _patterns(text: str, names: list[str]) -> Iterator[tuple[re.Pattern[str], int]]:
    """Yield a pattern for each line with a variable, and the number of characters beside variables."""
    for line in text.splitlines():
        pattern, weight = re.escape(line), len(line)
        for name in names:
            mark = VALUE.format(name)
            weight -= line.count(mark) * len(mark)
            pattern = pattern.replace(mark, f"(?P<{name}>.+)", 1).replace(mark, f"(?P={name})")
        if pattern != re.escape(line):
            yield re.compile(f"^{pattern}$", re.MULTILINE), weight


def _text(path: Path) -> str:
    try:
        return path.read_text() if path.is_file() else ""
    except ValueError:  # not text
        return ""
