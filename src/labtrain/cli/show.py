"""Read runs' names from the command line, and print plain values as JSON."""

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from labtrain.base import exact_json

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class RunType(click.ParamType[Path]):
    """A run's folder, or its id or the beginning of it: labtrain finds it below the experiment's runs."""

    name = "run"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from labtrain.record.receipt import find

        return find(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return complete_run(ctx, param, incomplete)


def complete_run(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the ids of the experiment's runs that begin with a text; the shell completes paths if there is none."""
    from labtrain.record.receipt import runs_folder, with_id

    found = [] if "/" in incomplete else with_id(incomplete, runs_folder())
    # The path first: click's code for bash drops what comes before it.
    return [CompletionItem(incomplete, type="file"), *(CompletionItem(run.name, help=run.parent.name) for run in found)]


def complete_path(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a path, where a URL can also be typed."""
    return [CompletionItem(incomplete, type="file")]


def say_json(value: object) -> None:
    """Write plain values to standard output as JSON of printable ASCII."""
    print(exact_json.dumps(value, indent=1).replace("\x7f", "\\u007f"), flush=True)
