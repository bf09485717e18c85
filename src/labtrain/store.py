"""Where checkpoints lie: a folder each, complete when its manifest is there, checked against its hashes. No torch.

::

    step-0000000120/weights.safetensors   the state dict of the LightningModule
                    state.pt              the rest of the training state; loads with weights_only=True
                    manifest.json         written last: sha256 and size of each file, place, weights digest
    step-0000000300-end/                  only where a callback changed the weights after the last step: the result
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from labtrain.errors import DamagedError
from labtrain.run import shown

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
SCHEMA = "labtrain/checkpoint/1"

Manifest = dict[str, Any]


def checkpoint_folder(run_dir: Path, url: str | None) -> Path:
    """Return where a run's checkpoints lie: in its own folder, or below `url` in one of the run's name."""
    return Path(url.removeprefix("file://")) / run_dir.name if url else run_dir / "checkpoints"


def read_manifest(path: Path) -> Manifest | None:
    """Return a checkpoint's manifest; None where the checkpoint was never completed."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return dict(manifest) if manifest["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify_checkpoint(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        DamagedError: names the file, what it is and what the manifest says.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise DamagedError(f"{path}: no readable {MANIFEST}, the checkpoint is not complete", hint=f"rm -r {path}")
    for name, wanted in manifest["files"].items():
        found = file_sha256(path / name) if (path / name).exists() else "no file"
        if found != wanted["sha256"]:
            raise DamagedError(
                f"{path / name}: sha256 {found[:12]}, manifest says {wanted['sha256'][:12]}", hint=f"rm -r {path}"
            )


def list_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Return the complete checkpoints below `folder`, oldest first."""
    found = [(path, manifest) for path in folder.glob("step-*") if (manifest := read_manifest(path)) is not None]
    return sorted(found, key=lambda entry: (entry[1]["step"], entry[1].get("finished", False)))


def newest_whole(folder: Path, *, to_resume: bool = False) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint whose files are what its manifest says; name each that is not.

    Args:
        folder: where they lie.
        to_resume: leave out one that holds what became of the weights after the training's end.
    """
    for path, manifest in reversed(list_checkpoints(folder)):
        if to_resume and manifest.get("finished"):
            continue
        try:
            verify_checkpoint(path)
        except DamagedError as error:
            sys.stderr.write(f"warning: {error.args[0]}: going on from an older checkpoint than {shown(path)}\n")
            continue
        return path, manifest
    return None


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its manifest first: a crash in between leaves none, not a broken one."""
    (path / MANIFEST).unlink()
    shutil.rmtree(path)


def file_sha256(path: Path) -> str:
    """Return a file's sha256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
