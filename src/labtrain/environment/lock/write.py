"""Write the derived locks again: requirements.lock, nix/wheels.json, requirements-conda.lock, and the seal."""

import json
import sys
import tempfile
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.base.files import text_sha256, write_atomically
from labtrain.base.programs import run_program
from labtrain.environment.lock import conda, derive
from labtrain.environment.lock.pins import PYTHON_312_LINUX, read_lock, read_pins
from labtrain.record.identity import LOCK_FILE

COMPILE = ("--universal", "--generate-hashes", "--no-emit-index-url", "--no-header", "--quiet")
TIMEOUT_S = 3600  # uv takes seconds, and conda-lock minutes, unless the network hangs
EXTRAS = ("--extra", "lab", "--extra", "dev")


def write_locks(folder: Path, *, upgrade: bool = False) -> Iterator[str]:
    """Write each derived lock, and yield a line for each.

    Args:
        folder: the project's folder; it has pyproject.toml with the extras lab and dev.
        upgrade: use the newest releases that pyproject.toml allows; else keep pins that still fit.

    Raises:
        LabtrainError: a tool failed, or the conda spec changed and no channel can be reached.
    """
    if not (folder / "pyproject.toml").exists() or not (folder / conda.SPEC).exists():
        hint = "in an experiment the locks come from labtrain: labtrain new DIR with a newer version"
        raise ConfigError(f"{folder} must have pyproject.toml and {conda.SPEC} to resolve from", hint=hint)
    before = (folder / LOCK_FILE).read_text() if (folder / LOCK_FILE).exists() else ""
    options = [*COMPILE, *EXTRAS, *(["--upgrade"] if upgrade else [])]
    _run(folder, "uv", "pip", "compile", *options, "pyproject.toml", "-o", LOCK_FILE)
    yield f"{LOCK_FILE}: {'unchanged' if (folder / LOCK_FILE).read_text() == before else 'resolved again'}"
    yield from _lock_conda(folder)
    wheels = choose_wheels(folder)
    (folder / derive.WHEELS).parent.mkdir(exist_ok=True)
    write_atomically(folder / derive.WHEELS, "[\n" + ",\n".join(json.dumps(entry) for entry in wheels) + "\n]\n")
    yield f"{derive.WHEELS}: {len(wheels)} files"
    text = derive.conda_requirements(folder)
    write_atomically(folder / derive.CONDA_REQUIREMENTS, text)
    yield f"{derive.CONDA_REQUIREMENTS}: {text.count('==')} packages"
    write_atomically(folder / derive.SEAL, sbom(folder))
    yield f"{derive.SEAL}: {len(derive.seal(folder))} packages of three routes"


def choose_wheels(folder: Path) -> list[dict[str, object]]:
    """Return the entries of wheels.json, sorted by name.

    A lock with hashes has no file names. uv writes them to a pylock.toml, which is deleted because it names hosts.
    """
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        pins = read_pins(folder / LOCK_FILE)
        lines = [f"{pin.name}=={pin.version}{f' ; {pin.marker}' if pin.marker else ''}\n" for pin in pins]
        constraints.write_text("".join(lines))
        listing = Path(scratch) / "pylock.toml"
        options = ["--universal", "--no-header", "--quiet", "--format", "pylock.toml", *EXTRAS]
        _run(folder, "uv", "pip", "compile", *options, "-c", str(constraints), "pyproject.toml", "-o", str(listing))
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


def sbom(folder: Path) -> str:
    """Return sbom.cdx.json: a CycloneDX 1.6 document of every package of every route, by CycloneDX's library.

    https://cyclonedx.org/docs/1.6/json/. The same locks give the same text: no time, a serial number from the seals.
    """
    from cyclonedx.model import HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    sealed = derive.seal(folder)
    pins = read_pins(folder / LOCK_FILE)
    hashes: dict[str, list[str]] = {f"wheels {pin.name} {pin.version}": [] for pin in pins}
    purls = {f"wheels {pin.name} {pin.version}": PackageURL("pypi", None, pin.name, pin.version) for pin in pins}
    for entry in conda.read_conda_lock(folder)["package"]:
        key = f"conda {entry['name']}"
        hashes[key] = [f"{kind}:{value}" for kind, value in entry["hash"].items()]
        purls[key] = PackageURL("conda", None, entry["name"], str(entry["version"]), {"channel": "conda-forge"})
    for entry in derive.read_wheels(folder):
        key = f"nix {entry['name']}"
        hashes[key] = [f"sha256:{derive.hex_digest(entry['hash'])}"]
        purls[key] = PackageURL("pypi", None, entry["name"], entry["version"], {"route": "nix"})
    bom = Bom(serial_number=uuid.UUID(text_sha256(json.dumps(sealed, sort_keys=True))[:32], version=4))
    for key, digest in sealed.items():
        route, name, *_ = key.split(" ")
        purl = purls.get(key)
        component = Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=purl.version if purl else None,
            purl=purl,
            bom_ref=key,
            hashes=[HashType.from_composite_str(text) for text in hashes.get(key, [])],
            properties=[Property(name="labtrain:route", value=route), Property(name="labtrain:seal", value=digest)],
        )
        bom.components.add(component)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    document.get("metadata", {}).pop("timestamp", None)
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _lock_conda(folder: Path) -> Iterator[str]:
    """Solve the conda lock again if its sources changed."""
    locked = conda.read_conda_lock(folder)["metadata"]["content_hash"].get(conda.PLATFORM)
    if conda.content_hash(folder) == locked:
        yield f"{conda.LOCK}: unchanged"
        return
    options = [
        "-f",
        conda.SPEC,
        "--virtual-package-spec",
        conda.VIRTUAL,
        "-p",
        conda.PLATFORM,
        "--lockfile",
        conda.LOCK,
    ]
    try:
        _run(folder, "conda-lock", "lock", *options)
    except LabtrainError as error:
        what = f"{conda.SPEC} or {conda.VIRTUAL} changed, but {conda.LOCK} could not be solved again"
        raise LabtrainError(
            f"{what}: {error.args[0]}", hint="run it with access to conda-forge, or revert the change"
        ) from error
    yield f"{conda.LOCK}: solved again"


def _run(folder: Path, program: str, *arguments: str) -> None:
    """Run a program of this environment.

    Raises:
        LabtrainError: it failed; contains the end of its output. Or it took longer than an hour.
    """
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = run_program(command, folder=folder, timeout_s=TIMEOUT_S, hint="check the network, then repeat the command")
    if done.returncode:
        text = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise LabtrainError(
            f"{program} {arguments[0]} failed: {text[-400:]}", hint="labtrain doctor; or check the network"
        )
