"""`labtrain lock`: check, write and export."""

import sys
from contextlib import suppress
from pathlib import Path

import click

from labtrain.base.console import say, warn
from labtrain.base.errors import LabtrainError
from labtrain.cli import help_page
from labtrain.cli.show import json_option, say_json


@click.group(cls=help_page.Group, example="labtrain lock check")
def lock() -> None:
    """Compare, update or export the lock files of the environments.

    These are wheels (requirements.lock), conda (conda-lock.yml, and conda-lock-cpu.yml without CUDA), pixi (pixi.lock)
    and Nix (flake.lock).
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
        if not found:
            say("all locks agree")
    if found:
        intended = "after a change of pyproject.toml or environment.yml: labtrain lock write"
        say(f"hint: git checkout {found[0].file}; {intended}", err=True)
    sys.exit(bool(found))


@lock.command("write", cls=help_page.Command, example="labtrain lock write --upgrade")
@click.option("--upgrade", is_flag=True, help="Upgrade to the newest releases that pyproject.toml allows.")
def lock_write(upgrade: bool) -> None:
    """Update the lock files from pyproject.toml and environment.yml.

    The conda locks are solved again only if environment.yml has changed. All other lock files are always written. If
    one of them cannot be written, all stay as they were.
    """
    from labtrain.environment.lock.write import write_locks

    for line in write_locks(Path.cwd(), upgrade=upgrade):
        say(line)


@lock.command("export", cls=help_page.Command, example="labtrain lock export --wheels wheels")
@click.option("--format", "kind", type=click.Choice(["pylock"]), default="pylock", help="pylock: PEP 751.")
@click.option("--wheels", metavar="DIR", help="A folder with the files for this Python, from pip download.")
@click.option("-o", "--output", metavar="FILE", default="pylock.toml", help="pylock.toml or pylock.NAME.toml.")
def lock_export(kind: str, wheels: str | None, output: str) -> None:
    """Write requirements.lock as pylock.toml, to install with uv or pip.

    The file has hashes, and paths into a folder of wheels, relative to itself. Without --wheels it is for Python 3.12
    and expects the files in `wheels`; they need not be there yet.
    """
    from labtrain.environment.lock.pins import require_locks
    from labtrain.environment.lock.pylock import export_pylock

    require_locks(Path.cwd())
    written = export_pylock(Path.cwd(), Path(output), Path(wheels) if wheels else None)
    python = str(written.requires_python).removeprefix("==").removesuffix(".*")
    say(f"{output}: {len(written.packages)} packages for Python {python}")
    if python != (here := f"{sys.version_info[0]}.{sys.version_info[1]}"):
        warn(f"this is Python {here}: with --wheels DIR the file is for this one")
