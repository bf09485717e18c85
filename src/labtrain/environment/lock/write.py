"""Write the derived locks again: of wheels, Nix, conda and pixi, and the seal."""

import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from labtrain.assets import asset
from labtrain.base.console import few
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.files import write_atomically
from labtrain.base.programs import run_program
from labtrain.environment.lock import conda, derive, pixi
from labtrain.environment.lock.files import read_project, read_text
from labtrain.environment.lock.pins import PYTHON_312_LINUX, Pin, parse_pins, read_lock, read_pins
from labtrain.record.identity import LOCK_FILE

if TYPE_CHECKING:
    from packageurl import PackageURL

COMPILE = ("--universal", "--generate-hashes", "--no-emit-index-url", "--no-header", "--quiet")
TIMEOUT_S = 3600  # uv takes seconds, and conda-lock minutes, unless the network hangs
WRITTEN = (LOCK_FILE, conda.DEFAULT.lock, conda.CPU.spec, conda.CPU.lock, derive.WHEELS, derive.CONDA_REQUIREMENTS,
           pixi.MANIFEST, pixi.LOCK, derive.SEAL)  # fmt: skip


def write_locks(folder: Path, *, upgrade: bool = False, packages: Sequence[str] = ()) -> Iterator[str]:
    """Write each derived lock, and yield a line for each. If one fails, all stay as they were.

    Args:
        folder: labtrain's repository, or an experiment. Both have pyproject.toml.
        upgrade: use the newest releases that pyproject.toml allows; else keep pins that still fit. An experiment keeps
            labtrain's pins in any case.
        packages: use the newest releases of these packages only, or the named ones: NAME or NAME==VERSION.

    Raises:
        LabtrainError: a tool failed, or the conda spec changed and no channel can be reached.
    """
    if not (folder / "pyproject.toml").exists() or not (folder / conda.SPEC).exists():
        hint = "cd to an experiment, or to labtrain's repository"
        raise ConfigError(f"{folder} must have pyproject.toml and {conda.SPEC} to resolve from", hint=hint)
    with _all_or_nothing(folder), resolver_inputs(folder) as inputs:
        path = folder / LOCK_FILE
        before = read_text(folder, LOCK_FILE) if path.exists() else ""
        options = [*COMPILE, *(["--upgrade"] if upgrade else []), *(f"--upgrade-package={each}" for each in packages)]
        run_tool(folder, "uv", "pip", "compile", *options, *inputs, "-o", LOCK_FILE)
        if same := parse_pins(before, path) == read_pins(path):
            write_atomically(path, before)  # runs are named by the text, and its comments may differ
        yield f"{LOCK_FILE}: {'unchanged' if same else 'resolved again'}"
        write_atomically(folder / conda.CPU.spec, conda.cpu_spec(folder))
        for profile in conda.PROFILES:
            yield f"{profile.lock}: {'solved again' if lock_conda(folder, profile) else 'unchanged'}"
        wheels = choose_wheels(folder, inputs)
        (folder / derive.WHEELS).parent.mkdir(exist_ok=True)
        write_atomically(folder / derive.WHEELS, "[\n" + ",\n".join(json.dumps(entry) for entry in wheels) + "\n]\n")
        yield f"{derive.WHEELS}: {len(wheels)} files"
        text = derive.conda_requirements(folder)
        write_atomically(folder / derive.CONDA_REQUIREMENTS, text)
        yield f"{derive.CONDA_REQUIREMENTS}: {text.count('==')} packages"
        yield lock_pixi(folder)
        write_atomically(folder / derive.SEAL, sbom(folder))
        yield f"{derive.SEAL}: {len(derive.read_seal(folder))} entries"


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """Restore all locks if one of them cannot be written."""
    before = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in WRITTEN}
    try:
        yield
    except BaseException as error:
        for name, content in before.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(content)
        if isinstance(error, LabtrainError):
            error.args = (f"{error.args[0]}. No lock was changed", *error.args[1:])
        raise


@contextmanager
def resolver_inputs(folder: Path) -> Iterator[list[str]]:
    """Yield what uv resolves: labtrain's extras; in an experiment labtrain's pins, and the packages of its own.

    The pins are those that the experiment has, of the packages in this labtrain's own lock. So a package that was taken
    out of pyproject.toml leaves the lock, and no other pin changes.
    """
    if is_labtrain(folder):
        yield ["--extra", "train", "--extra", "lab", "--extra", "dev", "pyproject.toml"]
        return
    of_labtrain = labtrains_packages()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "labtrain.in"
        lock = folder / LOCK_FILE if (folder / LOCK_FILE).exists() else asset(LOCK_FILE)
        base.write_text("".join(_line(pin) for pin in read_pins(lock) if pin.name in of_labtrain))
        yield ["--no-annotate", str(base), "pyproject.toml"]


def is_labtrain(folder: Path) -> bool:
    """Return whether a project is labtrain's repository; else it is an experiment."""
    return {"train", "lab", "dev"} <= set(read_project(folder).get("optional-dependencies", {}))


def labtrains_packages() -> set[str]:
    """Return the names in this labtrain's own lock, whose pins an experiment keeps."""
    return {pin.name for pin in read_pins(asset(LOCK_FILE))}


def _line(pin: Pin) -> str:
    return f"{pin.name}=={pin.version}{f' ; {pin.marker}' if pin.marker else ''}\n"


def choose_wheels(folder: Path, inputs: Sequence[str]) -> list[dict[str, object]]:
    """Return the entries of wheels.json, sorted by name.

    A lock with hashes has no file names. uv writes them to a pylock.toml, which is deleted because it names hosts.

    Args:
        folder: with requirements.lock.
        inputs: what uv resolves.
    """
    pins = read_pins(folder / LOCK_FILE)
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("".join(map(_line, pins)))
        _refuse_unknown_hashes(folder, inputs, constraints, pins)
        listing = Path(scratch) / "pylock.toml"
        options = ["--universal", "--no-header", "--quiet", "--format", "pylock.toml", *inputs]
        run_tool(folder, "uv", "pip", "compile", *options, "-c", str(constraints), "-o", str(listing))
        packages = tomllib.loads(listing.read_text())["packages"]
    files = {
        (package["name"], package["version"]): [
            (file["url"].rpartition("/")[2], file["hashes"]["sha256"])
            for file in [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        ]
        for package in packages
    }
    chosen = read_lock(folder / LOCK_FILE, PYTHON_312_LINUX)
    return [
        derive.wheel_entry(pin, *derive.choose_file(pin, files.get((pin.name, pin.version), [])))
        for _, pin in sorted(chosen.items())
    ]


def _refuse_unknown_hashes(folder: Path, inputs: Sequence[str], constraints: Path, pins: Sequence[Pin]) -> None:
    """Raise DamagedError if a hash in requirements.lock is of no file: uv keeps the hashes that a lock has."""
    fresh = constraints.with_name(LOCK_FILE)
    run_tool(folder, "uv", "pip", "compile", *COMPILE, *inputs, "-c", str(constraints), "-o", str(fresh))
    known = {(pin.name, pin.version): set(pin.hashes) for pin in read_pins(fresh)}
    for pin in pins:
        if unknown := sorted(set(pin.hashes) - known.get((pin.name, pin.version), set())):
            what = f"{LOCK_FILE}: no file of {pin.name} {pin.version} has the hash {unknown[0]}"
            raise DamagedError(what, hint=f"git checkout {LOCK_FILE}: it was changed by hand")


def sbom(folder: Path) -> str:
    """Return sbom.cdx.json: a CycloneDX 1.6 document of every package of every route, by CycloneDX's library.

    https://cyclonedx.org/docs/1.6/json/. The same locks give the same text: no time, a serial number from the content.
    """
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    sealed, packages = derive.seal(folder), _packages(folder)
    bom = Bom()
    for key, digest in sealed.items():
        route, name, *_ = key.split(" ")
        purl, hashes = packages.get(key, (None, []))
        component = Component(
            type=ComponentType.LIBRARY,
            name=purl.name if purl and route == "pixi" else name,
            version=purl.version if purl else None,
            purl=purl,
            bom_ref=key,
            hashes=[HashType.from_composite_str(text) for text in hashes],
            properties=[Property(name="labtrain:route", value=route), Property(name="labtrain:seal", value=digest)],
        )
        bom.components.add(component)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document.get("metadata", {}).pop("timestamp", None)
    document["serialNumber"] = derive.serial_number(document)
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _packages(folder: Path) -> dict[str, tuple["PackageURL", list[str]]]:
    """Return the package URL and the hashes of each package, by its key in the seal."""
    from packageurl import PackageURL

    found: dict[str, tuple[PackageURL, list[str]]] = {}
    for pin in read_pins(folder / LOCK_FILE):
        found[f"wheels {pin.name} {pin.version}"] = (PackageURL("pypi", None, pin.name, pin.version), [])
    for profile in conda.PROFILES:
        for entry in conda.read_conda_lock(folder, profile)["package"]:
            purl = PackageURL("conda", None, entry["name"], str(entry["version"]), {"channel": "conda-forge"})
            hashes = [f"{kind}:{value}" for kind, value in entry["hash"].items()]
            found[f"{profile.route} {entry['name']}"] = (purl, hashes)
            found[f"pixi {entry['url'].rpartition('/')[2]}"] = (purl, hashes)
    for entry in derive.read_wheels(folder):
        purl = PackageURL("pypi", None, entry["name"], entry["version"], {"route": "nix"})
        found[f"nix {entry['name']}"] = (purl, [f"sha256:{derive.hex_digest(entry['hash'])}"])
    return found


def lock_conda(folder: Path, profile: conda.Profile) -> bool:
    """Solve a conda lock again if its sources changed; return whether it was solved.

    The cpu profile keeps the versions and builds of the default one, which its solver gets as pins.

    Raises:
        LabtrainError: the lock is damaged, or no channel can be reached.
    """
    environment = dict(os.environ)
    if (folder / profile.lock).exists():
        lock = conda.read_conda_lock(folder, profile)
        if conda.content_hash(folder, profile) == conda.locked_hash(lock):
            for name, found, expected in conda.wrong_entries(lock["package"]):
                what = f"{profile.lock}: {name}: found {found}, expected {expected}"
                raise DamagedError(what, hint=f"git checkout {profile.lock}")
            if profile == conda.DEFAULT or not list(conda.unlike_default(folder)):
                return False
    if profile == conda.CPU:
        kept = [entry for entry in conda.read_conda_lock(folder)["package"] if entry["name"] not in conda.BUILT_TWICE]
        builds = [f"{entry['name']}={entry['version']}={conda.build_of(entry)}" for entry in kept]
        environment["CONDA_PINNED_PACKAGES"] = "&".join(builds)
    with tempfile.TemporaryDirectory() as scratch:
        virtual = Path(scratch) / conda.VIRTUAL
        virtual.write_text(yaml.safe_dump(conda.virtual_packages(folder, profile), sort_keys=False))
        options = ["-f", profile.spec, "--virtual-package-spec", str(virtual), "-p", conda.PLATFORM,
                   "--lockfile", profile.lock]  # fmt: skip
        try:
            run_tool(folder, "conda-lock", "lock", *options, environment=environment)
        except LabtrainError as error:
            what = f"{profile.lock} does not fit {profile.spec} or {conda.VIRTUAL}, and could not be solved again"
            raise LabtrainError(
                f"{what}: {error.args[0]}",
                hint="run it with access to conda-forge, or git checkout the file that changed",
            ) from error
    if profile == conda.CPU and (unlike := [name for name, *_ in conda.unlike_default(folder)]):
        raise LabtrainError(
            f"{profile.lock}: the solver chose other builds than {conda.DEFAULT.lock} of {few(unlike)}",
            hint="use conda as conda-lock's solver: it is the one that reads CONDA_PINNED_PACKAGES",
        )
    return True


def lock_pixi(folder: Path) -> str:
    """Write pixi.toml and pixi.lock, and return a line about them."""
    try:
        sealed, lock = derive.read_seal(folder), pixi.read_pixi_lock(folder)
        changed = {key.removeprefix("pixi ") for key, digest in derive.seal_pixi(lock).items()
                   if sealed.get(key, digest) != digest}  # fmt: skip
    except DamagedError:
        changed = set()
    text = pixi.lock_text(folder, pixi.full_records(folder, changed))
    write_atomically(folder / pixi.MANIFEST, pixi.manifest(folder))
    write_atomically(folder / pixi.LOCK, text)
    environments = pixi.wanted_entries(folder).items()
    return f"{pixi.LOCK}: " + ", ".join(f"{len(entries)} packages for {name}" for name, entries in environments)


def run_tool(folder: Path, program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a program of this environment.

    Raises:
        LabtrainError: it failed; contains the end of its output. Or it took longer than an hour.
    """
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        raise LabtrainError(
            f"{program} is not installed in this environment", hint="make setup && .venv/bin/labtrain lock write"
        )
    command = [str(path), *arguments]
    hint = "check the network, then repeat the command"
    done = run_program(command, folder=folder, timeout_s=TIMEOUT_S, hint=hint, environment=environment)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        text = said.splitlines()[-1] if "Traceback" in said else " ".join(said.split())
        if conflict := re.search(r"Because .* unsatisfiable", text):
            hint = "change the versions in pyproject.toml"
            raise LabtrainError(f"no versions fit together: {conflict[0]}", hint=hint)
        raise LabtrainError(
            f"{program} {arguments[0]} failed: {text[:400]}", hint="labtrain doctor; or check the network"
        )
