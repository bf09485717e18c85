"""Print plain values as JSON."""

import click

from labtrain.base import exact_json

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def say_json(value: object) -> None:
    """Write plain values to standard output as JSON of printable ASCII."""
    print(exact_json.dumps(value, indent=1).replace("\x7f", "\\u007f"), flush=True)
