"""The `labtrain` command: each subcommand parses, calls one function and prints. Data to stdout, the rest to stderr.

Exit codes: 0 yes or same, 1 no or differs, 2 wrong usage or input.
"""

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import click

from labtrain import __version__
from labtrain.base import console
from labtrain.base.console import quoted, say, styled
from labtrain.base.errors import LabtrainError
from labtrain.base.permissions import close_umask
from labtrain.cli import locks, receipts, stores
from labtrain.cli.show import say_json


class Group(click.Group):
    """Prints a LabtrainError as a person reads it, and exits with its code; shows nothing from outside as it is."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with console.guarded():
            return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LabtrainError as error:
            from labtrain.base.credentials import without_secrets

            click.echo(f"error: {without_secrets(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(128 + signal.SIGINT)  # not 1, which is an answer


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="labtrain")
def main() -> None:
    """Reproducible training: experiments, their environment and their receipts."""
    close_umask()


@main.command()
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--author", default="Anonymous", help="Your name, for its README.")
def new(target: Path, author: str) -> None:
    """Make a new experiment in DIR."""
    from labtrain.project.new import make_experiment

    make_experiment(target, author=author)
    say(target)
    here = Path(sys.prefix, "bin", "python")
    activated = Path(shutil.which("python") or "/") == here
    say(f"next: cd {quoted(target)} && {'python' if activated else quoted(here)} train.py", err=True)


@main.command()
@click.argument("target", metavar="TARGET")
@click.option("--all", "whole", is_flag=True, help="Of the whole training state, not the weights alone.")
def digest(target: str, whole: bool) -> None:
    """Print the sha256 of the weights of a run, a checkpoint folder or a .safetensors file.

    Computed from the files, not read from the receipt; exit code 1 if the receipt or manifest says another.
    """
    from labtrain.checkpoints.locate import digest_target

    found, claimed = digest_target(target, whole=whole)
    say(found)
    if claimed not in (None, found):
        say(f"error: its own record says {claimed}", err=True)
        sys.exit(1)


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

    from labtrain.environment.doctor import Check, examine

    checks: list[Check] = list(examine(gpu_required=gpu == "required", deep=deep, checkpoints=checkpoints))
    if as_json:
        say_json([asdict(check) for check in checks])
    else:
        colours = {"ok": "32", "failed": "31", "skipped": "0"}
        group = ""
        for check in checks:
            if check.group != group:
                group = check.group
                say(styled(group, "1"))
            wanted = "" if check.status == "ok" else f"   wanted: {check.wanted}"
            status = styled(f"{check.status:<8}", colours[check.status])
            say(f"  {check.name:<18}{status}  {check.found}{wanted}")
            if check.hint:
                say(f"  {'':<18}hint: {check.hint}")
    sys.exit(any(check.status == "failed" for check in checks))


@main.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Keep the experiment here; replaced if a demo made it."
)
def demo(folder: Path | None) -> None:
    """Train one experiment in several ways and compare the bits: the golden run."""
    from labtrain.project.demo import run_demo

    sys.exit(0 if run_demo(folder) else 1)


@main.command("batch-size", context_settings={"ignore_unknown_options": True})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--mode", type=click.Choice(["power", "binsearch"]), default="power", show_default=True)
@click.option("--max-trials", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="That each trial trains.")
def batch_size(overrides: tuple[str, ...], mode: str, max_trials: int, steps: int) -> None:
    """Print the largest data.batch_size that fits on one GPU; in an experiment's folder. Leaves no file.

    Lightning's search: power doubles until the memory is full, binsearch then goes between, and takes 5 % off.
    """
    from labtrain.launch.batch_size import search

    search(Path.cwd(), list(overrides), mode=mode, max_trials=max_trials, steps=steps)


for command in (
    receipts.ls,
    receipts.diff,
    receipts.verify,
    receipts.report,
    receipts.gate,
    receipts.sign,
    receipts.crate,
    locks.lock,
    stores.store,
):
    main.add_command(command)
