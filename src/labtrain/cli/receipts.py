"""The commands about finished runs: `labtrain ls`, verify, diff, report, gate, sign, crate."""

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from labtrain.base.console import few, own, quoted, say, shown, warn
from labtrain.base.errors import ConfigError
from labtrain.cli import help_page
from labtrain.cli.show import RunType, complete_run, json_option, say_json

if TYPE_CHECKING:
    from labtrain.review.gate import Outcome

PATH = click.Path(path_type=Path, readable=False)  # labtrain names the owner, and who can open it
COUNT = click.IntRange(min=0)
RUN = RunType()
F = TypeVar("F", bound=Callable[..., None])
SORTED_BY = ("run", "status", "steps", "metric", "started", "seconds", "size")


class Tells(TypedDict):
    """Who receives a verification's findings and steps."""

    say: Callable[[str], None]
    tick: Callable[[int], None]


class OneRunCommand(help_page.Command):
    """A command for one run. Given several, as from runs/x/*, it shows the loop to type."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        super().parse_args(ctx, args)
        if ctx.args:
            runs = [ctx.params["run"], *ctx.args]
            raise ConfigError(
                f"{ctx.command_path} takes one run, got {len(runs)}",
                hint=f'for run in {" ".join(map(quoted, runs))}; do {ctx.command_path} "$run"; done',
            )
        return ctx.args


@click.command(cls=OneRunCommand, example="labtrain sign runs/digits/24c29285cf19")
@click.argument("run", type=RUN)
@click.option(
    "--key",
    type=PATH,
    metavar="FILE",
    help="SSH private key.  [default: git's signing key, else ~/.ssh/id_ed25519]",
)
@click.option(
    "--model-signing",
    "model_key",
    type=PATH,
    metavar="KEY.pem",
    help="Write model.sig with this elliptic curve key instead, for OpenSSF's model_signing.",
)
def sign(run: Path, key: Path | None, model_key: Path | None) -> None:
    """Sign a run's receipt with an SSH key.

    The format is that of signed git commits. Prints the path of the signature file. With --model-signing it signs
    receipt, trail and checkpoints, so that a reviewer's tool can verify them: model_signing verify key.
    """
    from labtrain.review.openssf import sign_model
    from labtrain.review.signature import sign as sign_receipt

    if model_key is not None:
        say(sign_model(run, key=model_key))
    if model_key is None or key is not None:
        say(sign_receipt(run, key=key))


def crate_options(command: F) -> F:
    """Add the argument and the options that `labtrain crate` and `labtrain bundle` share."""
    added = (
        click.argument("run", type=RUN),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE.zip",
            required=True,
            help="File to write. An existing file is replaced.",
        ),
        click.option(
            "--weights", is_flag=True, help="Include the weights of the newest checkpoint, not only their digest."
        ),
        click.option("--author", metavar="NAME", help="Name of the person who trained the run.  [default: none]"),
        click.option("--license", "licence", metavar="ID", help="SPDX license identifier such as CC-BY-4.0, or a URL."),
    )
    for each in reversed(added):
        command = each(command)
    return command


@click.command(cls=help_page.Command, example="labtrain crate runs/digits/24c29285cf19 -o run.zip")
@crate_options
def crate(run: Path, output: Path, weights: bool, author: str | None, licence: str | None) -> None:
    """Export a run as an RO-Crate archive.

    Journals and data repositories accept this format. The crate follows the Workflow Run Crate profile.
    """
    from labtrain.review.crate import write_crate

    say(write_crate(run, output, weights=weights, author=author, licence=licence))


@click.command(cls=help_page.Command, example="labtrain bundle runs/digits/24c29285cf19 -o run.zip")
@crate_options
def bundle(run: Path, output: Path, weights: bool, author: str | None, licence: str | None) -> None:
    """Write a run and all that verifying it needs to one zip.

    "labtrain verify FILE.zip" trains it again on any machine. The zip is an RO-Crate that also has the lock, the
    labtrain wheel, the configuration files, and data in the experiment's folder up to 100 MB.
    """
    from labtrain.review.crate import write_crate

    say(write_crate(run, output, weights=weights, author=author, licence=licence, whole=True))


@click.command(cls=help_page.Command, example="labtrain ls --sort -metric")
@click.argument("folders", nargs=-1, metavar="[DIR...]", type=PATH)
@click.option("--metric", metavar="NAME", help="Metric to show.  [default: checkpoint.monitor, else a test metric]")
@click.option(
    "--sort",
    type=click.Choice([sign + key for key in SORTED_BY for sign in ("", "-")]),
    metavar="KEY",
    default="started",
    show_default=True,
    help=f"One of {', '.join(SORTED_BY)}. -KEY sorts in descending order.",
)
@json_option
def ls(folders: tuple[Path, ...], metric: str | None, sort: str, as_json: bool) -> None:
    """List runs with their status, metric, size and differences.

    Searches DIR. Without DIR it searches the experiment's runs: paths.runs in conf/config.yaml, else runs/. Runs whose
    process died are shown as killed. To resume such a run, repeat the command that started it.
    """
    from labtrain.record.receipt import runs_folder
    from labtrain.review.catalog import listing

    folders = folders or (runs_folder(),)
    rows = listing.sort_rows(listing.list_runs(folders, metric=metric), sort)
    if as_json:
        say_json([listing.as_json(row) for row in rows])
    elif rows:
        width = shutil.get_terminal_size((listing.WIDTH, 24)).columns if sys.stdout.isatty() else listing.WIDTH
        lines, left_out = listing.lines_of(rows, width=width)
        for line in lines:
            say(line)
        if left_out:
            say(f"no room for {few(left_out)}, which differ too (labtrain ls --json)", err=True)
    if not rows:
        say(f"no runs found in {', '.join(map(shown, folders))}", err=True)
        click.echo("\nhint: python train.py", err=True)
    for row in rows:
        if row.error is not None:
            warn(row.error)


@click.command(cls=help_page.Command, example="labtrain diff runs/digits/24c29285cf19 runs/digits/7d0e6ca1b5f2")
@click.argument("a", type=RUN)
@click.argument("b", type=RUN)
@json_option
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show what differs between two runs, possible causes first.

    A and B are run folders, run ids or receipts. Also shows the first step at which the runs differ. The exit code is 1
    if the results differ, or anything that can change results.
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


@click.command(cls=OneRunCommand, example="labtrain verify runs/digits/24c29285cf19")
@click.argument("run", shell_complete=complete_run)
@click.option("--steps", type=COUNT, help="Steps to rerun (0: check metadata only).  [default: all]")
@click.option("--from", "start", type=COUNT, default=0, metavar="STEP", help="Start from the checkpoint of this step.")
@click.option("--segments", is_flag=True, help="Stop and resume at the same steps, on the same device counts.")
@click.option("--devices", type=click.IntRange(min=1), help="Number of devices.  [default: from the receipt]")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE",
              help="Override a configuration key on this machine, such as data.root=/data.")  # fmt: skip
@click.option("--signers", type=PATH, metavar="FILE",
              help="Require a signature by one of these signers (SSH allowed_signers file).")  # fmt: skip
@click.option("--trust", is_flag=True, help="Run the receipt's code without asking, even if it is not yours.")
@click.option("--sandbox", is_flag=True, help="Run without network or home directory (needs bubblewrap).")
@click.option("--key", type=PATH, metavar="FILE", help="Sign the verdict with this SSH private key.")
@click.option("--receipt", metavar="PATH", help="The receipt to verify, if a repository has several.")
@click.option("--locked", is_flag=True, help="Train in the environment of the run's own lock, made for it if needed.")
@json_option
def verify(
    run: str, changes: tuple[str, ...], receipt: str | None, locked: bool, as_json: bool, **options: Any
) -> None:
    """Train a run again from its receipt and compare the results.

    RUN is a run's folder or id, or a receipt (a JSON file of any name) in a clone of the experiment's repository.
    labtrain compares data and environment first and names every difference. Then it trains in a temporary folder and
    compares each step bit by bit. The exit code is 1 if the results differ.

    RUN can also be a git repository (URL, PATH, URL@COMMIT) or a bundle.zip. Then labtrain makes the environment of its
    lock, and trains in the sandbox unless you give --trust.

    If you did not train the run yourself, labtrain shows the code that would run and asks you. With --steps 0, none of
    that code runs.
    """
    from dataclasses import asdict

    from labtrain.review.foreign.judge import foreign_in, verify_foreign, verify_locked
    from labtrain.review.verification import VerifyOptions, verify_run

    end_in_order()
    judged = VerifyOptions(changes=parsed(changes), **options)
    tells: Tells = {
        "say": lambda line: say(line, err=as_json),
        "tick": progress if sys.stderr.isatty() else lambda step: None,
    }
    facts: dict[str, str | float] = {}
    if (target := foreign_in(run)) is not None:
        verdict, facts = verify_foreign(target, judged, receipt=receipt, own_sha256=own_wheel_sha256, **tells)
    elif receipt is not None:
        raise ConfigError(f"{run} is not a git repository, so --receipt cannot be used", hint="labtrain verify RUN")
    elif locked and judged.steps != 0:
        place = RUN.convert(run, None, None)
        verdict = verify_locked(place, judged, own_sha256=own_wheel_sha256, ask=asker(), **tells)
    else:
        verdict = verify_run(RUN.convert(run, None, None), judged, ask=asker(), **tells)
    if as_json:
        say_json(asdict(verdict) | ({"about": facts} if facts else {}))
    else:
        say(f"{verdict.word:<11}  {verdict.found}")
    sys.exit(not verdict.agrees)


def own_wheel_sha256() -> str:
    """Return the sha256 of the wheel that `labtrain new` packs into an experiment."""
    from tempfile import TemporaryDirectory

    from labtrain.base.files import file_sha256
    from labtrain.project.carried import build_wheel

    with TemporaryDirectory(prefix="labtrain-") as folder:
        return file_sha256(build_wheel(Path(folder)))


def end_in_order() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that child processes and scratch folders are cleaned up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))


def asker() -> Callable[[list[str]], bool] | None:
    """Return a function that shows code on the terminal and asks whether to run it; None without a terminal."""
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
    """Show the last step that was identical, in a line that the next call overwrites."""
    sys.stderr.write(f"{own('[G')}{own('[2K')}step {step}: identical so far{own('[G')}")
    sys.stderr.flush()


def parsed(changes: tuple[str, ...]) -> dict[str, object]:
    """Return KEY=VALUE words as a dict; a value is read as YAML."""
    import yaml

    for change in changes:
        if not change.partition("=")[1]:
            raise ConfigError(f"--set {change}: must be KEY=VALUE", hint="--set data.root=/data")
    return {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in changes)}


@click.command(cls=help_page.Command, example="labtrain gate runs/digits/24c29285cf19")
@click.argument("baselines", nargs=-1, required=True, metavar="BASELINE...", type=RUN)
@click.option("--seeds", type=click.IntRange(min=2), metavar="N",
              help="If results differ, compare this many seeds before and after the upgrade.")  # fmt: skip
@click.option("--metric", metavar="NAME", help="Metric to compare.  [default: checkpoint.monitor]")
@click.option("--margin", type=float, metavar="M", help="Largest acceptable difference of the metric's mean.")
@click.option(
    "--alpha", type=float, default=0.05, show_default=True, help="Significance level of the equivalence test."
)
@click.option(
    "--old-python",
    type=PATH,
    help="Python of the old environment, to train seeds that have no baseline.",
)
@click.option("--keep", type=PATH, metavar="DIR", help="Save the new runs in DIR, as the next baselines.")
@click.option("--report", "page", type=PATH, metavar="FILE.html", help="Write an HTML report.")
@click.option("--trust", is_flag=True, help="Run the baselines' code without asking, even if it is not yours.")
@json_option
def gate(
    baselines: tuple[Path, ...], seeds: int | None, keep: Path | None, page: Path | None, as_json: bool, **options: Any
) -> None:
    """Check whether an environment upgrade changes past results.

    Trains each BASELINE again in the current environment. BASELINE is a run's folder, id or receipt. The check passes
    if the results are identical. With --seeds and --margin it also passes if an equivalence test shows that the
    metric's mean changed by less than the margin. Baselines that differ only in their seed count as one experiment.
    The exit code is 0 if all pass, else 1.
    """
    from labtrain.base.untrusted import scratch_folder
    from labtrain.review.gate import GateOptions, judge_upgrade
    from labtrain.review.report import check_page

    end_in_order()
    if page is not None:
        check_page(page)
    judged = GateOptions(seeds=seeds or 0, **options)
    with scratch_folder("labtrain-gate-") as scratch:
        outcomes = judge_upgrade(
            list(baselines), judged, scratch=scratch, ask=asker(), say=lambda line: say(line, err=as_json)
        )
        show_outcomes(outcomes, keep, page, as_json=as_json)
    sys.exit(not all(outcome.passed for outcome in outcomes))


def show_outcomes(outcomes: list["Outcome"], keep: Path | None, page: Path | None, *, as_json: bool) -> None:
    """Print the results of `labtrain gate`, write its report and keep its runs."""
    from labtrain.review.gate import keep_runs, summary_of, words_of, write_page

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


@click.command(cls=help_page.Command, example="labtrain report runs/digits/24c29285cf19 -o report.html")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=RUN)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="FILE.html",
    default=Path("report.html"),
    show_default=True,
    help="File to write. An existing file is replaced.",
)
@click.option(
    "--signers",
    type=PATH,
    metavar="FILE",
    help="Whose signed verdicts to trust (SSH allowed_signers file).  [default: git's]",
)
def report(runs: tuple[Path, ...], output: Path, signers: Path | None) -> None:
    """Write a self-contained HTML page about one or more runs.

    RUN is a run's folder, id or receipt. The page compares all runs with the first and loads nothing from the network.
    Prints the path of the page.
    """
    from labtrain.review.report import write_report

    write_report(list(runs), output, signers=signers)
    say(output)
