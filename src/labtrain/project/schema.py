"""JSON Schemas of an experiment's configuration, with which editors complete and check `conf/*.yaml`.

labtrain's own keys come from `labtrain.conf` and the types in base/contracts. The keys beside a `_target_` are the
arguments of that class. Every value may also be a reference, `${...}`, or `???`.

The schemas follow draft 7 (https://json-schema.org/draft-07), which editors know. A file of conf/ is one part of a
configuration, so no key is required.
"""

import collections.abc
import inspect
import json
import math
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from labtrain.base import contracts
from labtrain.base.console import quoted, shown
from labtrain.base.contracts import Options
from labtrain.base.errors import ConfigError, in_words
from labtrain.base.files import write_atomically
from labtrain.launch.experiment import called_with
from labtrain.record import config as configuration
from labtrain.record.config import CONF, GROUPS
from labtrain.record.identity import SCRIPT

FOLDER = Path(".vscode", "labtrain")
WHOLE = "config"  # the file for conf/config.yaml and conf/experiment/
OWN = ("model", "data", "callbacks", "logger")  # groups with the user's `_target_`s
Schema = Options
Target = Callable[..., object]

REFERENCE: Schema = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
ANYTHING: Schema = {"$ref": f"{WHOLE}.json#/definitions/anything"}
# Hydra's own keys beside `_target_`: https://hydra.cc/docs/1.3/advanced/instantiate_objects/overview/
HYDRA: Schema = {
    "_args_": {"type": "array", "items": ANYTHING, "description": "positional arguments"},
    "_partial_": {"type": "boolean", "description": "true: a functools.partial, called later"},
    "_recursive_": {"type": "boolean", "description": "false: do not create nested objects"},
    "_convert_": {"enum": ["none", "partial", "object", "all"], "description": "how containers are passed"},
}
DEFAULTS: Schema = {"defaults": {"type": "array", "description": "Hydra's list of files that this one includes"}}
TYPED: dict[str, type] = {
    "trainer": contracts.TrainerConfig,
    "determinism": contracts.DeterminismConfig,
    "checkpoint": contracts.CheckpointConfig,
    "speed": contracts.SpeedConfig,
    "trail": contracts.TrailConfig,
    "failures": contracts.FailuresConfig,
    "paths": contracts.PathsConfig,
    "init_from": contracts.InitFrom,
}
CHOICES: dict[str, list[object]] = {
    "determinism.mode": list(configuration.MODES),
    "checkpoint.mode": ["max", "min"],
    "trainer.precision": [None, *configuration.PRECISIONS, 16, 32, 64],
    "speed.compile": [True, False, *configuration.COMPILE_MODES],
}
MINIMUM = {
    **configuration.LEAST,
    **{f"trainer.{key}": least for key, least in configuration.TRAINER_INTEGERS.items()},
    **{f"trainer.{key}": least for key, least in configuration.TRAINER_NUMBERS.items()},
    **dict.fromkeys(("determinism.shards", "checkpoint.every_n_steps", "checkpoint.keep_every_n_steps"), 1),
}
LISTS = (list, collections.abc.Sequence, collections.abc.MutableSequence, collections.abc.Collection)
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", types.NoneType: "null"}


def write_schemas(root: Path) -> tuple[list[Path], list[str]]:
    """Write the schemas of an experiment into FOLDER, one for the whole configuration and one for each group.

    Imports the classes that its conf/ names.

    Returns:
        the files; and, for each `_target_` that cannot be imported, its key and the reason.
    """
    try:
        folder, _ = called_with(root / SCRIPT)
    except SyntaxError as error:
        raise ConfigError(f"{shown(root / SCRIPT)}: {in_words(error)}", hint=f"python {SCRIPT}") from None
    used = targets_in(root / folder)
    found, problems = import_targets(root, used)
    files = {root / FOLDER / f"{name}.json": schema for name, schema in schemas(used, found).items()}
    try:
        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        write_atomically(root / FOLDER / ".gitignore", "*\n")  # else a run's receipt would call the code dirty
        for path, schema in files.items():
            write_atomically(path, json.dumps(schema, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{shown(root / FOLDER)}: {error.strerror}", hint=f"ls -ld {quoted(root / FOLDER.parent)}"
        ) from error
    return list(files), problems


def schemas(used: Mapping[str, Iterable[str]], found: Mapping[str, Target]) -> dict[str, Schema]:
    """Return the schemas by file name, without `.json`.

    Args:
        used: the `_target_`s of each key, such as `model` or `callbacks.ema`.
        found: the class or function of each `_target_`.
    """
    parts = {name: of_target(name, target) for name, target in found.items()}
    for name in used.get("data", ()):
        if name in parts:  # labtrain passes these two, whether conf/ has them or not
            parts[name]["properties"] = {**_own_keys("data"), **parts[name]["properties"]}
    groups = {group: _group(group) for group in GROUPS} | {key: _own_group(key, used, parts) for key in OWN}
    whole = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "Written by `labtrain schema`. Run it again after a change of the classes that conf/ names.",
        **_top(groups),
        "definitions": groups | parts | {"anything": _anything(parts)},
    }
    files = {group: {"$schema": whole["$schema"], **_reference(group)} for group in groups}
    return {WHOLE: whole} | files


# ---------------------------------------------------------------------------------------------------- labtrain's keys


def keys_of(path: Path, prefix: str = "") -> Iterator[tuple[str, object, str]]:
    """Yield key, default and meaning of each leaf of a file in labtrain.conf; a mapping with a comment is a row too.

    The default of a mapping with keys is `...`.
    """
    text = path.read_text()
    found = yaml.safe_load(text) or {}
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"( *)([\w/]+):(.*)$", line)
        if not match:
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        parents = [parent for parent in parents if parent[0] < indent] + [(indent, key)]
        node = found
        for _, name in parents:
            node = node[name]
        comment = (re.search(r"(?:^|\s)# (.*)$", rest) or ["", ""])[1].strip()
        nested = isinstance(node, dict) and bool(node)
        if not nested or comment:
            yield f"{prefix}{'.'.join(name for _, name in parents)}", ... if nested else node, comment


def _top(groups: Mapping[str, Schema]) -> Schema:
    """Return the schema of the whole configuration; labtrain refuses other keys."""
    hints = typing.get_type_hints(contracts.Config) | dict.fromkeys((*contracts.EVALUATIONS, "predictions"), str | None)
    properties: Schema = {**DEFAULTS, "hydra": {"type": "object", "description": "Hydra's own configuration"}}
    for key, default, meaning in keys_of(CONF / "labtrain.yaml"):
        if "." not in key and key not in properties:
            properties[key] = _described(_own_key(key, hints[key]), default, meaning)
    for key in ("trail", "failures", "paths"):
        properties[key] = _group(key)
    properties["init_from"] = _group("init_from") | {"type": ["object", "string", "null"], "pattern": ""}  # or a path
    return {"type": "object", "properties": properties | {key: _reference(key) for key in groups},
            "additionalProperties": False}  # fmt: skip


def _group(group: str) -> Schema:
    """Return the schema of a group whose keys labtrain defines."""
    meanings = _own_keys(group)
    closed = group in GROUPS or group == "init_from"  # others may have keys that `${...}` refers to
    properties = meanings | (DEFAULTS if group in GROUPS else {})
    return _mapping(properties, closed=closed)


def _own_keys(group: str) -> Schema:
    """Return the schema of each key that labtrain defines in a group."""
    file, prefix = CONF / group / "default.yaml", f"{group}."
    rows = keys_of(file, prefix) if group in GROUPS else keys_of(CONF / "labtrain.yaml")
    hints = typing.get_type_hints(TYPED[group]) if group in TYPED else {"batch_size": int, "num_workers": int}
    return {
        key.removeprefix(prefix): _described(_own_key(key, hints[key.removeprefix(prefix)]), default, meaning)
        for key, default, meaning in rows
        if key.startswith(prefix)
    }


def _own_key(key: str, hint: object) -> Schema:
    if key == "trainer.devices":
        return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "integer"}},
                          {"const": "auto"}, REFERENCE]}  # fmt: skip
    if key in CHOICES:
        return {"anyOf": [{"enum": CHOICES[key]}, REFERENCE]}
    above = {"exclusiveMinimum": 0} if key.endswith("_seconds") else {}
    return of_type(hint) | above | ({"minimum": MINIMUM[key]} if key in MINIMUM else {})


def _mapping(properties: Schema, *, closed: bool) -> Schema:
    """Return the schema of a mapping, or of a reference to one."""
    return _or_reference(["object"]) | {
        "properties": properties,
        "additionalProperties": False if closed else ANYTHING,
    }


def _or_reference(names: list[str]) -> Schema:
    """Return the schema of a value of one of these JSON types, or a reference to one."""
    if "string" in names:
        return {"type": names}
    # The editors' own keyword, instead of a message with the pattern.
    expected = f"must be {' or '.join(names)}, or a reference such as ${{seed}}"
    return {"type": [*names, "string"], "pattern": REFERENCE["pattern"], "patternErrorMessage": expected}


def _described(schema: Schema, default: object, meaning: str) -> Schema:
    """Add a key's meaning and default; `...` is no default."""
    told = {"description": meaning} if meaning else {}
    return schema | told | ({"default": default} if default is not ... and _is_plain(default) else {})


def _is_plain(value: object) -> bool:
    """Return whether JSON has this value; of containers, only an empty one."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int) or (isinstance(value, list | dict) and not value)


def _reference(name: str) -> Schema:
    return {"$ref": f"{WHOLE}.json#/definitions/{name}"}


# ------------------------------------------------------------------------------------------------- the user's targets


def targets_in(conf: Path) -> dict[str, list[str]]:
    """Return the `_target_`s in the YAML files of an experiment, by the key that they are at."""
    found: dict[str, list[str]] = {}

    def walk(node: object, key: str) -> None:
        for name, child in (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        ):
            if name == "_target_" and isinstance(child, str) and "${" not in child:
                found.setdefault(key, []).append(child)
            walk(child, f"{key}.{name}".lstrip("."))

    for path in sorted(conf.rglob("*.yaml")):
        try:
            text = path.read_text()
            content = yaml.safe_load(text)
            json.dumps(content, default=str)  # raises for a value that contains itself
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue  # a folder, or not YAML: the editor marks it
        # Where Hydra puts a file: https://hydra.cc/docs/1.3/advanced/overriding_packages/
        told = re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE)
        place = ".".join(path.parent.relative_to(conf).parts)
        package = told[1].replace("_group_", place).replace("_global_", "").strip(".") if told else place
        walk(content, package)
    return {key: list(dict.fromkeys(names)) for key, names in found.items()}


def import_targets(root: Path, used: Mapping[str, Iterable[str]]) -> tuple[dict[str, Target], list[str]]:
    """Import the `_target_`s of each key; also return what cannot be imported, and why."""
    found: dict[str, Target] = {}
    problems = []
    sys.path.insert(0, str(root))
    try:
        for key, name in ((key, name) for key, names in used.items() for name in names if name not in found):
            try:
                found[name] = pkgutil.resolve_name(name)
            except (Exception, SystemExit) as error:  # of the user's module
                problems.append(f"{key}._target_={name}: {in_words(error)}")
    finally:
        sys.path.remove(str(root))
    return found, problems


def of_target(name: str, target: Target) -> Schema:
    """Return the schema of the mapping that describes an object: its keys are the arguments of a class or function."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # of C
        return {"type": "object"}
    made_by = getattr(target, "__init__", target) if isinstance(target, type) else target
    try:
        hints = typing.get_type_hints(made_by)
    except Exception:  # a name that only a type checker imports
        hints = {}
    texts = [inspect.getdoc(each) or "" for each in (target, made_by)]
    meanings = {key: text for each in reversed(texts) for key, text in argument_texts(each).items()}
    properties: Schema = {
        "_target_": {"const": name, "description": texts[0].partition("\n\n")[0]},
        **HYDRA,
        **DEFAULTS,
    }
    for each in parameters:
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            hint = hints.get(each.name, inspect.Parameter.empty)
            schema = of_type(hint, or_null=each.default is None)
            default = ... if each.default is each.empty else each.default
            signature = f"{each.name}: {inspect.formatannotation(each.annotation)}"
            meaning = meanings.get(each.name, "" if each.annotation is each.empty else signature)
            properties[each.name] = _described(schema, default, meaning)
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters)
    return {"type": "object", "properties": properties, "additionalProperties": ANYTHING if takes_more else False}


def argument_texts(doc: str) -> dict[str, str]:
    """Return what a docstring in Google's style says about each argument."""
    section = re.search(r"^(?:Args|Arguments|Attributes):\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    lines = inspect.cleandoc(section[1])
    items = re.findall(r"^\*{0,2}(\w+)(?: ?\([^)\n]*\))?:(.*(?:\n[ \t]+.*|\n(?=\n*[ \t]))*)", lines, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


def of_type(hint: object, *, or_null: bool = False) -> Schema:
    """Return the schema of a value for an argument with this annotation; a type that YAML has no form for takes any.

    A value can also be a reference, or a mapping with `_target_` that creates it.
    """
    kinds = _kinds(hint)
    if kinds is None:
        return ANYTHING
    kinds = [*kinds, {"type": "null"}] if or_null else kinds
    if any("type" not in kind for kind in kinds):
        return {"anyOf": [*kinds, REFERENCE, {"type": "object", "required": ["_target_"]}]}
    names = list(dict.fromkeys(str(kind["type"]) for kind in kinds))
    schema = _or_reference(names)
    schema |= next(({"items": kind["items"]} for kind in kinds if "items" in kind), {})
    return schema if "object" in names else schema | {"type": [*schema["type"], "object"], "required": ["_target_"]}


def _kinds(hint: object) -> list[Schema] | None:
    """Return the kinds of values of an annotation; None for any."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and hint in PLAIN:
        return [{"type": PLAIN[hint]}]
    if hint is None:
        return [{"type": "null"}]
    if origin in (typing.Union, types.UnionType):
        each = [_kinds(argument) for argument in arguments]
        return None if None in each else [kind for kinds in each for kind in kinds or ()]
    if origin is typing.Literal:
        return [{"enum": list(arguments)}] if all(map(_is_plain, arguments)) else None
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    kind = origin or hint
    if not isinstance(kind, type) or kind in (object, inspect.Parameter.empty):
        return None
    if issubclass(kind, os.PathLike):
        return [{"type": "string"}]
    if issubclass(kind, collections.abc.Mapping):
        return [{"type": "object"}]
    if issubclass(kind, tuple | set | frozenset) or kind in LISTS:
        return [{"type": "array", "items": of_type(arguments[0]) if len(arguments) == 1 else ANYTHING}]
    return None


def _own_group(group: str, used: Mapping[str, Iterable[str]], parts: Mapping[str, Schema]) -> Schema:
    """Return the schema of a group that has the user's objects."""
    slots = {key: _slot(names, parts) for key, names in used.items() if key.partition(".")[0] == group}
    if group in ("model", "data"):
        own = _own_keys("data") if group == "data" else {}
        slot = slots.get(group, _mapping({}, closed=False))
        return slot | {"properties": {**own, **slot["properties"]}, "description": _meaning(group)}
    named = {key.partition(".")[2]: slot for key, slot in slots.items() if key.count(".") == 1}
    named = {name: slot | {"type": ["object", "string", "null"]} for name, slot in named.items()}
    known: Schema = {path.stem: {} for path in (CONF / "logger").glob("*.yaml")} if group == "logger" else {}
    return _mapping(known | named | DEFAULTS, closed=False) | {"description": _meaning(group)}


def _meaning(group: str) -> str:
    rows = {key: meaning for key, _, meaning in keys_of(CONF / "labtrain.yaml")}
    return rows.get(group, "loggers by name: logger=NAME on the command line chooses one of labtrain's")


def _slot(names: Iterable[str], parts: Mapping[str, Schema]) -> Schema:
    """Return the schema of an object that the user describes, perhaps in several files.

    A mapping without `_target_` changes some arguments of the object that another file describes.
    """
    here = [parts[name] for name in names if name in parts]
    known: dict[str, list[Schema]] = {}
    for part in here:
        for key, schema in part.get("properties", {}).items():
            if key != "_target_" and schema not in known.setdefault(key, []):
                known[key].append(schema)
    union = {key: each[0] if len(each) == 1 else {"anyOf": each} for key, each in known.items()}
    open_ = len(here) < len(list(names)) or any(part.get("additionalProperties") is not False for part in here)
    target = {"_target_": {"anyOf": [{"enum": list(names)}, {"type": "string"}]}}
    return _or_reference(["object"]) | {
        "properties": target,
        "if": {"type": "object", "required": ["_target_"]},
        "then": ANYTHING,
        "else": {"properties": target | union, "additionalProperties": ANYTHING if open_ else False},
    }


def _anything(parts: Mapping[str, Schema]) -> Schema:
    """Return the schema of any value: each mapping with a known `_target_` in it must fit that target."""
    known = [{"if": {"properties": {"_target_": {"const": name}}}, "then": _reference(name)} for name in parts]
    return {
        "if": {"type": "object", "required": ["_target_"]},
        "then": {"allOf": known} if known else {},
        "else": {"items": ANYTHING, "additionalProperties": ANYTHING},
    }
