"""`labtrain store`: ls, check, prune, export, import."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from labtrain.base.console import say, warn
from labtrain.base.errors import ConfigError, DamagedError
from labtrain.cli import help_page
from labtrain.cli.show import complete_path, complete_run, say_json

if TYPE_CHECKING:
    from labtrain.stores.store import Checkpoint, Manifest, Store


@click.group(cls=help_page.Group, example="labtrain store ls s3://lab/digits")
def store() -> None:
    """List, check, prune, export and import checkpoints.

    A store is where checkpoints are saved: a folder, or an s3://, sftp://, gs:// or az:// URL.
    """


@store.command("ls", cls=help_page.Command, example="labtrain store ls runs/digits")
@click.argument("url", shell_complete=complete_path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the manifests.")
def store_ls(url: str, as_json: bool) -> None:
    """List checkpoints with their path, step and size.

    URL is a store, or a folder in it. With --json, a manifest that cannot be read is null, and "error" says why.
    """
    from labtrain.stores.layout import misplaced
    from labtrain.stores.store import GoneError

    place, rows = _existing(url), []
    read: dict[str, tuple[Checkpoint, Manifest]] = {}
    errors: dict[str, str] = {}
    found = [each for each in place.find() if each.complete or each.is_link]
    for each in list(found):
        try:
            if each.is_link:
                errors[each.path] = f"{each.url} is a symbolic link, skipped"
            else:
                read[each.path] = each, place.manifest(each)
        except GoneError:
            found.remove(each)
        except DamagedError as damaged:
            errors[each.path] = str(damaged.args[0])
    errors |= {path: f"{read[path][0].url} {wrong}" for path, wrong in misplaced(read).items()}
    for each in found:
        error = errors.get(each.path)
        if error:
            warn(error)
        manifest = read[each.path][1] if each.path in read else None
        rows.append({"path": each.url, "sizes": each.sizes, "manifest": manifest, "error": error})
        if not as_json:
            end = "  end" if each.finished else ""
            wrong = f"  {error.removeprefix(each.url).lstrip('/ ')}" if error else ""
            say(f"{each.url}  step {each.step}  {sum(each.sizes.values()) / 1e6:,.1f} MB{end}{wrong}")
    if as_json:
        say_json(rows)


@store.command("check", cls=help_page.Command, example="labtrain store check s3://lab/digits")
@click.argument("url", shell_complete=complete_path)
def store_check(url: str) -> None:
    """Read every checkpoint and compare its files with its manifest.

    URL is a store, or a folder in it. The exit code is 1 if a checkpoint is damaged.
    """
    from labtrain.stores.layout import misplaced
    from labtrain.stores.prune import check
    from labtrain.stores.store import GoneError

    place, lines = _existing(url), dict[str, str | None]()
    read: dict[str, tuple[Checkpoint, Manifest]] = {}
    for each in place.find():
        if each.is_link:
            lines[each.path] = "is a symbolic link, skipped"
        elif each.complete:
            with suppress(GoneError):
                lines[each.path] = check(each)
                with suppress(DamagedError):
                    read[each.path] = each, place.manifest(each)
    lines |= {path: lines[path] or wrong for path, wrong in misplaced(read).items()}
    for path, wrong in lines.items():
        say(f"{place.url}/{path}  {wrong or 'ok'}")
    damaged = any(lines.values())
    sys.exit(damaged)


@store.command("prune", cls=help_page.Command, example="labtrain store prune runs/digits --dry-run")
@click.argument("url", shell_complete=complete_path)
@click.option(
    "--keep-last", type=click.IntRange(min=1), help="Also remove old checkpoints: keep this many of each run."
)
@click.option("--older-than", type=float, default=24.0, show_default=True, metavar="HOURS",
              help="Treat writers on other machines as dead after this time without a change.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
def store_prune(url: str, keep_last: int | None, older_than: float, dry_run: bool) -> None:
    """Remove unfinished checkpoints that crashes have left.

    URL is a store, or a folder in it. Checkpoints that a process is still writing are kept.
    """
    from labtrain.stores.prune import clear, leftovers, superseded

    place = _existing(url)
    for left in leftovers(place, older_than_s=older_than * 3600):
        what = "in progress, kept" if left.in_progress else "left by a crash, removed"
        say(f"{place.url}/{left.path}  {left.size_bytes / 1e6:,.1f} MB, {left.age_s / 3600:.1f} h old: {what}")
        if not left.in_progress and not dry_run:
            clear(place, left)
    for each in superseded(place, keep_last=keep_last) if keep_last else ():
        say(f"{each.url}  step {each.step}: removed")
        if not dry_run:
            place.discard(each.path)


def _existing(url: str) -> "Store":
    """Return the store at a URL.

    Raises:
        ConfigError: it is a folder of this machine that does not exist.
    """
    from labtrain.record.own_runs import remember_store
    from labtrain.stores.store import Store

    place = Store(url)
    remember_store(url)
    if place.local and not Path(place.root).is_dir():
        raise ConfigError(
            f"{url}: no such folder", hint="labtrain ls lists runs; the checkpoints of a run are in RUN/checkpoints"
        )
    return place


@store.command("export", cls=help_page.Command, example="labtrain store export runs/digits/24c29285cf19 digits.ckpt")
@click.argument("target", shell_complete=complete_run)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def store_export(target: str, file: Path) -> None:
    """Convert a checkpoint to a Lightning .ckpt file.

    TARGET is a checkpoint, or a run's folder or id, whose newest checkpoint is then used.
    """
    from labtrain.checkpoints.lightning_ckpt import export_checkpoint

    export_checkpoint(target, file)


@store.command("import", cls=help_page.Command, example="labtrain store import digits.ckpt imported")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("url", shell_complete=complete_path)
def store_import(file: Path, url: str) -> None:
    """Convert a Lightning .ckpt file to a checkpoint.

    labtrain writes the checkpoint below URL. labtrain.load_weights then loads its weights. No code in the file runs.
    """
    from labtrain.checkpoints.lightning_ckpt import import_checkpoint

    say(import_checkpoint(file, url))
