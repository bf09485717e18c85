"""A run as an RO-Crate, which archives, journals and WorkflowHub take: `labtrain crate`.

RO-Crate 1.1 with the profile Workflow Run Crate 0.5 (https://w3id.org/ro/wfrun/workflow/0.5). Where the sources that
ran are not at hand there is no workflow to enclose, and it is a Process Run Crate 0.5. The metadata say what the
receipt says, of the configuration only what the bits depend on, and hold no path of a machine. The enclosed files are
the run's own, byte for byte: the receipt and the configuration name the folder that the runs lay in. The same run gives
the same bytes.

A run may come from elsewhere, and a crate is published: what is enclosed is a regular file of the run's folder, reached
through no link, or of a place that the receipt names the weights of by their digest.
"""

import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from labtrain.base.console import quoted, shown, warn
from labtrain.base.credentials import holds_secret
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.permissions import open_inside
from labtrain.base.untrusted import LINES_BYTES
from labtrain.record import receipt as receipts
from labtrain.record.differences import open_run
from labtrain.record.own_runs import checkpoints_of
from labtrain.record.sources import source_digests, sources
from labtrain.review.crate_metadata import FILES, MAIN, WEIGHTS, describe
from labtrain.stores.layout import newest_whole, stores_of

EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold


def write_crate(run_dir: Path, file: Path, *, weights: bool, author: str | None, licence: str | None) -> Path:
    """Write a run as an RO-Crate and return its file, which is replaced if it is there.

    Args:
        run_dir: the run's folder.
        file: to write, a .zip.
        weights: enclose those of the newest checkpoint that is whole.
        author: the name of who trained it.
        licence: an SPDX identifier or a URL.

    Raises:
        ConfigError: there is no run, or `file` or `licence` is none.
        DamagedError: a file is not what the receipt says, or is a link, a pipe or a device.
        LabtrainError: the run is trained now or has no weights, or `file` cannot be written.
    """
    with ExitStack() as opened:
        folder = run_dir.parent if run_dir.name == receipts.FILE else run_dir
        files = _opened(folder, FILES, opened) if folder.is_dir() else {}  # looked at before any is read
        return _write_crate(run_dir, file, files, opened, weights=weights, author=author, licence=licence)


def _write_crate(
    run_dir: Path,
    file: Path,
    enclosed: dict[str, Path],
    opened: ExitStack,
    *,
    weights: bool,
    author: str | None,
    licence: str | None,
) -> Path:
    run_dir, found = open_run(run_dir)
    if found["status"] == "running":
        hint = "wait for its end, or start it again, then export it"
        raise LabtrainError(f"{shown(run_dir)} is being trained, or was killed", hint=hint)
    if file.suffix != ".zip":
        raise ConfigError(f"{file} is no .zip", hint=f"-o {quoted(f'{file}.zip')}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}", hint=f"mkdir -p {quoted(file.parent)}")
    with TemporaryDirectory(prefix="labtrain-") as scratch:
        if weights:
            enclosed[WEIGHTS] = _weights(run_dir, found, Path(scratch), opened)
        code = _sources(run_dir, found, opened)
        _write(file, describe(found, enclosed, code, author=author, licence=licence), enclosed | code)
    return file


def _opened(folder: Path, names: Iterable[str], opened: ExitStack) -> dict[str, Path]:
    """Open a folder's files, those that are there, and return each one's path: of what is open, whatever becomes of it.

    Raises:
        DamagedError: one is a link, a pipe or a device, or lies behind a link.
    """
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            file = opened.enter_context(open_inside(folder, name))
            if name in FILES and (size := os.fstat(file.fileno()).st_size) > LINES_BYTES:
                raise DamagedError(
                    f"{folder / name} has {size:,} bytes, at most {LINES_BYTES:,} expected",
                    hint="take it from where it was written",
                )
            found[name] = Path(f"/proc/self/fd/{file.fileno()}")
    return found


def _weights(run_dir: Path, found: receipts.Receipt, scratch: Path, opened: ExitStack) -> Path:
    """Return the weights of the newest checkpoint that is whole."""
    place = checkpoints_of(run_dir, found)
    newest = newest_whole(stores_of(run_dir, place), into=scratch, run_id=found["run_id"])
    if newest is None:
        raise LabtrainError(f"{shown(run_dir)} has no checkpoint that is whole", hint="leave out --weights")
    _, folder, manifest = newest
    claimed = found["results"].get("weights_digest")
    if claimed not in (None, manifest.get("weights_digest")):
        raise DamagedError(
            f"{folder}: weights {manifest.get('weights_digest')}, the receipt says {claimed}",
            hint=f"labtrain digest {quoted(shown(run_dir))}",
        )
    if not (folder / WEIGHTS).exists():
        hint = f"leave out --weights, and labtrain store export {quoted(shown(run_dir))} FILE.ckpt"
        raise LabtrainError(f"{folder.name}: its weights are in parts, of fsdp", hint=hint)
    inside = folder.absolute().is_relative_to(run_dir.absolute())
    named = {claimed, *(each["weights_digest"] for each in found["checkpoints"])} - {None}
    if not inside and manifest.get("weights_digest") not in named:  # else a receipt could name any place of this user's
        raise DamagedError(
            f"{place}: the receipt names the digest of no weights there, so they are not enclosed",
            hint="leave out --weights",
        )
    base = run_dir if inside else folder
    name = f"{folder.absolute().relative_to(base.absolute())}/{WEIGHTS}"
    return _opened(base, [name], opened)[name]


def _sources(run_dir: Path, found: receipts.Receipt, opened: ExitStack) -> dict[str, Path]:
    """Return the experiment's sources by their names in the crate: those that ran, or none and a word why."""
    root = next((folder for folder in run_dir.resolve().parents if (folder / MAIN).is_file()), None)
    if root is None:
        _leave_out(found, "the run lies in no experiment's folder")
        return {}
    if source_digests(root) != found["code"]["sources"]:
        _leave_out(found, f"the sources in {root} are not those that ran")
        return {}
    enclosed: dict[str, Path] = {}
    for path in sorted(sources(root)):
        name = path.relative_to(root).as_posix()
        if name in found["code"]["ignored"] or holds_secret(path.read_text(errors="replace")):
            _warn(f"{name} is not enclosed: git is told to ignore it, or it holds what looks like a credential")
        else:
            enclosed |= _opened(root, [name], opened)
    return enclosed


def _leave_out(found: receipts.Receipt, why: str) -> None:
    commit = found["code"]["commit"]
    _warn(f"{why}: they are not enclosed, and the crate names {f'commit {commit}' if commit else 'their digest'} alone")


def _warn(text: str) -> None:
    warn(text)


def _write(file: Path, metadata: dict[str, object], enclosed: dict[str, Path]) -> None:
    """Write the zip in one step: names sorted, all of one date, so that the same files are the same bytes."""
    text = json.dumps(metadata, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(scratch, "w") as archive:
            archive.writestr(_entry("ro-crate-metadata.json"), text)
            for name, path in sorted(enclosed.items()):
                with path.open("rb") as source, archive.open(_entry(name), "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(file)
    except OSError as error:
        raise LabtrainError(f"{file} cannot be written: {error.strerror}", hint=f"df {quoted(file.parent)}") from error
    finally:
        scratch.unlink(missing_ok=True)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_STORED if name == WEIGHTS else zipfile.ZIP_DEFLATED  # floats do not get smaller
    entry.external_attr = 0o644 << 16
    return entry
