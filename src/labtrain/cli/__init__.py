"""The `labtrain` command: each subcommand parses, calls one function and prints. Data to stdout, the rest to stderr.

Exit codes: 0 yes or same, 1 no or differs, 2 wrong usage or input.
"""

import importlib.util
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from labtrain import __version__
from labtrain.base import console
from labtrain.base.console import quoted, say, styled
from labtrain.base.errors import LabtrainError, missing_package
from labtrain.base.permissions import close_umask
from labtrain.cli import editor, help_page, locks, receipts, runs, stores
from labtrain.cli.show import complete_run, json_option, say_json
from labtrain.cli.upgrade import upgrade


class Main(help_page.Group):
    """Prints a LabtrainError without its traceback and exits with its code; escapes unsafe text in all output."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with console.guarded():
            return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LabtrainError as error:
            self.end(ctx, error)
        except ModuleNotFoundError as error:
            if (known := missing_package(error, ["labtrain", *sys.argv[1:]])) is None:
                raise
            self.end(ctx, known)
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)  # not 1, which is an answer

    @staticmethod
    def end(ctx: click.Context, error: LabtrainError) -> NoReturn:
        """Print an error and exit with its code."""
        from labtrain.base.credentials import without_secrets

        click.echo(f"error: {without_secrets(str(error))}", err=True)
        ctx.exit(error.exit_code)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]}, example="labtrain new digits")
@click.version_option(__version__, prog_name="labtrain")
def main() -> None:
    """Create experiments, check and compare their runs, and manage checkpoints and the locked environment.

    To train, run train.py in an experiment. Exit codes: 0 yes or same, 1 no or different, 2 wrong usage or input.
    """
    close_umask()


@click.command(cls=help_page.Command, example="labtrain new digits")
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--author", default="Anonymous", show_default=True, help="Author's name in the experiment's README.")
def new(target: Path, author: str) -> None:
    """Create an experiment in the new folder DIR.

    The experiment has a model, a dataset and a configuration, and is ready to train. It includes the lock files and
    this version of labtrain, so "make setup" in its folder installs the same environment on any machine.
    """
    from labtrain.project.new import make_experiment, refuse_nested

    refuse_nested(target)
    make_experiment(target, author=author)
    say(target)
    here = Path(sys.prefix, "bin", "python")
    if importlib.util.find_spec("torch") is None:  # labtrain's core
        start = "make train"
    elif Path(shutil.which("python") or "/") == here:
        start = "python train.py"
    else:
        start = f"{quoted(here)} train.py"
    say(f"next: cd {quoted(target)} && {start}", err=True)


@click.command(cls=help_page.Command, example="labtrain update")
def update() -> None:
    """Bring this labtrain into an experiment made by an older one.

    Run it in the experiment's folder. labtrain merges what changed in its template with your edits, as git does, and
    replaces the lock files and its own wheel. It prints what can change results. It commits nothing. The exit code is 1
    if files have conflicts, which git marks in them.
    """
    from labtrain.project.update import lines_of, update_experiment

    receipts.end_in_order()
    updated = update_experiment(Path.cwd())
    if updated is None:
        say(f"up to date: the experiment carries this labtrain, {__version__}")
        say("next: run the newer labtrain's command here, for example ../labtrain/.venv/bin/labtrain update", err=True)
        return
    for line in lines_of(updated):
        say(line)
    sys.exit(bool(updated.conflicts))


@click.command(cls=help_page.Command, example="labtrain digest runs/digits/24c29285cf19")
@click.argument("target", metavar="TARGET", shell_complete=complete_run)
@click.option("--all", "whole", is_flag=True, help="Include optimizer and loop state, not only the weights.")
def digest(target: str, whole: bool) -> None:
    """Print the SHA-256 digest of a run's or checkpoint's weights.

    TARGET is a run's folder or id, a checkpoint's folder or URL, or a .safetensors file. The digest is computed from
    the files. The exit code is 1 if the receipt or the manifest records a different digest.
    """
    from labtrain.checkpoints.locate import digest_target

    found, claimed = digest_target(target, whole=whole)
    say(found)
    if claimed not in (None, found):
        say(f"error: digest mismatch: the receipt or manifest records {claimed}", err=True)
        sys.exit(1)


@click.command(cls=help_page.Command, example="labtrain doctor --gpu required")
@json_option
@click.option(
    "--gpu",
    type=click.Choice(["optional", "required"]),
    default="optional",
    show_default=True,
    help="Whether to fail on a machine without a GPU.",
)
@click.option("--deep", is_flag=True, help="Hash every installed file (takes about 30 seconds).")
@click.option("--fast", is_flag=True, help="Run no kernels on the GPUs.")
@click.option(
    "--checkpoints", metavar="URL", help="Where checkpoints will be saved (checkpoint.url).  [default: runs/]"
)
def doctor(as_json: bool, gpu: str, deep: bool, fast: bool, checkpoints: str | None) -> None:
    """Check this machine and its installed packages against the lock.

    Checks packages, NVIDIA driver, GPUs, shared memory, disk and CUDA libraries. Runs kernels on each GPU, and NCCL
    between several. Each problem has a hint. The exit code is 1 if a check fails.
    """
    from dataclasses import asdict

    from labtrain.environment.doctor import Check, examine

    checks: list[Check] = list(examine(gpu_required=gpu == "required", deep=deep, fast=fast, checkpoints=checkpoints))
    if as_json:
        say_json([asdict(check) for check in checks])
    else:
        colours = {"ok": "32", "warned": "33", "failed": "31", "skipped": "0"}
        group = ""
        for check in checks:
            if check.group != group:
                group = check.group
                say(styled(group, "1"))
            expected = "" if check.status == "ok" else f"   expected: {check.wanted}"
            status = styled(f"{check.status:<8}", colours[check.status])
            say(f"  {check.name:<22}{status}  {check.found}{expected}")
            if check.hint:
                say(f"  {'':<22}hint: {check.hint}")
        failed, warned = (sum(check.status == status for check in checks) for status in ("failed", "warned"))
        say(f"{failed} failed, {warned} warned" if failed or warned else "no problems")
    sys.exit(any(check.status == "failed" for check in checks))


@click.command(cls=help_page.Command, example="labtrain demo --dir demo")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    help="Keep the experiment and the report in this folder. An earlier demo there is replaced.",
)
def demo(folder: Path | None) -> None:
    """Train one experiment in four ways and compare the final weights.

    The four ways: plain, as on an older CPU, in two processes, and killed then resumed. All four must give the digest
    that is recorded in this version of labtrain. Takes one to two minutes. The exit code is 1 if a digest differs.
    """
    from labtrain.project.demo import run_demo

    sys.exit(0 if run_demo(folder) else 1)


@click.command(
    "batch-size",
    cls=help_page.Command,
    example="labtrain batch-size trainer.precision=bf16-mixed",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--mode",
    type=click.Choice(["power", "binsearch"]),
    default="power",
    show_default=True,
    help="power doubles the size until memory is full. binsearch then searches between the last two sizes.",
)
@click.option(
    "--max-trials", type=click.IntRange(min=1), default=25, show_default=True, help="Maximum number of sizes to try."
)
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Training steps for each size.")
def batch_size(overrides: tuple[str, ...], mode: str, max_trials: int, steps: int) -> None:
    """Find the largest data.batch_size that fits on one GPU.

    Run it in an experiment's folder. KEY=VALUE overrides the configuration, as for train.py. Lightning does the
    search. It leaves no files. binsearch subtracts a safety margin of 5 % from its result.
    """
    from labtrain.launch.search import search_batch_size

    search_batch_size(Path.cwd(), list(overrides), mode=mode, max_trials=max_trials, steps=steps)


@click.command(
    "lr-find",
    cls=help_page.Command,
    example="labtrain lr-find --plot rates.png",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--min", "min_rate", type=float, default=1e-8, show_default=True, help="First learning rate.")
@click.option("--max", "max_rate", type=float, default=1.0, show_default=True, help="Last learning rate.")
@click.option(
    "--steps", type=click.IntRange(min=20), default=100, show_default=True, help="Training steps, each with a new rate."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Draw the loss of each rate. An existing file is replaced.",
)
def lr_find(overrides: tuple[str, ...], min_rate: float, max_rate: float, steps: int, plot: Path | None) -> None:
    """Suggest a learning rate.

    Run it in an experiment's folder. KEY=VALUE overrides the configuration, as for train.py. Lightning does the
    search, on one device: it trains with a growing rate and prints the rate at which the loss falls fastest. The model
    needs self.lr or self.learning_rate. It leaves no files, except the plot.
    """
    from labtrain.launch.search import search_rate

    search_rate(Path.cwd(), list(overrides), min_rate=min_rate, max_rate=max_rate, steps=steps, plot=plot)


main.add_section("Experiment", new, update, demo, batch_size, lr_find, editor.schema)
main.add_section(
    "Runs",
    receipts.ls,
    receipts.verify,
    receipts.diff,
    receipts.report,
    receipts.gate,
    receipts.sign,
    receipts.crate,
    receipts.bundle,
    digest,
    runs.note,
    runs.rm,
)
main.add_section("Checkpoints", stores.store)
main.add_section("Environment", doctor, locks.lock, upgrade, editor.completion)
