"""`labtrain lock`: check and write."""

import sys
from contextlib import suppress
from pathlib import Path

import click

from labtrain.base.console import say
from labtrain.base.errors import LabtrainError
from labtrain.cli.show import say_json


@click.group()
def lock() -> None:
    """Write and compare the locks of the three environments."""


@lock.command("check")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, to standard output.")
def lock_check(as_json: bool) -> None:
    """Compare the locks with what they come from and with each other, offline."""
    from dataclasses import asdict, astuple

    from labtrain.environment.lock.check import check_locks
    from labtrain.environment.lock.derive import stack

    found = check_locks(Path.cwd())
    if as_json:
        say_json([asdict(disagreement) for disagreement in found])
    else:
        routes: dict[str, dict[str, str]] = {}
        rows = [("file", "what", "found", "wanted"), *(astuple(disagreement) for disagreement in found)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows if found else ():
            say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)))
        with suppress(LabtrainError):  # a lock that cannot be read stands in the table
            routes = stack(Path.cwd())
        for route, versions in routes.items():
            say(f"{route:<8}" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if found:
        say("hint: labtrain lock write, or git checkout the file that should not have changed", err=True)
    sys.exit(bool(found))


@lock.command("write")
@click.option("--upgrade", is_flag=True, help="Take the newest releases that pyproject.toml allows.")
def lock_write(upgrade: bool) -> None:
    """Make the locks anew: what is derived always, conda's where its spec changed."""
    from labtrain.environment.lock.write import write_locks

    for line in write_locks(Path.cwd(), upgrade=upgrade):
        say(line)
