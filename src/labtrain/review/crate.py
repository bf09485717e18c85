"""`labtrain crate`: export a run as an RO-Crate, which archives, journals and WorkflowHub accept.

RO-Crate 1.1 with the profile Workflow Run Crate 0.5 (https://w3id.org/ro/wfrun/workflow/0.5). If the sources that ran
are not available, the crate is a Process Run Crate 0.5. The metadata contains the receipt's facts, the part of the
configuration that can change the bits, and no local path. The files are unchanged copies, so the receipt and the
configuration still name the folder of the runs. The same run gives the same bytes.

`labtrain bundle` writes a crate that `labtrain verify` can train again without anything else: it also has the locks,
the labtrain wheel, the configuration files and small data. The sha256 of the zip is at its end, in the zip's comment.

A run may come from somebody else, and a crate is published. So a crate contains only regular files of the run's folder,
reached through no link, and weights whose digest the receipt names.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from labtrain.base.console import few, quoted, shown, warn
from labtrain.base.credentials import holds_secret
from labtrain.base.errors import ConfigError, DamagedError, LabtrainError
from labtrain.base.files import atomic
from labtrain.base.git import ask_git
from labtrain.base.permissions import open_inside
from labtrain.base.untrusted import LINES_BYTES
from labtrain.environment.lock.derive import OWN_LOCK, own_wheel
from labtrain.record import receipt as receipts
from labtrain.record.differences import open_run
from labtrain.record.fingerprints import OF_A_FILE, files_now
from labtrain.record.identity import LOCK_FILE, lock_digest
from labtrain.record.own_runs import checkpoints_of
from labtrain.record.sources import source_digests, sources
from labtrain.review.crate_metadata import FILES, MAIN, METADATA, WEIGHTS, describe
from labtrain.review.replay import checked_out, code_of, home_of
from labtrain.stores.layout import newest_whole, stores_of

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date in a zip file
SEAL = b"labtrain bundle, sha256 of all bytes before this: "  # in the zip's comment, before 64 hex digits
MOST_DATA_BYTES = 100_000_000  # of data in a bundle


def write_crate(
    run_dir: Path, file: Path, *, weights: bool, author: str | None, licence: str | None, whole: bool = False
) -> Path:
    """Write a run as an RO-Crate and return the file; an existing file is replaced.

    Args:
        run_dir: the run's folder.
        file: the .zip file to write.
        weights: include the weights of the newest undamaged checkpoint.
        author: the name of the person who trained the run.
        licence: an SPDX identifier or a URL.
        whole: include all that is needed to train it again: a bundle.

    Raises:
        ConfigError: there is no run, `file` is not a .zip, or `licence` is not valid.
        DamagedError: a file does not match the receipt, or is a link, a pipe or a device.
        LabtrainError: the run is being trained or has no weights, or `file` cannot be written.
    """
    with ExitStack() as opened:
        folder = run_dir.parent if run_dir.name == receipts.FILE else run_dir
        files = _opened(folder, FILES, opened) if folder.is_dir() else {}  # checked before any file is read
        return _write_crate(run_dir, file, files, opened, weights=weights, author=author, licence=licence, whole=whole)


def _write_crate(
    run_dir: Path,
    file: Path,
    enclosed: dict[str, Path],
    opened: ExitStack,
    *,
    weights: bool,
    author: str | None,
    licence: str | None,
    whole: bool,
) -> Path:
    run_dir, found = open_run(run_dir)
    if found["status"] == "running":
        hint = "wait until it ends, or resume it with the same command; then export it"
        raise LabtrainError(f"{shown(run_dir)} is still training, or was killed", hint=hint)
    if file.suffix != ".zip":
        raise ConfigError(f"{file}: the name must end in .zip", hint=f"-o {quoted(f'{file}.zip')}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file}: folder {file.parent} does not exist", hint=f"mkdir -p {quoted(file.parent)}")
    with TemporaryDirectory(prefix="labtrain-") as scratch:
        if weights:
            enclosed[WEIGHTS] = _weights(run_dir, found, Path(scratch), opened)
        code, more = _needed(run_dir, found, Path(scratch), opened) if whole else (_sources(run_dir, found, opened), {})
        if names := sorted((code.keys() | more.keys()) & (FILES.keys() | {METADATA})):
            raise ConfigError(
                f"the experiment's {names[0]} has the name of a file that labtrain writes",
                hint=f"git mv {names[0]} NEW",
            )
        metadata = describe(found, enclosed, code, more, author=author, licence=licence)
        _write(file, metadata, enclosed | code | more, sealed=whole)
    return file


def _opened(folder: Path, names: Iterable[str], opened: ExitStack) -> dict[str, Path]:
    """Open those files of a folder that exist, and return paths to the open files.

    The paths stay valid if a file is replaced.

    Raises:
        DamagedError: a file is a link, a pipe or a device, or is reached through a link.
    """
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            file = opened.enter_context(open_inside(folder, name))
            if name in FILES and (size := os.fstat(file.fileno()).st_size) > LINES_BYTES:
                raise DamagedError(
                    f"{folder / name} has {size:,} bytes, at most {LINES_BYTES:,} expected",
                    hint="copy it again from the machine that trained the run",
                )
            found[name] = Path(f"/proc/self/fd/{file.fileno()}")
    return found


def _weights(run_dir: Path, found: receipts.Receipt, scratch: Path, opened: ExitStack) -> Path:
    """Return the weights file of the newest undamaged checkpoint."""
    place = checkpoints_of(run_dir, found)
    newest = newest_whole(stores_of(run_dir, place), into=scratch, run_id=found["run_id"])
    if newest is None:
        raise LabtrainError(f"{shown(run_dir)} has no undamaged checkpoint", hint="leave out --weights")
    _, folder, manifest = newest
    claimed = found["results"].get("weights_digest")
    if claimed not in (None, manifest.get("weights_digest")):
        raise DamagedError(
            f"{folder}: weights digest {manifest.get('weights_digest')}, the receipt says {claimed}",
            hint=f"labtrain digest {quoted(shown(run_dir))}",
        )
    if not (folder / WEIGHTS).exists():
        hint = f"leave out --weights, and labtrain store export {quoted(shown(run_dir))} FILE.ckpt"
        raise LabtrainError(f"{folder.name}: its weights are in several files (FSDP)", hint=hint)
    inside = folder.absolute().is_relative_to(run_dir.absolute())
    named = {claimed, *(each["weights_digest"] for each in found["checkpoints"])} - {None}
    if (
        not inside and manifest.get("weights_digest") not in named
    ):  # otherwise a receipt could name any of this user's files
        raise DamagedError(
            f"{place}: its weights are not in the receipt, so they cannot be included",
            hint="leave out --weights",
        )
    base = run_dir if inside else folder
    name = f"{folder.absolute().relative_to(base.absolute())}/{WEIGHTS}"
    return _opened(base, [name], opened)[name]


def _sources(run_dir: Path, found: receipts.Receipt, opened: ExitStack) -> dict[str, Path]:
    """Return the sources that ran, by name in the crate; without them, warn why and return nothing."""
    root = next((folder for folder in run_dir.resolve().parents if (folder / MAIN).is_file()), None)
    if root is None:
        _leave_out(found, "the run is not in an experiment's folder")
        return {}
    if source_digests(root) != found["code"]["sources"]:
        _leave_out(found, f"the sources in {root} are not the ones that ran")
        return {}
    enclosed: dict[str, Path] = {}
    for path in sorted(sources(root)):
        name = path.relative_to(root).as_posix()
        if name in found["code"]["ignored"] or holds_secret(path.read_text(errors="replace")):
            warn(f"{name} is left out: git ignores it, or it contains what looks like a credential")
        else:
            enclosed |= _opened(root, [name], opened)
    return enclosed


def _needed(
    run_dir: Path, found: receipts.Receipt, scratch: Path, opened: ExitStack
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the sources that ran, and the other files that training them again needs, by name in the bundle.

    Raises:
        LabtrainError: a file cannot be found or may not be sent, so the bundle could not be verified.
    """
    home = home_of(run_dir, found)
    root, _ = code_of(found, run_dir, home, scratch)
    recorded = found["environment"]["lock_digest"]
    if root == home and found["code"]["commit"] and lock_digest(home, "wheels") != recorded:
        top = ask_git(str(home), "rev-parse", "--show-toplevel").strip()
        root, _ = checked_out(found, run_dir, top, scratch)
    if (wheel := own_wheel(root)) is None or not (root / LOCK_FILE).is_file():
        raise ConfigError(
            f"{shown(root)} has no {LOCK_FILE} and {OWN_LOCK}, which verifying a bundle needs",
            hint="labtrain new DIR makes an experiment with both; labtrain crate RUN writes a crate without them",
        )
    if found["environment"]["route"] in ("wheels", "nix") and lock_digest(root, "wheels") != recorded:
        raise ConfigError(f"{shown(root / LOCK_FILE)} is not the one that the run was trained with", hint="git log")
    if outside := found["code"].get("outside"):
        raise ConfigError(
            f"the run imported {next(iter(outside))} from outside the experiment, so a bundle cannot train it again",
            hint="move the module into the experiment, and train again",
        )
    conf = (path.relative_to(root).as_posix() for path in sorted((root / "conf").rglob("*.yaml")))
    code = {name: path for name in found["code"]["sources"] for path in _opened(root, [name], opened).values()}
    more = {name: path for name in (LOCK_FILE, OWN_LOCK, str(Path(wheel[0])), *conf)
            for path in _opened(root, [name], opened).values()}  # fmt: skip
    for name, path in (code | more).items():
        if not name.endswith(".whl") and holds_secret(path.read_text(errors="replace")):
            raise ConfigError(f"{name} contains what looks like a credential", hint=f"grep -n KEY {quoted(name)}")
    return code, more | _small_data(found, home, opened)


def _small_data(found: receipts.Receipt, home: Path, opened: ExitStack) -> dict[str, Path]:
    """Return the data in the experiment's folder that the run read, if it is unchanged and small; else warn.

    A receipt of somebody else could name any file there. So a file counts only if the receipt has its sha256.
    """
    recorded = {name: each for name, each in found["data"].items() if name.startswith(OF_A_FILE)}
    now = files_now(recorded, home, outside=False)
    kept = [name.removeprefix(OF_A_FILE) for name, each in recorded.items()
            if name in now and now[name]["digest"] == each["digest"] and not each["opaque"]]  # fmt: skip
    size = sum(now[f"{OF_A_FILE}{name}"]["bytes"] for name in kept)
    kept = kept if size <= MOST_DATA_BYTES else []
    if absent := [name for each in recorded if (name := each.removeprefix(OF_A_FILE)) not in kept]:
        warn(f"data left out, only its fingerprint is in the bundle: {few(absent)}. It is outside {shown(home)}, was"
             f" changed, or is larger than {MOST_DATA_BYTES / 1e6:.0f} MB. hint: labtrain verify FILE.zip --set"
             " data.root=/FOLDER")  # fmt: skip
    files = [each for name in kept for place in [home / name]
             for each in ([place] if place.is_file() else sorted(place.rglob("*"))) if each.is_file()]  # fmt: skip
    return _opened(home, [each.relative_to(home).as_posix() for each in files], opened)


def _leave_out(found: receipts.Receipt, why: str) -> None:
    commit = found["code"]["commit"]
    warn(f"{why}: sources left out; the crate names only {f'commit {commit}' if commit else 'their digest'}")


def _write(file: Path, metadata: dict[str, object], enclosed: dict[str, Path], *, sealed: bool) -> None:
    """Write the zip in one step, with sorted names and one date, so that the same files give the same bytes."""
    text = json.dumps(metadata, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        with atomic(file) as scratch:
            with zipfile.ZipFile(scratch, "w") as archive:
                archive.comment = SEAL + b"0" * 64 if sealed else b""
                archive.writestr(_entry(METADATA), text)
                for name, path in sorted(enclosed.items()):
                    with path.open("rb") as source, archive.open(_entry(name), "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            if sealed:
                with scratch.open("r+b") as written:
                    digest = sha256_before_seal(written)
                    written.seek(-64, os.SEEK_END)
                    written.write(digest.encode())
    except OSError as error:
        raise LabtrainError(f"{file} cannot be written: {error.strerror}", hint=f"df {quoted(file.parent)}") from error


def sha256_before_seal(file: BinaryIO) -> str:
    """Return the sha256 of an open file without its last 64 bytes."""
    left, sha = file.seek(0, os.SEEK_END) - 64, hashlib.sha256()
    file.seek(0)
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        sha.update(part)
        left -= len(part)
    return sha.hexdigest()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_STORED if name == WEIGHTS else zipfile.ZIP_DEFLATED  # floats do not compress
    entry.external_attr = 0o644 << 16
    return entry
