"""What is asked of receipts: `labtrain ls`, diff, verify, gate, report, sign, crate."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from labtrain.base.console import own, say, warn
from labtrain.base.errors import ConfigError
from labtrain.cli.show import say_json

SORTED_BY = ("run", "status", "steps", "metric", "started", "seconds")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--key", type=click.Path(path_type=Path), metavar="FILE", help="An SSH key.  [default: git's, or ~/.ssh/id_ed25519]"
)
def sign(run: Path, key: Path | None) -> None:
    """Sign a run's receipt with an SSH key, as git signs commits, and print the signature's file."""
    from labtrain.review.signature import sign as sign_receipt

    say(sign_receipt(run, key=key))


@click.command()
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
    from labtrain.review.crate import write_crate

    say(write_crate(run, output, weights=weights, author=author, licence=licence))


@click.command()
@click.argument("folders", nargs=-1, metavar="[DIR...]", type=click.Path(path_type=Path))
@click.option("--metric", metavar="NAME", help="Which is shown.  [default: checkpoint.monitor, else a test metric]")
@click.option(
    "--sort",
    type=click.Choice([sign + key for key in SORTED_BY for sign in ("", "-")]),
    metavar="KEY",
    default="started",
    show_default=True,
    help=f"{', '.join(SORTED_BY)}; -KEY: downwards.",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def ls(folders: tuple[Path, ...], metric: str | None, sort: str, as_json: bool) -> None:
    """List the runs below DIR, or below runs/: how each stands, its steps, metric and weights digest.

    A run that no process trains, and that no process ended, is shown as killed; start it again and it goes on.
    """
    from labtrain.review import listing

    rows = listing.sort_rows(listing.list_runs(folders or [Path("runs")], metric=metric), sort)
    if as_json:
        say_json([listing.as_json(row) for row in rows])
    for line in listing.lines_of(rows) if rows and not as_json else ():
        say(line)
    if not rows:
        say(f"no run below {', '.join(map(str, folders)) or 'runs'}", err=True)
        click.echo("\nhint: python train.py", err=True)
    for row in rows:
        if row.error is not None:
            warn(row.error)


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Tell what differs between two runs, causes first, and where they part; exit code 1 if anything that matters does.

    A and B are folders of runs, or receipts.
    """
    from dataclasses import asdict

    from labtrain.record.differences import compare, lines_of

    found = compare(a, b)
    if as_json:
        say_json({"same": found.same, **asdict(found)})
    else:
        say(f"A  {a}")
        say(f"B  {b}")
        for line in lines_of(found):
            say(line)
    sys.exit(not found.same)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=0), help="Train so many again; 0: none.  [default: to its end]")
@click.option("--from", "start", type=click.IntRange(min=0), default=0, metavar="STEP", help="From a checkpoint.")
@click.option("--segments", is_flag=True, help="Stopped and resumed as the run was, on as many devices.")
@click.option("--devices", type=click.IntRange(min=1), help="On so many.  [default: as the receipt says]")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="What is other here: data.root=/data, say.")
@click.option("--signers", type=click.Path(path_type=Path), metavar="FILE", help="One of these must have signed it.")
@click.option("--trust", is_flag=True, help="Run the receipt's code without a question, whoever wrote it.")
@click.option("--sandbox", is_flag=True, help="Train it without network and home, by bubblewrap.")
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="Sign the verdict with this SSH key.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def verify(
    run: Path,
    steps: int | None,
    start: int,
    segments: bool,
    devices: int | None,
    changes: tuple[str, ...],
    signers: Path | None,
    trust: bool,
    sandbox: bool,
    key: Path | None,
    as_json: bool,
) -> None:
    """Train a run again in a scratch place and compare the bits; exit code 1 if they are not the same.

    RUN is a run's folder, or a receipt alone in a clone of its experiment's repository. What it was trained on, data
    and environment, is compared first; what differs is named. A run that you did not train yourself is somebody else's
    code: what would run is shown, and you are asked. --steps 0 runs nothing of it.
    """
    from dataclasses import asdict

    from labtrain.review.verification import VerifyOptions, verify_run

    end_in_order()
    options = VerifyOptions(steps=steps, start=start, segments=segments, devices=devices, signers=signers, key=key,
                            changes=parsed(changes), trust=trust, sandbox=sandbox)  # fmt: skip
    verdict = verify_run(
        run,
        options,
        ask=asker(),
        say=lambda line: say(line, err=as_json),
        tick=progress if sys.stderr.isatty() else lambda step: None,
    )
    if as_json:
        say_json(asdict(verdict))
    else:
        say(f"{verdict.word:<11}  {verdict.found}")
    sys.exit(not verdict.agrees)


def end_in_order() -> None:
    """Have SIGTERM and SIGHUP unwind this process, so that its children and scratch folders are gone with it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))


def asker() -> Callable[[list[str]], bool] | None:
    """Return what shows lines to a person on a terminal and asks whether they may run; None: there is no terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask(lines: list[str]) -> bool:
        for line in lines:
            say(line, err=True)
        try:
            return click.confirm("Run it?", default=False, err=True)
        except click.Abort:  # Ctrl-C, or the end of input
            return False

    return ask


def progress(step: int) -> None:
    """Show the last step that was the same, in a line that the next one replaces."""
    sys.stderr.write(f"{own('[G')}{own('[2K')}step {step}: the same so far{own('[G')}")
    sys.stderr.flush()


def parsed(changes: tuple[str, ...]) -> dict[str, Any]:
    """Return KEY=VALUE words as a dict; a value is read as YAML."""
    import yaml

    for change in changes:
        if not change.partition("=")[1]:
            raise ConfigError(f"--set {change}: no KEY=VALUE", hint="--set data.root=/data")
    return {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in changes)}


@click.command()
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
@click.option("--trust", is_flag=True, help="Run the baselines' code without a question, whoever wrote it.")
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
    trust: bool,
    as_json: bool,
) -> None:
    """Train recorded runs again in today's environment: may it be upgraded? Exit code 0 if so, else 1.

    The same bits are a yes. Other bits can be one with --seeds and --margin: where an equivalence test shows that the
    metric's mean moved by less than the margin. BASELINEs that differ in nothing but the seed are one experiment.
    """
    from labtrain.base.untrusted import scratch_folder
    from labtrain.review.gate import GateOptions, judge_upgrade, keep_runs, summary_of, words_of, write_page
    from labtrain.review.report import check_page

    end_in_order()
    if page is not None:
        check_page(page)
    options = GateOptions(
        seeds=seeds or 0, metric=metric, margin=margin, alpha=alpha, old_python=old_python, trust=trust
    )
    with scratch_folder("labtrain-gate-") as scratch:
        outcomes = judge_upgrade(
            list(baselines), options, scratch=scratch, ask=asker(), say=lambda line: say(line, err=as_json)
        )
        if as_json:
            say_json([summary_of(outcome) for outcome in outcomes])
        for outcome in () if as_json else outcomes:
            say(f"{outcome.experiment:<11}  {words_of(outcome)}")
        try:
            if page is not None:
                write_page(outcomes, page)
        finally:
            if keep is not None:
                for kept in keep_runs(outcomes, keep):
                    say(f"kept         {kept}", err=as_json)
    sys.exit(not all(outcome.passed for outcome in outcomes))


@click.command()
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
@click.option(
    "--signers", type=click.Path(path_type=Path), metavar="FILE", help="Whose signed verdicts count.  [default: git's]"
)
def report(runs: tuple[Path, ...], output: Path, signers: Path | None) -> None:
    """Write one page of one or several runs, which asks no network for anything, and print its path.

    RUN is a run's folder, or its receipt; the others are held against the first.
    """
    from labtrain.review.report import write_report

    write_report(list(runs), output, signers=signers)
    say(output)
