"""The `labtrain` command: each subcommand parses, calls one function and prints. Data to stdout, the rest to stderr.

Exit codes: 0 yes or same, 1 no or differs, 2 wrong usage or input.
"""

import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from labtrain import __version__
from labtrain.errors import LabtrainError


class Group(click.Group):
    """Prints a LabtrainError as a person reads it, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabtrainError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
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
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), metavar="FILE", help="An SSH key.  [default: git's, or ~/.ssh/id_ed25519]"
)
def sign(run: Path, key: Path | None) -> None:
    """Sign a run's receipt with an SSH key, as git signs commits, and print the signature's file."""
    from labtrain.signature import sign as sign_receipt

    click.echo(sign_receipt(run, key=key))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.zip",
    required=True,
    help="Replaced if it is there.",
)
@click.option("--weights", is_flag=True, help="With the weights of its newest checkpoint, not their digest alone.")
@click.option("--author", metavar="NAME", help="Who trained it.  [default: not said]")
@click.option("--license", "licence", metavar="ID", help="An SPDX identifier, CC-BY-4.0 for one, or a URL.")
def crate(run: Path, output: Path, weights: bool, author: str | None, licence: str | None) -> None:
    """Export a run for an archive or a journal, as an RO-Crate of the profile Workflow Run Crate."""
    from labtrain.crate import write_crate

    click.echo(write_crate(run, output, weights=weights, author=author, licence=licence))


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
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=0), help="Train so many again; 0: none.  [default: to its end]")
@click.option("--from", "start", type=click.IntRange(min=0), default=0, metavar="STEP", help="From a checkpoint.")
@click.option("--segments", is_flag=True, help="Stopped and resumed as the run was, on as many devices.")
@click.option("--devices", type=click.IntRange(min=1), help="On so many.  [default: as the receipt says]")
@click.option("--signers", type=click.Path(path_type=Path), metavar="FILE", help="One of these must have signed it.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def verify(
    run: Path,
    steps: int | None,
    start: int,
    segments: bool,
    devices: int | None,
    signers: Path | None,
    as_json: bool,
) -> None:
    """Train a run again in a scratch place and compare the bits; exit code 1 if they are not the same.

    RUN is a run's folder, or a receipt alone in a clone of its experiment's repository. What it was trained on, data
    and environment, is compared first; what differs is named.
    """
    from dataclasses import asdict

    from labtrain.verification import verify_run

    verdict = verify_run(
        run,
        steps=steps,
        start=start,
        segments=segments,
        devices=devices,
        signers=signers,
        say=lambda line: click.echo(line, err=as_json),
    )
    if as_json:
        click.echo(json.dumps(asdict(verdict), indent=1))
    else:
        click.echo(f"{'no' if verdict.same is False else 'yes':<11}  {verdict.found}")
    causes = any(each.matters for each in verdict.differences)
    sys.exit(causes if verdict.same is None else not verdict.same)


@main.command()
@click.argument("baselines", nargs=-1, required=True, metavar="BASELINE...", type=click.Path(path_type=Path))
@click.option(
    "--seeds", type=click.IntRange(min=2), metavar="N", help="Where bits differ, compare so many on each side."
)
@click.option("--metric", metavar="NAME", help="Which is compared.  [default: checkpoint.monitor]")
@click.option("--margin", type=float, metavar="M", help="The largest difference of its mean that does not matter.")
@click.option("--alpha", type=float, default=0.05, show_default=True, help="Level of the test.")
@click.option("--old-python", type=click.Path(path_type=Path), help="The old environment's: trains seeds that lack.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Leave today's runs there, for next time.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE.html", help="A page of all of it.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def gate(
    baselines: tuple[Path, ...],
    seeds: int | None,
    metric: str | None,
    margin: float | None,
    alpha: float,
    old_python: Path | None,
    keep: Path | None,
    page: Path | None,
    as_json: bool,
) -> None:
    """Train recorded runs again in today's environment: may it be upgraded? Exit code 0 if so, else 1.

    The same bits are a yes. Other bits can be one with --seeds and --margin: where an equivalence test shows that the
    metric's mean moved by less than the margin. BASELINEs that differ in nothing but the seed are one experiment.
    """
    from labtrain.gate import judge_upgrade, keep_runs, summary_of, words_of

    with tempfile.TemporaryDirectory(prefix="labtrain-gate-") as scratch:
        outcomes = judge_upgrade(
            list(baselines),
            scratch=Path(scratch),
            seeds=seeds or 0,
            metric=metric,
            margin=margin,
            alpha=alpha,
            old_python=old_python,
            say=lambda line: click.echo(line, err=as_json),
        )
        if page is not None:
            from labtrain.report import write_report

            runs = [run.run_dir for outcome in outcomes for run in (*outcome.before, *outcome.now)]
            write_report(runs, page)
        if keep is not None:
            keep_runs(outcomes, keep)
    if as_json:
        click.echo(json.dumps([summary_of(outcome) for outcome in outcomes], indent=1))
    for outcome in () if as_json else outcomes:
        click.echo(f"{outcome.experiment:<11}  {words_of(outcome)}")
    sys.exit(not all(outcome.passed for outcome in outcomes))


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    default=Path("report.html"),
    show_default=True,
    help="Replaced if it is there.",
)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Write one page of one or several runs, which asks no network for anything, and print its path.

    RUN is a run's folder, or its receipt; the others are held against the first.
    """
    from labtrain.report import write_report

    write_report(list(runs), output)
    click.echo(output)


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


if __name__ == "__main__":
    main()
