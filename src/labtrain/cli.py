"""The `labtrain` command: each subcommand parses, calls one function and prints. Data to stdout, the rest to stderr.

Exit codes: 0 yes or same, 1 no or differs, 2 wrong usage or input.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from labtrain import __version__
from labtrain.errors import LabtrainError, NotThereYetError

# In the design, and not in this version: they say so instead of pretending.
LATER = {
    "verify": "run a receipt again and compare the bits",
    "report": "runs as one self-contained page",
    "gate": "may the environment be upgraded",
}


class Group(click.Group):
    """Prints a LabtrainError as a person reads it, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabtrainError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=Group, epilog=f"Not there yet: {', '.join(LATER)}.", context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="labtrain")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Reproducible training: experiments, their environment and their receipts."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


@main.command()
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--author", default="Anonymous", help="Your name, for its README.")
def new(target: Path, author: str) -> None:
    """Make a new experiment in DIR."""
    from labtrain.new import make_experiment

    make_experiment(target, author=author)
    click.echo(target)
    click.echo(f"next: cd {target} && python train.py", err=True)


@main.command()
@click.argument("target", metavar="TARGET")
@click.option("--all", "whole", is_flag=True, help="Of the whole training state, not the weights alone.")
def digest(target: str, whole: bool) -> None:
    """Print the sha256 of the weights of a run, a checkpoint folder or a .safetensors file.

    Computed from the files, not read from the receipt; exit code 1 if the receipt or manifest says another.
    """
    from labtrain.target import digest_target

    found, claimed = digest_target(target, whole=whole)
    click.echo(found)
    if claimed not in (None, found):
        click.echo(f"error: its own record says {claimed}", err=True)
        sys.exit(1)


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Tell what differs between two runs, causes first, and where they part; exit code 1 if anything that matters does.

    A and B are folders of runs, or receipts.
    """
    from dataclasses import asdict

    from labtrain.compare import compare, lines_of

    found = compare(a, b)
    if as_json:
        click.echo(json.dumps({"same": found.same, **asdict(found)}, indent=1))
    else:
        click.echo(f"A  {a}\nB  {b}")
        for line in lines_of(found):
            click.echo(line)
    sys.exit(not found.same)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
@click.option(
    "--gpu",
    type=click.Choice(["optional", "required"]),
    default="optional",
    show_default=True,
    help="Whether a machine without a GPU fails.",
)
@click.option("--deep", is_flag=True, help="Hash every installed file: half a minute.")
@click.option("--checkpoints", metavar="URL", help="Where checkpoints go: checkpoint.url.  [default: runs/]")
def doctor(as_json: bool, gpu: str, deep: bool, checkpoints: str | None) -> None:
    """Judge this machine and environment against the lock."""
    from dataclasses import asdict

    from labtrain.doctor import Check, examine

    checks: list[Check] = list(examine(gpu_required=gpu == "required", deep=deep, checkpoints=checkpoints))
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        marks = {"ok": click.style("ok", fg="green"), "failed": click.style("failed", fg="red"), "skipped": "skipped"}
        group = ""
        for check in checks:
            if check.group != group:
                group = check.group
                click.echo(click.style(group, bold=True))
            wanted = "" if check.status == "ok" else f"   wanted: {check.wanted}"
            click.echo(f"  {check.name:<18}{marks[check.status]:<8}  {check.found}{wanted}")
            if check.hint:
                click.echo(f"  {'':<18}hint: {check.hint}")
    sys.exit(any(check.status == "failed" for check in checks))


@main.group()
def lock() -> None:
    """Write and compare the locks of the three environments."""


@lock.command("check")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def lock_check(as_json: bool) -> None:
    """Compare the locks with what they come from and with each other, offline."""
    from dataclasses import asdict, astuple

    from labtrain.lock.check import check_locks
    from labtrain.lock.derive import stack

    found = check_locks(Path.cwd())
    if as_json:
        click.echo(json.dumps([asdict(disagreement) for disagreement in found], indent=1))
    else:
        routes: dict[str, dict[str, str]] = {}
        rows = [("file", "what", "found", "wanted"), *(astuple(disagreement) for disagreement in found)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows if found else ():
            click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)))
        with suppress(LabtrainError):  # a lock that cannot be read stands in the table
            routes = stack(Path.cwd())
        for route, versions in routes.items():
            click.echo(f"{route:<8}" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if found:
        click.echo("hint: labtrain lock write, or git checkout the file that should not have changed", err=True)
    sys.exit(bool(found))


@lock.command("write")
@click.option("--upgrade", is_flag=True, help="Take the newest releases that pyproject.toml allows.")
def lock_write(upgrade: bool) -> None:
    """Make the locks anew: what is derived always, conda's where its spec changed."""
    from labtrain.lock.write import write_locks

    for line in write_locks(Path.cwd(), upgrade=upgrade):
        click.echo(line)


@main.group()
def store() -> None:
    """List, check and prune checkpoints in a store: a folder, s3://, sftp://, gs://, az://."""


@store.command("ls")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with the manifests.")
def store_ls(url: str, as_json: bool) -> None:
    """Print a line a checkpoint below URL: path, step, megabytes."""
    from labtrain.store import Store

    place = Store(url)
    found = place.checkpoints()
    if as_json:
        rows = [{"path": each.url, "sizes": each.sizes, "manifest": place.manifest(each)} for each in found]
        click.echo(json.dumps(rows, indent=1))
        return
    for each in found:
        end = "  end" if each.finished else ""
        click.echo(f"{each.url}  step {each.step}  {sum(each.sizes.values()) / 1e6:,.1f} MB{end}")


@store.command("check")
@click.argument("url")
def store_check(url: str) -> None:
    """Read every checkpoint below URL and compare it with its manifest; exit code 1 if one is damaged."""
    from labtrain.prune import check
    from labtrain.store import Store

    damaged = False
    for each in Store(url).checkpoints():
        wrong = check(each)
        damaged |= wrong is not None
        click.echo(f"{each.url}  {'whole' if wrong is None else wrong}")
    sys.exit(damaged)


@store.command("prune")
@click.argument("url")
@click.option("--keep-last", type=click.IntRange(min=1), help="Also remove all but so many of each run's newest.")
@click.option("--older-than", type=float, default=24.0, show_default=True, metavar="HOURS",
              help="Of a writer on another machine: what it has not touched for so long.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print what would be removed.")
def store_prune(url: str, keep_last: int | None, older_than: float, dry_run: bool) -> None:
    """Remove what crashes left below URL, and no upload in progress."""
    from labtrain.prune import clear, leftovers, superseded
    from labtrain.store import Store

    place = Store(url)
    for left in leftovers(place, older_than_s=older_than * 3600):
        what = "in progress, kept" if left.in_progress else "left by a crash, removed"
        click.echo(f"{place.url}/{left.path}  {left.size_bytes / 1e6:,.1f} MB, {left.age_s / 3600:.1f} h old: {what}")
        if not left.in_progress and not dry_run:
            clear(place, left)
    for each in superseded(place, keep_last=keep_last) if keep_last else ():
        click.echo(f"{each.url}  step {each.step}: removed")
        if not dry_run:
            place.discard(each.path)


@store.command("export")
@click.argument("target")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def store_export(target: str, file: Path) -> None:
    """Write a checkpoint, or the newest of a run, as a Lightning .ckpt."""
    from labtrain.exchange import export_checkpoint

    export_checkpoint(target, file)


@store.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("url")
def store_import(file: Path, url: str) -> None:
    """Write a Lightning .ckpt as a checkpoint below URL; its weights can then be loaded, and no code is run."""
    from labtrain.exchange import import_checkpoint

    click.echo(import_checkpoint(file, url))


@main.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Keep the experiment here; replaced if a demo made it."
)
def demo(folder: Path | None) -> None:
    """Train one experiment in several ways and compare the bits: the golden run."""
    from labtrain.demo import run_demo

    sys.exit(0 if run_demo(folder) else 1)


def _add_later(name: str, text: str) -> None:
    @main.command(
        name,
        hidden=True,
        help=f"Not there yet: {text}.",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    @click.argument("rest", nargs=-1)
    def later(rest: tuple[str, ...]) -> None:
        raise NotThereYetError(f"labtrain {name} ({text})")


for _name, _text in LATER.items():
    _add_later(_name, _text)

if __name__ == "__main__":
    main()
