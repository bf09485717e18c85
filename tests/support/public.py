"""What people rely on: public names, commands, configuration keys and the fields of a receipt.

`make public` records it in tests/golden/public.json; tests/quick/test_public.py compares.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import labtrain
from labtrain import augment
from labtrain.cli import main

PACKAGE = Path(labtrain.__file__).parent
FILE = Path(__file__).parents[2] / "tests" / "golden" / "public.json"
GROUPS = ("checkpoint", "determinism", "logger", "speed", "trainer")


def names() -> dict[str, str]:
    """Return the parameters of each public name, without their types."""
    found = {name: parameters(getattr(labtrain, name)) for name in sorted(labtrain.__all__) if name != "augment"}
    return found | {f"augment.{name}": parameters(getattr(augment, name)) for name in sorted(augment.__all__)}


def parameters(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:  # a Protocol's
        return ""
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def commands(command: click.Command = main, name: str = "labtrain") -> Iterator[tuple[str, list[str]]]:
    """Yield each command with its arguments and options: names, type, default, and whether it is required."""
    yield name, sorted(map(described, command.params))
    if isinstance(command, click.Group):
        for word, each in sorted(command.commands.items()):
            yield from commands(each, f"{name} {word}")


def described(option: click.Parameter) -> str:
    spelling = "/".join(option.opts) if isinstance(option, click.Option) else option.make_metavar(click.Context(main))
    kind = "flag" if getattr(option, "is_flag", False) else type_of(option.type)
    with_default = option.default is not None and "UNSET" not in repr(option.default) and option.default is not False
    words = [spelling, kind, f"default={option.default}" if with_default else "", "required" if option.required else "",
             "repeatable" if option.multiple or option.nargs == -1 else ""]  # fmt: skip
    return " ".join(filter(None, words))


def type_of(value: click.ParamType) -> str:
    match value:
        case click.Choice():
            return "|".join(value.choices)
        case click.IntRange():
            return f"integer>={value.min}" + (f"<={value.max}" if value.max is not None else "")
    return value.name


def keys() -> dict[str, list[str]]:
    """Return the keys of the composed configuration, and those that each option of a group adds to it."""
    conf = files("labtrain.conf")
    with initialize_config_module("labtrain.conf", version_base="1.3"):
        base = composed()
        options = [
            f"{group}={Path(each.name).stem}"
            for group in GROUPS
            for each in sorted(conf.joinpath(group).iterdir(), key=lambda each: each.name)
            if each.name.endswith(".yaml")
        ]
        return {"labtrain": sorted(base)} | {option: sorted(composed(option) - base) for option in options}


def composed(*overrides: str) -> set[str]:
    config = OmegaConf.to_container(compose("labtrain", list(overrides)), resolve=False)
    assert isinstance(config, dict)
    return set(flat(config))


def flat(node: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of each value, with its default."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def fields() -> list[str]:
    """Return each field that the receipt's schema allows: its path, its rules, and whether it is required."""
    (file,) = PACKAGE.rglob("receipt.schema.json")
    schema = json.loads(file.read_text())
    return sorted(rules(schema, "receipt"))


def rules(node: Any, path: str, required: bool = True) -> Iterator[str]:
    """Yield a line for a node of a JSON schema and for each below it.

    `[]` is an item, `*` any other key, `.~x` a key that matches x, `$x` a definition, `?` optional.
    """
    if not isinstance(node, dict):
        yield f"{path}: {json.dumps(node)}"
        return
    below = {"properties", "patternProperties", "definitions", "$defs", "items", "additionalProperties"}
    own = {key: value for key, value in node.items() if key not in below | {"required", "description", "title", "$id"}}
    yield f"{path}{'' if required else '?'}: {json.dumps(own, sort_keys=True)}"
    wanted = node.get("required", [])
    for kind, mark in (("properties", "."), ("patternProperties", ".~"), ("definitions", " $"), ("$defs", " $")):
        for name, each in node.get(kind, {}).items():
            yield from rules(each, f"{path}{mark}{name}", kind != "properties" or name in wanted)
    if "items" in node:
        yield from rules(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from rules(node["additionalProperties"], f"{path}.*")


def surface() -> dict[str, Any]:
    """Return all of it, as public.json holds it."""
    return {
        "names": names(),
        "commands": dict(commands()),
        "configuration": keys(),
        "receipt": fields(),
    }


def lines(surface: dict[str, Any]) -> set[str]:
    """Return a surface as lines that can be compared one by one."""
    return {
        *(f"name: {name}{signature}" for name, signature in surface["names"].items()),
        *(f"command: {name}" for name in surface["commands"]),
        *(f"command: {name} {option}" for name, options in surface["commands"].items() for option in options),
        *(f"key: {option}: {key}" for option, found in surface["configuration"].items() for key in found),
        *(f"receipt: {field}" for field in surface["receipt"]),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n")
