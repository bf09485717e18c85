"""Record which runs this user trained and which stores this user named. No torch.

`labtrain verify` does not ask before it trains such a run, and labtrain opens such a store. The records are empty files
named by a digest, in the state directory (https://specifications.freedesktop.org/basedir-spec/). A receipt itself
cannot prove this.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from labtrain.base import exact_json, untrusted
from labtrain.base.console import quoted, shown
from labtrain.base.errors import DamagedError, StoreError
from labtrain.base.files import text_sha256
from labtrain.base.untrusted import damage_of
from labtrain.record.provenance import PATCH
from labtrain.record.receipt import Receipt
from labtrain.stores.backends import is_local
from labtrain.stores.layout import checkpoint_place

MOST = 10_000  # records of each kind; beyond that, the older half is deleted


def remember(receipt: Receipt, root: Path) -> None:
    """Record that this user trains a run in a folder, and where its checkpoints go.

    If the record cannot be written, the run counts as somebody else's.

    Args:
        receipt: with the whole patch.
        root: the experiment's folder.
    """
    _note("trained", _name_of(receipt, receipt["code"]["patch"], root))
    remember_store(receipt["config"]["checkpoint"]["url"] or "")
    first = receipt["config"].get("init_from")
    remember_store(first["path"] or "" if first else "")


def is_own(receipt: Receipt, run_dir: Path, home: Path) -> bool:
    """Return whether this user trained exactly this run (configuration, code and patch) in a folder.

    The folder counts, because other files there can also run or be read, such as data.
    """
    with suppress(OSError, ValueError, DamagedError):
        return _is_noted("trained", _name_of(receipt, patch_of(receipt, run_dir), home))
    return False


def patch_of(receipt: Receipt, run_dir: Path) -> str | None:
    """Return the patch from the commit to the receipt's code, from code.patch if it is long; None if that is missing.

    Raises:
        DamagedError: code.patch is a link, a pipe or a device, or too large.
    """
    patch: str | None = receipt["code"]["patch"]
    if patch is None:
        hint = "ask whoever trained the run for the file again"
        with suppress(FileNotFoundError), damage_of(shown(run_dir / PATCH), hint=hint):
            patch = untrusted.read(run_dir / PATCH).decode("utf-8", "surrogateescape")
    return patch


def remember_store(url: str) -> None:
    """Record that this user named a remote store."""
    if not is_local(url):
        _note("stores", text_sha256(url.rstrip("/")))


def checkpoints_of(run_dir: Path, receipt: Receipt, *, named: str = "") -> str:
    """Return the place of a run's checkpoints by its receipt: in its folder, or in a store that this user has named.

    Args:
        run_dir: the run's folder.
        receipt: the run's receipt.
        named: a store that the user names now.

    Raises:
        StoreError: the receipt names a store that this user has not named.
    """
    place = checkpoint_place(run_dir, receipt["config"]["checkpoint"]["url"])
    return place if named and named.rstrip("/") in _above(place) else opened(place)


def opened(place: str) -> str:
    """Return a place that a receipt names, if it may be opened with this user's credentials.

    Raises:
        StoreError: it is a remote store, and this user has named neither it nor a parent of it.
    """
    if is_local(place) or any(_is_noted("stores", text_sha256(url)) for url in _above(place)):
        return place
    raise StoreError(
        f"{place}: only the receipt names this store, so labtrain does not open it with your credentials",
        hint=f"labtrain store ls {quoted(place)} if you trust it, then the same command again",
    )


def _above(url: str) -> Iterator[str]:
    """Yield a URL and all its parents."""
    scheme, _, path = url.rstrip("/").partition("://")
    while path:
        yield f"{scheme}://{path}"
        path = path.rpartition("/")[0]


def _name_of(receipt: Receipt, patch: str | None, root: Path) -> str:
    """Return the digest of what a rerun would execute, and of the folder."""
    code = {key: receipt["code"].get(key) for key in ("sources", "outside", "shadows", "commit", "folder")}
    facts = [receipt["run_id"], receipt["config"], code, patch or "", str(root.resolve())]
    return text_sha256(exact_json.dumps(facts, sort_keys=True))


def _folder(kind: str) -> Path:
    """Return the folder for records of a kind; raise RuntimeError if the user has no home."""
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
    """Return whether this user recorded it, in a folder that nobody else can write to."""
    try:
        file, place = (_folder(kind) / name).lstat(), _folder(kind).lstat()
    except (OSError, RuntimeError):
        return False
    mine = os.geteuid()
    safe = stat.S_ISDIR(place.st_mode) and not place.st_mode & 0o022 and stat.S_ISREG(file.st_mode)
    return safe and place.st_uid == mine and file.st_uid == mine
