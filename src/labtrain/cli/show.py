"""Read runs' names from the command line, and print plain values as JSON."""

from pathlib import Path

import click

from labtrain.base import exact_json

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class RunType(click.ParamType[Path]):
    """A run's folder, or its id or the beginning of it: labtrain finds it below the experiment's runs."""

    name = "run"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from labtrain.record.receipt import find

        return find(value)


def say_json(value: object) -> None:
    """Write plain values to standard output as JSON of printable ASCII."""
    print(exact_json.dumps(value, indent=1).replace("\x7f", "\\u007f"), flush=True)
