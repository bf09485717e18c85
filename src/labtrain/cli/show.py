"""Print plain values as JSON."""

from labtrain.base import exact_json


def say_json(value: object) -> None:
    """Write plain values to standard output as JSON of printable ASCII."""
    print(exact_json.dumps(value, indent=1).replace("\x7f", "\\u007f"), flush=True)
