"""JSON that restores exactly what was written, including keys that are not text, NaN and infinity.

A mapping with keys that are not text is written as ``{"(items)": [[3, 10.0], [7, 2.0]]}``, and NaN as
``{"(float)": "nan"}``. Everything else is ordinary JSON. Keys keep their order.
"""

import json
import math
from typing import Any

from labtrain.base.contracts import Options
from labtrain.base.files import text_sha256

ITEMS, FLOAT = "(items)", "(float)"


def dumps(
    value: object, *, indent: int | None = None, sort_keys: bool = False, separators: tuple[str, str] | None = None
) -> str:
    """Return a value of plain containers, numbers and texts as JSON; the options are those of json.dumps."""
    return json.dumps(plain(value), allow_nan=False, indent=indent, sort_keys=sort_keys, separators=separators)


def loads(text: str | bytes) -> Any:
    """Return the value that was passed to `dumps`."""
    return json.loads(text, object_hook=restored)


def plain(node: object) -> object:
    """Return a value that JSON can hold."""
    if isinstance(node, dict):
        if all(isinstance(key, str) for key in node) and not node.keys() & {ITEMS, FLOAT}:
            return {key: plain(value) for key, value in node.items()}
        return {ITEMS: [[plain(key), plain(value)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    if isinstance(node, float) and not math.isfinite(node):
        return {FLOAT: repr(float(node))}
    return node


def restored(node: Options) -> object:
    """Return the value of a JSON object; an object_hook for json.loads."""
    if node.keys() == {ITEMS}:
        return dict(node[ITEMS])
    return float(node[FLOAT]) if node.keys() == {FLOAT} else node


def digest_of(tree: dict[str, object]) -> str:
    """Return the sha256 over a mapping without its key `digest`: ASCII JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in tree.items() if key != "digest"}
    return text_sha256(dumps(rest, sort_keys=True, separators=(",", ":")))
