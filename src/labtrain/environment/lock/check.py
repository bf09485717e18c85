"""Compare the locks with their sources and with each other, offline; report all disagreements at once."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from labtrain.base.console import one_line
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.base.files import file_sha256
from labtrain.environment.lock import conda, derive, pixi
from labtrain.environment.lock.files import PROJECT, read_project, read_text, restore
from labtrain.environment.lock.pins import PYTHON_312_LINUX, Pin, parse_pins, read_lock, read_pins
from labtrain.record.identity import LOCK_FILE
from labtrain.record.provenance import normalised


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """One disagreement between locks.

    Attributes:
        file: the lock, or its source.
        what: the package, or the part of the file.
        found: the actual value.
        wanted: the expected value.
    """

    file: str
    what: str
    found: str
    wanted: str


def check_locks(folder: Path) -> list[Disagreement]:
    """Return every disagreement among the locks of a project or an experiment; empty if they agree.

    An unreadable file is a disagreement too, and checks that need it are skipped.

    Raises:
        ConfigError: the folder has no lock.
    """
    if not any((folder / name).exists() for name in (LOCK_FILE, conda.DEFAULT.lock, derive.WHEELS, derive.SEAL)):
        raise ConfigError(
            f"{folder} has no lock files",
            hint=f"cd to an experiment, the folder that has {LOCK_FILE}; or labtrain new NAME",
        )
    found: list[Disagreement] = []
    of_profiles = (partial(check_conda, profile=profile) for profile in conda.PROFILES)
    pins_of_profiles = (partial(check_conda_pins, profile=profile) for profile in conda.PROFILES)
    parts: tuple[Callable[[Path], Iterator[Disagreement]], ...] = (
        check_requirements, check_spec, check_cpu_spec, *of_profiles, *pins_of_profiles, check_profiles, check_wheels,
        check_conda_requirements, check_pixi_manifest, check_pixi, check_own, check_seal,
    )  # fmt: skip
    suspects: set[str] = set()
    for part in parts:
        try:
            for each in part(folder):  # what comes before an unreadable line counts
                found.append(each)
                suspects |= {each.file} if part is check_seal else set()
        except DamagedError as error:
            path, _, text = str(error.args[0]).partition(": ")
            file = str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path
            missing = isinstance(error.__cause__, FileNotFoundError)
            damaged = Disagreement(
                file=file, what="the file", found="missing" if missing else text, wanted="a readable lock"
            )
            if damaged not in found:
                found.append(damaged)
                suspects.add(file)
    # A file whose seal is broken comes first: what other files seem to have wrong may follow from it.
    return sorted(found, key=lambda each: each.file not in suspects)


def check_requirements(folder: Path) -> Iterator[Disagreement]:
    """Check requirements.lock: hashes and no index address; in labtrain's repository also pyproject.toml's pins."""
    text = read_text(folder, LOCK_FILE)
    for address in re.findall(r"^.*(?:://|--(?:extra-)?index-url).*$", text, re.MULTILINE):
        yield Disagreement(
            file=LOCK_FILE, what="an address", found=address.strip()[:60], wanted="names, versions and hashes"
        )
    pins = {pin.name: pin.version for pin in read_pins(folder / LOCK_FILE)}
    for requirement in _project_requirements(folder):
        name = normalised(requirement.name)
        if name not in pins:
            yield Disagreement(file=LOCK_FILE, what=name, found="missing", wanted=f"{requirement} (pyproject.toml)")
        elif not requirement.specifier.contains(pins[name], prereleases=True):
            yield Disagreement(file=LOCK_FILE, what=name, found=pins[name], wanted=f"{requirement} (pyproject.toml)")


def check_spec(folder: Path) -> Iterator[Disagreement]:
    """Check that environment.yml's pins match requirements.lock."""
    pins = {pin.name: pin.version for pin in read_pins(folder / LOCK_FILE)}
    names = {conda_name: name for name, conda_name in conda.CONDA_NAMES.items()} | {"pytorch-gpu": "torch"}
    for dependency in conda.read_spec(folder)["dependencies"]:
        conda_name, version = [*str(dependency).split("="), ""][:2]
        name = names.get(conda_name, normalised(conda_name))
        if version and name in pins and not _fits(version, pins[name]):
            yield Disagreement(file=conda.SPEC, what=conda_name, found=version, wanted=f"{pins[name]} ({LOCK_FILE})")


def _fits(version: str, pin: str) -> bool:
    try:
        return SpecifierSet(f"=={version}").contains(pin, prereleases=True)
    except InvalidSpecifier:
        return False


def check_cpu_spec(folder: Path) -> Iterator[Disagreement]:
    """Check that environment-cpu.yml is derived from today's environment.yml."""
    yield from _differing_lines(folder, conda.CPU.spec, conda.cpu_spec(folder))


def check_conda(folder: Path, *, profile: conda.Profile) -> Iterator[Disagreement]:
    """Check that a conda lock is solved from today's spec and virtual packages, and is complete."""
    lock = conda.read_conda_lock(folder, profile)
    now = derive.sources_digest(folder, profile)
    sealed = derive.read_seal(folder).get(f"{profile.route} {derive.SOURCES}", now)  # labtrain of 2026 sealed none
    if now != sealed:
        what = f"content of {profile.spec} and {conda.VIRTUAL}"
        yield Disagreement(file=profile.lock, what=what, found=sealed[:16], wanted=now[:16])
    for name, found, wanted in conda.wrong_entries(lock["package"]):
        yield Disagreement(file=profile.lock, what=name, found=found, wanted=wanted)


def check_profiles(folder: Path) -> Iterator[Disagreement]:
    """Check that conda-lock-cpu.yml has the packages of conda-lock.yml, apart from the CPU builds of PyTorch."""
    for name, found, wanted in conda.unlike_default(folder):
        yield Disagreement(file=conda.CPU.lock, what=name, found=found, wanted=f"{wanted} ({conda.DEFAULT.lock})")


def check_conda_pins(folder: Path, *, profile: conda.Profile) -> Iterator[Disagreement]:
    """Check a conda lock against each pin and requirement that it has to satisfy.

    These are in its spec, in pyproject.toml, and in the metadata of the packages of requirements-conda.lock. A
    lock has no metadata, so it is read from this environment if the pinned version is installed.
    """
    entries = conda.read_conda_lock(folder, profile)["package"]
    records = conda.records_of(entries)
    for dependency in conda.read_spec(folder, profile)["dependencies"]:
        spec = conda.match_spec(dependency)
        record = records.get(spec.name.normalized) if spec and spec.name else None
        if spec is None or record is None or not spec.matches(record):
            found = str(record.version) if record is not None else "missing"
            yield Disagreement(
                file=profile.lock,
                what=dependency.partition("=")[0],
                found=found,
                wanted=f"{dependency} ({profile.spec})",
            )
    versions = {name: str(record.version) for name, record in records.items()}
    pins = {pin.name: pin for pin in read_pins(folder / derive.CONDA_REQUIREMENTS)}

    def broken(requirements: Iterable[Requirement], whose: str) -> Iterator[Disagreement]:
        for requirement in requirements:
            name = normalised(requirement.name)
            conda_name = normalised(conda.CONDA_NAMES.get(name, name))
            version = versions.get(conda_name) or versions.get(name)
            file = profile.lock
            if version is None and name in pins:
                version, file = pins[name].version, derive.CONDA_REQUIREMENTS
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                yield Disagreement(file=file, what=name, found=version, wanted=f"{requirement} ({whose})")

    if (folder / "pyproject.toml").exists():
        yield from broken(_project_requirements(folder), "pyproject.toml")
    for pin in pins.values():
        yield from broken(_needs_of(pin), f"{pin.name} {pin.version} in {derive.CONDA_REQUIREMENTS}")


def _needs_of(pin: Pin) -> Iterator[Requirement]:
    """Yield a package's requirements in the conda environment; nothing if that version is not installed here."""
    try:
        installed = metadata.distribution(pin.name)
    except metadata.PackageNotFoundError:
        return
    if installed.version != pin.version:
        return
    for line in installed.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({**PYTHON_312_LINUX, "extra": ""}):
            yield requirement


def check_wheels(folder: Path) -> Iterator[Disagreement]:
    """Check nix/wheels.json: one file for each package of requirements.lock, with its hash."""
    pins = read_lock(folder / LOCK_FILE, PYTHON_312_LINUX)
    entries = derive.read_wheels(folder)
    for entry in entries:
        pin = pins.pop(entry["name"], None)
        if pin is None:
            yield Disagreement(
                file=derive.WHEELS, what=entry["name"], found=entry["version"], wanted=f"not in {LOCK_FILE}"
            )
        elif derive.hex_digest(entry["hash"]) not in pin.hashes:
            yield Disagreement(
                file=derive.WHEELS, what=entry["name"], found=entry["hash"], wanted=f"a hash of {LOCK_FILE}"
            )
    for pin in pins.values():
        yield Disagreement(file=derive.WHEELS, what=pin.name, found="missing", wanted=pin.version)


def check_conda_requirements(folder: Path) -> Iterator[Disagreement]:
    """Check that requirements-conda.lock has exactly the packages that conda-lock.yml lacks."""
    wanted = {pin.name: pin for pin in parse_pins(derive.conda_requirements(folder), folder / LOCK_FILE)}
    found = {pin.name: pin for pin in read_pins(folder / derive.CONDA_REQUIREMENTS)}
    for name in sorted(set(wanted) | set(found)):
        if name not in found or name not in wanted:
            state = (
                ("missing", wanted[name].version)
                if name in wanted
                else (found[name].version, f"not needed with {conda.DEFAULT.lock}")
            )
            yield Disagreement(file=derive.CONDA_REQUIREMENTS, what=name, found=state[0], wanted=state[1])
        elif found[name].text != wanted[name].text:
            hint = f"{wanted[name].version} with the hashes of {LOCK_FILE}"
            yield Disagreement(
                file=derive.CONDA_REQUIREMENTS, what=name, found=f"{found[name].version}, other lines", wanted=hint
            )


def check_pixi_manifest(folder: Path) -> Iterator[Disagreement]:
    """Check that pixi.toml is derived from today's environment.yml."""
    yield from _differing_lines(folder, pixi.MANIFEST, pixi.manifest(folder))


def check_pixi(folder: Path) -> Iterator[Disagreement]:
    """Check that pixi.lock has the packages of the conda locks, with their hashes, and nothing else."""
    lock = pixi.read_pixi_lock(folder)
    wanted = pixi.wanted_entries(folder)
    lists = {name: (pixi.locked_urls(lock, name), set(wanted[name])) for name in pixi.ENVIRONMENTS}
    entries = {url: entry for by_url in wanted.values() for url, entry in by_url.items()}
    lists["packages"] = ([entry["conda"] for entry in lock["packages"]], set(entries))
    for where, (found, expected) in lists.items():
        for url, count in sorted((Counter(found) - Counter(expected)).items()):
            state = (f"{count + 1} times", f"once in {where}") if url in expected else (url, f"not in {where}")
            yield Disagreement(file=pixi.LOCK, what=_name_in(url), found=state[0], wanted=state[1])
        for url in sorted(expected - set(found)):
            yield Disagreement(file=pixi.LOCK, what=_name_in(url), found=f"missing in {where}", wanted=url)
    for entry in lock["packages"]:
        for kind, digest in (entries.get(entry["conda"], {}).get("hash") or {}).items():
            if entry.get(kind) != digest:
                found_digest = f"{kind} {entry.get(kind)}"
                yield Disagreement(
                    file=pixi.LOCK, what=_name_in(entry["conda"]), found=found_digest, wanted=f"{digest} (conda)"
                )


def check_own(folder: Path) -> Iterator[Disagreement]:
    """Check in an experiment that the wheel in vendor/ has the hash in labtrain.lock."""
    if (own := derive.own_wheel(folder)) is None:
        return
    wheel, sha256 = own
    found = file_sha256(folder / wheel) if (folder / wheel).is_file() else "missing"
    if found != sha256:
        yield Disagreement(file=derive.OWN_LOCK, what=wheel, found=found, wanted=sha256)


def check_seal(folder: Path) -> Iterator[Disagreement]:
    """Check that sbom.cdx.json seals every package of every lock, and itself by its serial number."""
    sealed = derive.read_seal(folder)
    document = json.loads(read_text(folder, derive.SEAL))
    number, expected = str(document.get("serialNumber")), derive.serial_number(document)
    if number != expected:
        yield Disagreement(file=derive.SEAL, what="serialNumber", found=number, wanted=f"{expected}, of its content")
    files = {"wheels": LOCK_FILE, "nix": derive.WHEELS, "pixi": pixi.LOCK}
    files |= {profile.route: profile.lock for profile in conda.PROFILES}
    now = derive.seal(folder)
    for key in sorted(set(now) | set(sealed)):
        route, _, name = key.partition(" ")
        if name == derive.SOURCES:  # check_conda's
            continue
        file = derive.FLAKE_LOCK if key == "nix nixpkgs" else files.get(route, derive.SEAL)
        if key not in sealed:
            yield Disagreement(file=file, what=name, found="an entry", wanted=f"no entry, as in {derive.SEAL}")
        elif key not in now:
            yield Disagreement(file=file, what=name, found="no entry", wanted=f"the entry in {derive.SEAL}")
        elif now[key] != sealed[key]:
            yield Disagreement(
                file=file, what=name, found=now[key][:12], wanted=f"{sealed[key][:12]}, its seal in {derive.SEAL}"
            )


def _differing_lines(folder: Path, file: str, wanted: str) -> Iterator[Disagreement]:
    """Yield each line of a derived file that differs, under the name in it."""
    try:
        found = (folder / file).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{folder / file}: {error}", hint="labtrain lock write") from error
    before, after = found.splitlines(keepends=True), wanted.splitlines(keepends=True)
    for kind, start, end, first, last in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        for was, expected in itertools.zip_longest(before[start:end], after[first:last], fillvalue=""):
            name = re.search(r"[A-Za-z_][\w-]*", expected or was)
            yield Disagreement(
                file=file,
                what=name.group() if name else f"line {start + 1}",
                found=repr(was) if was else "missing",
                wanted=repr(expected) if expected else "no such line",
            )


def _name_in(url: str) -> str:
    """Return the package's name in the address of its file."""
    return url.rpartition("/")[2].rsplit("-", 2)[0]


def _project_requirements(folder: Path) -> list[Requirement]:
    project = read_project(folder)
    found: list[Requirement] = []
    try:
        extras: dict[str, list[str]] = project.get("optional-dependencies", {})
        for line in [*project.get("dependencies", []), *itertools.chain(*extras.values())]:
            found.append(Requirement(line))
    except (InvalidRequirement, AttributeError, TypeError) as error:
        what = f"{line!r}: " if isinstance(error, InvalidRequirement) else "dependencies: "
        text = one_line(str(error).partition("\n")[0])
        raise DamagedError(f"{folder / PROJECT}: {what}{text}", hint=restore(PROJECT)) from error
    return found
