"""`labtrain upgrade`: the plan, and the upgrade on a branch of its own."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from labtrain.base.console import quoted, say
from labtrain.cli import help_page
from labtrain.cli.receipts import PATH, RUN, asker, end_in_order
from labtrain.cli.show import json_option, say_json

if TYPE_CHECKING:
    from labtrain.project.upgrade import Upgrade

KEPT = "labtrain and its own packages keep their pins: labtrain update brings a newer labtrain"


@click.command(cls=help_page.Command, example="labtrain upgrade --package einops")
@click.argument("baselines", nargs=-1, metavar="[BASELINE...]", type=RUN)
@click.option("--plan", "only_plan", is_flag=True, help="Show newer releases and what ends when; change nothing.")
@click.option(
    "--package", "packages", multiple=True, metavar="NAME[==VERSION]", help="Raise only this package. Repeatable."
)
@click.option("--branch", metavar="NAME", help="Branch to create.  [default: upgrade-YYYY-MM-DD]")
@click.option("--dir", "tree", type=PATH, metavar="DIR", help="Folder to create.  [default: ../REPOSITORY-BRANCH]")
@click.option("--seeds", type=click.IntRange(min=2), metavar="N", help="If results differ, compare this many seeds.")
@click.option("--metric", metavar="NAME", help="Metric to compare.  [default: checkpoint.monitor]")
@click.option("--margin", type=float, metavar="M", help="Largest acceptable difference of the metric's mean.")
@click.option("--trust", is_flag=True, help="Run the baselines' code without asking, even if it is not yours.")
@json_option
def upgrade(
    baselines: tuple[Path, ...],
    only_plan: bool,
    packages: tuple[str, ...],
    branch: str | None,
    tree: Path | None,
    seeds: int | None,
    metric: str | None,
    margin: float | None,
    trust: bool,
    as_json: bool,
) -> None:
    """Raise the locked packages on a new branch, and check the results.

    Run it in an experiment or in labtrain's repository. It creates a git worktree beside the repository and leaves your
    files, branch and environment unchanged. In the worktree it raises the pins, writes the locks, creates the new
    environment, runs "labtrain doctor", and trains each BASELINE again ("labtrain gate"). The commit on the branch
    holds the verdict. BASELINE is a run; by default the runs in baselines/, and in labtrain's repository the golden
    run. The exit code is 0 if all pass or nothing can be raised, else 1.
    """
    from labtrain.project.upgrade import UpgradeOptions, default_branch, make_upgrade
    from labtrain.review.gate import GateOptions

    if only_plan:
        show_plan(as_json=as_json)
        return
    end_in_order()
    judged = GateOptions(seeds=seeds or 0, metric=metric, margin=margin, old_python=Path(sys.executable), trust=trust)
    options = UpgradeOptions(
        packages=packages, baselines=baselines, branch=branch or default_branch(), tree=tree, judged=judged
    )
    made = make_upgrade(Path.cwd(), options, ask=asker(), say=lambda line: say(line, err=as_json))
    show_upgrade(made, as_json=as_json)
    sys.exit(made is not None and not made.passed)


def show_upgrade(made: "Upgrade | None", *, as_json: bool) -> None:
    """Print the verdict, and how to switch to the upgrade or to throw it away."""
    from dataclasses import asdict

    from labtrain.environment.lock.write import is_labtrain

    if as_json:
        fields = {} if made is None else {"passed": made.passed, **asdict(made)}
        say_json({key: str(value) if isinstance(value, Path) else value for key, value in fields.items()})
        return
    if not is_labtrain(Path.cwd()):
        say(KEPT)
    if made is None:
        say("nothing to raise: no newer release fits pyproject.toml (labtrain upgrade --plan)")
        return
    tree = os.path.relpath(made.tree)
    remove = f"git worktree remove --force {quoted(tree)}"
    if made.page is not None:
        say(f"report       {os.path.relpath(made.page)}")
    say(f"branch       {made.branch}, in {tree}")
    say(f"verdict      {'yes' if made.passed else 'no'}")
    say("")
    say(f"to switch:   git merge {made.branch} && make setup && {remove}")
    say(f"to discard:  {remove} && git branch -D {made.branch}")


def show_plan(*, as_json: bool) -> None:
    """Print the newer releases, what ends when, and what this machine's driver and GPUs still run."""
    from dataclasses import asdict

    from labtrain.environment.doctor import cliffs, nvidia
    from labtrain.environment.lock.newer import newer_releases
    from labtrain.environment.lock.write import is_labtrain

    releases = newer_releases(Path.cwd())
    ends, checks = list(cliffs.shown_ends()), nvidia.check_ends(nvidia.ask())
    if as_json:
        say_json({"packages": [asdict(each) for each in releases], "ends": ends,
                  "machine": [asdict(each) for each in checks]})  # fmt: skip
        return
    rows = [("package", "locked", "allowed", "newest")]
    rows += [(each.name, each.locked, each.allowed, each.newest) for each in releases if each.locked != each.newest]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows if len(rows) > 1 else ():
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    raised = sum(each.locked != each.allowed for each in releases)
    say(f"{raised} of {len(releases)} packages in pyproject.toml can be raised{': labtrain upgrade' if raised else ''}")
    if not is_labtrain(Path.cwd()):
        say(KEPT)
    say("")
    say("what ends when")
    for line in ends:
        say(f"  {line}")
    say("")
    say("this machine")
    for check in checks:
        say(f"  {check.name:<14} {check.found}{f'; hint: {check.hint}' if check.hint else ''}")
