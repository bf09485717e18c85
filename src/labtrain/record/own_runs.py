"""Which runs this user trained, and which stores: `labtrain verify` asks nothing for them, and a store is opened.

Recorded in the state directory (https://specifications.freedesktop.org/basedir-spec/): an empty file for each, named by
a digest. Nothing of a receipt can say so itself. No torch.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from labtrain.base import exact_json, untrusted
from labtrain.base.console import quoted, shown
from labtrain.base.errors import DamagedError, StoreError
from labtrain.base.untrusted import damage_of
from labtrain.record.provenance import PATCH
from labtrain.record.receipt import Receipt
from labtrain.stores.backends import is_local
from labtrain.stores.layout import checkpoint_place

MOST = 10_000  # that are remembered of each kind; the older half is forgotten


def remember(receipt: Receipt, root: Path) -> None:
    """Note that this user trains a run in a folder, and where its checkpoints go.

    Where that cannot be written, it is as if somebody else had trained it.

    Args:
        receipt: with the whole patch.
        root: the experiment's folder.
    """
    _note("trained", _name_of(receipt, receipt["code"]["patch"], root))
    remember_store(receipt["config"]["checkpoint"]["url"] or "")


def is_own(receipt: Receipt, run_dir: Path, home: Path) -> bool:
    """Return whether this user's labtrain trained a run in a folder: its configuration, code and patch, all of them.

    The folder counts, since what lies there beside the sources runs as well, or is read: data, say.
    """
    with suppress(OSError, ValueError, DamagedError):
        return _is_noted("trained", _name_of(receipt, patch_of(receipt, run_dir), home))
    return False


def patch_of(receipt: Receipt, run_dir: Path) -> str | None:
    """Return what turns the commit into the receipt's code: of a long one the file beside it; None where it is not.

    Raises:
        DamagedError: it is a link, a pipe or a device, or too large.
    """
    patch: str | None = receipt["code"]["patch"]
    if patch is None:
        hint = "get it again from whoever trained the run"
        with suppress(FileNotFoundError), damage_of(shown(run_dir / PATCH), hint=hint):
            patch = untrusted.read(run_dir / PATCH).decode("utf-8", "surrogateescape")
    return patch


def remember_store(url: str) -> None:
    """Note that this user named a store on another machine."""
    if not is_local(url):
        _note("stores", _digest(url.rstrip("/")))


def checkpoints_of(run_dir: Path, receipt: Receipt, *, named: str = "") -> str:
    """Return where a run's checkpoints lie by its receipt: in its folder, or in a store that this user has named.

    Args:
        run_dir: of the run.
        receipt: its own.
        named: a store that the user names now.

    Raises:
        StoreError: it is a store that this user has not named.
    """
    place = checkpoint_place(run_dir, receipt["config"]["checkpoint"]["url"])
    return place if named and named.rstrip("/") in _above(place) else opened(place)


def opened(place: str) -> str:
    """Return a place that a receipt names, where it may be opened: it is, with this user's credentials.

    Raises:
        StoreError: it is a store on another machine, and this user has named neither it nor one above it.
    """
    if is_local(place) or any(_is_noted("stores", _digest(url)) for url in _above(place)):
        return place
    raise StoreError(
        f"{place} is not opened: a receipt names it, and you have not, on this machine",
        hint=f"labtrain store ls {quoted(place)}, then the same command again",
    )


def _above(url: str) -> Iterator[str]:
    """Yield a URL, and each that it lies below."""
    scheme, _, path = url.rstrip("/").partition("://")
    while path:
        yield f"{scheme}://{path}"
        path = path.rpartition("/")[0]


def _name_of(receipt: Receipt, patch: str | None, root: Path) -> str:
    """Return the digest of what a replay of a run would execute, and of where."""
    code = {key: receipt["code"].get(key) for key in ("sources", "outside", "shadows", "commit", "folder")}
    facts = [receipt["run_id"], receipt["config"], code, patch or "", str(root.resolve())]
    return _digest(exact_json.dumps(facts, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _folder(kind: str) -> Path:
    """Return where a kind is noted; RuntimeError where the user has no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(state if Path(state).is_absolute() else Path.home() / ".local" / "state", "labtrain", kind)


def _note(kind: str, name: str) -> None:
    with suppress(OSError, RuntimeError):
        folder = _folder(kind)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / name).touch(mode=0o600)
        if len(names := os.listdir(folder)) > MOST:  # noqa: PTH208
            for old in sorted(names, key=lambda each: (folder / each).stat().st_mtime)[: MOST // 2]:
                (folder / old).unlink(missing_ok=True)


def _is_noted(kind: str, name: str) -> bool:
    """Return whether this user noted it, in a folder that nobody else can write to."""
    try:
        file, place = (_folder(kind) / name).lstat(), _folder(kind).lstat()
    except (OSError, RuntimeError):
        return False
    mine = os.geteuid()
    safe = stat.S_ISDIR(place.st_mode) and not place.st_mode & 0o022 and stat.S_ISREG(file.st_mode)
    return safe and place.st_uid == mine and file.st_uid == mine
