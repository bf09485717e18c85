"""The commands that change what is kept of a run: `labtrain note` and `labtrain rm`."""

import sys
from pathlib import Path

import click

from labtrain.base.console import quoted, say
from labtrain.base.errors import ConfigError
from labtrain.cli import help_page
from labtrain.cli.show import RunType, complete_run

RUN = RunType()


@click.command(cls=help_page.Command, example='labtrain note runs/digits/24c29285cf19 "learning rate too high"')
@click.argument("run", type=RUN)
@click.argument("text")
def note(run: Path, text: str) -> None:
    """Keep a note about a run.

    RUN is a run's folder or id. The note replaces an earlier one, and an empty TEXT removes it. "labtrain ls", the
    report and labtrain.runs show it. It is in the run's folder, but not in the receipt, so signatures stay valid.
    """
    from labtrain.review.catalog.notes import write_note

    write_note(run, text)


@click.command(cls=help_page.Command, example="labtrain rm runs/digits/24c29285cf19")
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path), shell_complete=complete_run
)
@click.option("--yes", is_flag=True, help="Remove without asking.")
def rm(runs: tuple[Path, ...], yes: bool) -> None:
    """Remove runs with their checkpoints, also those in a store.

    RUN is a run's folder or id. labtrain prints what it would remove and asks. It refuses a run that is training. If a
    removal is interrupted, the run is no longer listed, and the same command removes the rest.
    """
    from labtrain.review.catalog.removal import plan, remove

    planned = plan(runs)
    for removal in planned:
        say(removal.says)
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ConfigError(
                "nothing was removed: there is no terminal to ask on",
                hint=f"labtrain rm --yes {' '.join(map(quoted, runs))}",
            )
        if not click.confirm(f"Remove {len(planned)} run{'s' if len(planned) > 1 else ''}?", default=False, err=True):
            raise ConfigError("nothing was removed", hint="labtrain rm --yes RUN removes without asking")
    for removal in planned:
        remove(removal)
