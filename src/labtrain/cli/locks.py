"""`labtrain lock`: check and write."""

import sys
from contextlib import suppress
from pathlib import Path

import click

from labtrain.base.console import say
from labtrain.base.errors import LabtrainError
from labtrain.cli import help_page
from labtrain.cli.show import json_option, say_json


@click.group(cls=help_page.Group, example="labtrain lock check")
def lock() -> None:
    """Compare or update the lock files of the three environments.

    The environments are wheels (requirements.lock), conda (conda-lock.yml) and Nix (flake.lock).
    """


@lock.command("check", cls=help_page.Command, example="labtrain lock check")
@json_option
def lock_check(as_json: bool) -> None:
    """Check that the lock files agree with each other.

    Also compares them with pyproject.toml and environment.yml. Needs no network. The exit code is 1 if they disagree.
    """
    from dataclasses import asdict, astuple

    from labtrain.environment.lock.check import check_locks
    from labtrain.environment.lock.derive import stack

    found = check_locks(Path.cwd())
    if as_json:
        say_json([asdict(disagreement) for disagreement in found])
    else:
        routes: dict[str, dict[str, str]] = {}
        rows = [("file", "what", "found", "expected"), *(astuple(disagreement) for disagreement in found)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows if found else ():
            say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)))
        with suppress(LabtrainError):  # the table already lists a lock that cannot be read
            routes = stack(Path.cwd())
        for route, versions in routes.items():
            say(f"{route:<11}" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if found:
        say("hint: labtrain lock write, or git checkout the file if it should not have changed", err=True)
    sys.exit(bool(found))


@lock.command("write", cls=help_page.Command, example="labtrain lock write --upgrade")
@click.option("--upgrade", is_flag=True, help="Upgrade to the newest releases that pyproject.toml allows.")
def lock_write(upgrade: bool) -> None:
    """Update the lock files from pyproject.toml and environment.yml.

    conda-lock.yml is solved again only if environment.yml has changed. All other lock files are always written.
    """
    from labtrain.environment.lock.write import write_locks

    for line in write_locks(Path.cwd(), upgrade=upgrade):
        say(line)
