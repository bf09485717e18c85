"""JSON that gives back what went in: keys that are no texts, and NaN and infinity, which JSON does not have.

A mapping with other keys than texts is written as ``{"(items)": [[3, 10.0], [7, 2.0]]}``, a number that JSON lacks as
``{"(float)": "nan"}``. Everything else is ordinary JSON. Keys keep their order.
"""

import hashlib
import json
import math
from typing import Any

from labtrain.base.contracts import Options

ITEMS, FLOAT = "(items)", "(float)"


def dumps(value: object, **options: Any) -> str:
    """Return a value of plain containers, numbers and texts as JSON; `options` are those of json.dumps."""
    return json.dumps(plain(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """Return what `dumps` was given."""
    return json.loads(text, object_hook=restored)


def plain(node: object) -> object:
    """Return a value as JSON can hold it."""
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
    """Return what an object of JSON stands for; the hook of a parser."""
    if node.keys() == {ITEMS}:
        return dict(node[ITEMS])
    return float(node[FLOAT]) if node.keys() == {FLOAT} else node


def digest_of(tree: dict[str, object]) -> str:
    """Return the sha256 over a mapping without its own `digest`: JSON with sorted keys and no spaces, in ASCII."""
    rest = {key: value for key, value in tree.items() if key != "digest"}
    return hashlib.sha256(dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
