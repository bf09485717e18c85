"""What a person names on the command line: a run, a checkpoint folder or a weights file."""

from pathlib import Path

from labtrain import receipt
from labtrain.digests import digest_file, digest_tree
from labtrain.errors import LabtrainError, NotThereYetError
from labtrain.store import WEIGHTS, checkpoint_folder, newest_whole, read_manifest


def digest_target(target: str, *, whole: bool = False) -> tuple[str, str | None]:
    """Return the digest of what `target` names, from its files, and what its own record claims.

    Args:
        target: a run's folder (its newest checkpoint), a checkpoint's folder, or a .safetensors file.
        whole: of the whole training state instead of the weights.

    Raises:
        LabtrainError: nothing is there that has a digest.
    """
    if "://" in target and not target.startswith("file://"):
        raise NotThereYetError(f"labtrain digest {target} (remote stores)")
    path = Path(target.removeprefix("file://"))
    if path.is_file() and path.suffix == ".safetensors" and not whole:
        return digest_file(path), None
    found = receipt.read(path)
    claimed = None
    if found is not None:
        newest = newest_whole(checkpoint_folder(path, found["config"]["checkpoint"]["url"]))
        if newest is None:
            raise LabtrainError(f"{path}: the run has no checkpoint yet", hint=f"ls {path}")
        claimed = found["results"].get("state_digest" if whole else "weights_digest")
        path = newest[0]
    manifest = read_manifest(path)
    if manifest is None:
        places = ", ".join(str(path / name) for name in (receipt.FILE, "manifest.json"))
        raise LabtrainError(f"{path} is neither a run nor a checkpoint: looked for {places}", hint="ls runs/*/")
    claimed = claimed or manifest["state_digest" if whole else "weights_digest"]
    if not whole:
        return digest_file(path / WEIGHTS), claimed
    from labtrain.checkpoint import read_checkpoint

    return digest_tree(read_checkpoint(path)), claimed
