"""Tell which releases are newer than the locked ones, and raise pins. Both ask the package index, through uv."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement

from labtrain.base.console import few
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import write_atomically
from labtrain.environment.lock import conda
from labtrain.environment.lock.check import check_locks, check_spec
from labtrain.environment.lock.files import PROJECT, read_project, read_text
from labtrain.environment.lock.pins import read_lock, read_pins, require_locks
from labtrain.environment.lock.write import (
    is_labtrain,
    labtrains_packages,
    resolver_inputs,
    run_tool,
    write_locks,
)
from labtrain.record.identity import LOCK_FILE
from labtrain.record.provenance import normalised

RESOLVE = ("pip", "compile", "--no-header", "--no-emit-index-url", "--quiet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Newer:
    """Releases of a package that pyproject.toml names.

    Attributes:
        name: of the package.
        locked: the version in requirements.lock; empty if it is not there.
        allowed: the newest version that pyproject.toml and the other packages allow.
        newest: the newest version in the index for this Python.
    """

    name: str
    locked: str
    allowed: str
    newest: str


def newer_releases(folder: Path) -> list[Newer]:
    """Return the releases of each package that pyproject.toml names, in its order. Changes nothing.

    Raises:
        LabtrainError: the index cannot be reached, or no versions fit together.
    """
    require_locks(folder)
    names = list(dict.fromkeys(normalised(each.name) for each in _requirements(folder)))
    if not names:
        return []
    locked = {name: pin.version for name, pin in read_lock(folder / LOCK_FILE).items()}
    with resolver_inputs(folder) as inputs, tempfile.TemporaryDirectory() as scratch:
        bare, found = Path(scratch) / "names.in", Path(scratch) / "found.txt"
        bare.write_text("".join(f"{name}\n" for name in names))
        run_tool(folder, "uv", *RESOLVE, "--no-deps", str(bare), "-o", str(found))
        newest = _versions(found.read_text())
        found.unlink()
        run_tool(folder, "uv", *RESOLVE, "--universal", "--upgrade", *inputs, "-o", str(found))
        allowed = _versions(found.read_text())
    return [
        Newer(name=name, locked=locked.get(name, ""), allowed=allowed.get(name, ""), newest=newest.get(name, ""))
        for name in names
    ]


def _requirements(folder: Path) -> Iterator[Requirement]:
    """Yield what pyproject.toml requires: in labtrain's repository with the extras that are locked."""
    return (Requirement(line) for line in _lines(folder))


def _lines(folder: Path) -> list[str]:
    project = read_project(folder)
    extras = project.get("optional-dependencies", {}) if is_labtrain(folder) else {}
    return [*project.get("dependencies", []), *(line for lines in extras.values() for line in lines)]


def _versions(text: str) -> dict[str, str]:
    """Return name and version of each pin of uv's that applies to this Python."""
    pins = re.findall(r"^([\w.-]+)(?:\[.*?\])?==(\S+)(?: ; (.+))?$", text, re.MULTILINE)
    return {normalised(name): version for name, version, marker in pins if not marker or Marker(marker).evaluate()}


# ------------------------------------------------------------------------------------------------------- raise pins


def check_packages(folder: Path, packages: Sequence[str]) -> None:
    """Raise ConfigError if one of the packages to raise cannot be raised here: NAME or NAME==VERSION."""
    require_locks(folder)
    own = {normalised(each.name) for each in _requirements(folder)}
    pinned = {pin.name for pin in read_pins(folder / LOCK_FILE)}
    kept = set[str]() if is_labtrain(folder) else labtrains_packages()
    for text in packages:
        name = normalised(_parsed(text).name)
        if name in kept:
            raise ConfigError(
                f"{name} is one of labtrain's own packages, whose pins an experiment keeps",
                hint="labtrain update brings a newer labtrain with its pins",
            )
        if name not in pinned:
            listed = few(sorted(own)) or "no package"
            raise ConfigError(
                f"{name} is not in {LOCK_FILE}; {PROJECT} names {listed}",
                hint=f'add "{text}" to the dependencies in {PROJECT}, then: labtrain lock write',
            )


def _parsed(text: str) -> Requirement:
    """Return NAME or NAME==VERSION as a requirement.

    Raises:
        ConfigError: it is neither.
    """
    hint = "--package einops, or --package einops==0.8.1"
    try:
        found = Requirement(text)
    except InvalidRequirement as error:
        raise ConfigError(f"--package {text}: must be NAME or NAME==VERSION", hint=hint) from error
    if found.url or found.marker or found.extras or not re.fullmatch(r"(==[^,*]+)?", str(found.specifier)):
        raise ConfigError(f"--package {text}: must be NAME or NAME==VERSION", hint=hint)
    return found


def raise_pins(folder: Path, packages: Sequence[str] = ()) -> Iterator[str]:
    """Raise pins of a project, write all locks, and yield a line for each lock.

    A version that pyproject.toml does not allow is written there, too. If environment.yml names a raised version, it
    is changed, and the conda locks are solved again.

    Args:
        folder: labtrain's repository, or an experiment, whose own packages are raised.
        packages: NAME or NAME==VERSION; none: all that pyproject.toml allows.

    Raises:
        LabtrainError: no versions fit together, the index or conda's channel cannot be reached, or the new locks
            disagree.
    """
    check_packages(folder, packages)
    for text in packages:
        _allow(folder, _parsed(text))
    yield from write_locks(folder, upgrade=not packages, packages=packages)
    if raise_spec(folder):
        yield f"{conda.SPEC}: changed, so the conda locks are solved again"
        try:
            yield from write_locks(folder)
        except LabtrainError as error:
            hint = f"run it with access to conda-forge: {conda.SPEC} names a raised version; or raise another --package"
            raise LabtrainError(str(error.args[0]), hint=hint) from error
    if wrong := check_locks(folder):
        listed = few([f"{each.file}: {each.what} {each.found}, expected {each.wanted}" for each in wrong], 4)
        raise LabtrainError(f"the new locks disagree: {listed}", hint=f"change {PROJECT} and {conda.SPEC} together")


def _allow(folder: Path, wanted: Requirement) -> None:
    """Pin a version in pyproject.toml if that does not allow it.

    Raises:
        ConfigError: pyproject.toml has the requirement in a form that cannot be replaced.
    """
    for line in dict.fromkeys(_lines(folder)):
        found = Requirement(line)
        version = str(wanted.specifier).removeprefix("==")
        same = normalised(found.name) == normalised(wanted.name)
        if not same or not version or found.specifier.contains(version, prereleases=True):
            continue
        found.specifier = wanted.specifier
        text = read_text(folder, PROJECT)
        quote = next((each for each in "\"'" if f"{each}{line}{each}" in text), "")
        if not quote:
            raise ConfigError(f"{PROJECT}: cannot replace {line}", hint=f"change it to {found}, commit, and repeat")
        write_atomically(folder / PROJECT, text.replace(f"{quote}{line}{quote}", f"{quote}{found}{quote}"))


def raise_spec(folder: Path) -> bool:
    """Bring the versions in environment.yml up to requirements.lock; return whether it changed.

    A version keeps its precision: 2.6.* becomes 2.7.*.
    """
    before = text = read_text(folder, conda.SPEC)
    for each in check_spec(folder):
        version = each.wanted.partition(" ")[0]
        if each.found.endswith(".*"):
            version = ".".join(version.split(".")[: each.found.count(".")]) + ".*"
        spec = re.compile(rf"^(\s*-\s*{re.escape(each.what)}=){re.escape(each.found)}(?=[=\s]|$)", re.MULTILINE)
        text = spec.sub(rf"\g<1>{version}", text)
    if text != before:
        write_atomically(folder / conda.SPEC, text)
    return text != before


def changed_pins(before: Path, after: Path) -> list[str]:
    """Return what changed between two requirements.lock, a line for each package."""
    was, now = _versions_in(before), _versions_in(after)
    return [
        f"{name} {was.get(name, '(none)')} -> {now.get(name, '(none)')}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    ]


def _versions_in(lock: Path) -> dict[str, str]:
    """Return the version of each package, or its versions if they depend on Python's."""
    found = defaultdict[str, set[str]](set)
    for pin in read_pins(lock):
        found[pin.name].add(pin.version)
    return {name: "/".join(sorted(versions)) for name, versions in found.items()}
