"""What an experiment carries besides the template's files: the locks, and this labtrain as a wheel with its hash.

Standard library only: the template's hook runs it in cookiecutter's own environment. A wheel is packed without
compression, because the bytes that a compressor writes depend on its version. So the wheel is a function of labtrain's
files. https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

import base64
import hashlib
import shutil
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from labtrain import __version__
from labtrain.assets import LOCKS, SOURCES, asset
from labtrain.base.errors import LabtrainError
from labtrain.base.files import atomic, file_sha256, write_atomically
from labtrain.bootstrap import WHEEL_LOCK

# Next to labtrain, in a folder that other distributions use too.
PLUGINS = ("hydra_plugins/labtrain_searchpath.py", "hydra_plugins/labtrain_parallel.py")
TAG = "py3-none-any"
WHEEL = f"labtrain-{__version__}-{TAG}.whl"
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the earliest date in a zip file
FILE_MODE = 0o100644


def furnish(experiment: Path) -> None:
    """Copy the locks into an experiment, this labtrain's wheel into `vendor/`, and its hash into labtrain.lock.

    Raises:
        LabtrainError: this labtrain is incomplete, as in a sparse clone; nothing was copied.
    """
    if missing := [name for name in SOURCES if not any(_files(asset(name)))]:
        raise LabtrainError(
            f"this labtrain is incomplete: without {', '.join(missing[:5])}",
            hint="in its repository: git sparse-checkout disable && git checkout .",
        )
    for name in LOCKS:
        copy_asset(name, experiment / name)
    wheel = build_wheel(experiment / "vendor")
    write_atomically(experiment / WHEEL_LOCK, f"./vendor/{wheel.name} --hash=sha256:{file_sha256(wheel)}\n")


def copy_asset(name: str, target: Path) -> None:
    """Copy an asset (a file or folder) to `target`; what is there already is replaced."""
    for below, path in _files(asset(name)):
        copy = target / below if below else target
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def build_wheel(folder: Path) -> Path:
    """Pack this labtrain into a wheel in `folder`; a clone and an installed wheel give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, info = folder / WHEEL, f"labtrain-{__version__}.dist-info"
    listed = []
    with atomic(wheel) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (*sorted(_contents()), *_metadata(info)):
            listed.append(f"{name},sha256={_record_hash(content)},{len(content)}\n")
            _add(archive, name, content)
        _add(archive, f"{info}/RECORD", f"{''.join(listed)}{info}/RECORD,,\n".encode())
    return wheel


def _contents() -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each file of the wheel but its metadata."""
    package = Path(__file__).parents[1]
    for name, path in _files(package):
        if not name.startswith("assets/"):
            yield f"labtrain/{name}", path.read_bytes()
    for name in PLUGINS:
        yield name, (package.parent / name).read_bytes()
    for name in SOURCES:
        for below, path in _files(asset(name)):
            yield f"labtrain/assets/{name}{below and '/'}{below}", path.read_bytes()


def _files(source: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path below `source`, path) of each file in it; if `source` is a file, ("", source)."""
    for path in (source, *source.rglob("*")):
        below = path.relative_to(source)
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in below.parts:
            yield "" if path == source else below.as_posix(), path


def _metadata(info: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the metadata, from pyproject.toml."""
    project = tomllib.loads(asset("pyproject.toml").read_text())["project"]
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {__version__}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        "License-File: LICENSE",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in project["dependencies"]),
    ]
    for extra, requirements in sorted(project["optional-dependencies"].items()):
        lines += [f"Provides-Extra: {extra}", *(f"Requires-Dist: {each}; extra == '{extra}'" for each in requirements)]
    scripts = "".join(f"{name} = {target}\n" for name, target in project["scripts"].items())
    yield f"{info}/METADATA", "".join(f"{line}\n" for line in lines).encode()
    yield f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: labtrain\nRoot-Is-Purelib: true\nTag: {TAG}\n".encode()
    yield f"{info}/entry_points.txt", f"[console_scripts]\n{scripts}".encode()
    yield f"{info}/licenses/LICENSE", asset("LICENSE").read_bytes()


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, EARLIEST)
    entry.external_attr = FILE_MODE << 16
    archive.writestr(entry, content)
