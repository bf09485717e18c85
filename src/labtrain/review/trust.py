"""Whether code that came with a receipt may run as this user: said first, then asked, unless it is the user's own run.

What a replay runs is the receipt's code, and what its configuration names: Hydra makes an object of each `_target_`,
and Hydra's list of refused ones is no protection (https://hydra.cc/docs/1.3/advanced/instantiate_objects/overview/).

No torch.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from labtrain.base.console import one_line, shown
from labtrain.base.errors import ConfigError
from labtrain.record.identity import ORDERED
from labtrain.record.own_runs import is_own, patch_of
from labtrain.record.receipt import Receipt

Ask = Callable[[list[str]], bool]  # shows lines to a person and returns whether they agree

# What these modules have under a name with a capital are classes of a training's parts: layers, optimizers, schedules,
# datasets, metrics, callbacks. Their functions are not among them: torch.load and torch.hub.load run code.
LIBRARY = re.compile(
    r"(?:torch\.nn(?:\.modules(?:\.[a-z]+)?)?|torch\.optim(?:\.lr_scheduler|\.swa_utils)?|torch\.utils\.data"
    r"|lightning\.pytorch(?:\.callbacks)?|torchmetrics(?:\.[a-z]+)?|labtrain(?:\.augment)?)\.[A-Z]\w*"
)
DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
A_PLACE = re.compile(r"[/~]|.*(?:\.\.|://)", re.DOTALL)
HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
MOST_IMPORTS = 10  # from one of the experiment's files to the next, until a class's own


def admit(
    receipt: Receipt,
    *,
    run_dir: Path,
    root: Path,
    home: Path,
    sandboxed: bool = False,
    trust: bool = False,
    ask: Ask | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Say what training a receipt's run would execute here, and return where it may.

    Args:
        receipt: whose run is trained.
        run_dir: where it lies.
        root: the folder of its code.
        home: the experiment's folder here, which it is started in.
        sandboxed: it is trained in a sandbox, where it may.
        trust: it may, whatever it is.
        ask: asks the person; None: there is no terminal.
        say: is told, where nobody is asked.

    Raises:
        ConfigError: it may not. Nothing was run.
    """
    if is_own(receipt, run_dir, home):
        return
    runs = "in the sandbox" if sandboxed else "as you, with your files and your network"
    lines = [f"runs         {runs}, what you did not train in this folder:", *what_runs(receipt, run_dir, root, home)]
    if ask is not None and not trust and not sandboxed:
        if ask(lines):
            return
        raise ConfigError("not confirmed, and nothing of the receipt's was run", hint=_ways(run_dir))
    for line in lines:
        say(line)
    if not trust and not sandboxed:
        raise ConfigError(
            f"{shown(run_dir)} was not trained by you in {home}: its code is somebody else's, and there is no terminal"
            " to ask on",
            hint=_ways(run_dir),
        )


def _ways(run_dir: Path) -> str:
    return (
        f"labtrain verify {shown(run_dir)} --sandbox trains it without network and home; --trust, where you trust who"
        " sent it; --steps 0 runs nothing"
    )


# ----------------------------------------------------------------------------------------------- what would run


def what_runs(receipt: Receipt, run_dir: Path, root: Path, home: Path) -> list[str]:
    """Return what a replay executes, for a person to read: the code and where it is from, the patch, other targets."""
    code, lines = receipt["code"], list[str]()
    if root == home:
        names = ", ".join(sorted(code["sources"])[:8]) + (", ..." if len(code["sources"]) > 8 else "")
        lines.append(f"  code       the {len(code['sources'])} sources in {home.resolve()}, as they are: {names}")
    else:
        patch = patch_of(receipt, run_dir) or ""
        lines.append(f"  code       commit {code['commit']} of {home.resolve()}{', with the patch' if patch else ''}")
        lines += [f"  | {line}" for line in patch.split("\n")[: -1 if patch.endswith("\n") else None] if patch]
        lines += [f"  patch      {each}" for each in _summary(patch)]
    for key, text in foreign_targets(receipt["config"], root, receipt["code"]["sources"]):
        lines.append(f"  target     {key}: {text}")
    return [one_line(line) for line in lines]


def _summary(patch: str) -> list[str]:
    """Return which files a patch changes, and how much of each: the last that is read before the question."""
    found: dict[str, list[Any]] = {}
    name, before, after = "", 0, 0  # the file, and how many lines of a hunk are still to come of each side
    for line in patch.split("\n"):
        if before > 0 or after > 0:
            before -= line[:1] not in ("+", "\\")
            after -= line[:1] not in ("-", "\\")
            if line[:1] in ("+", "-"):
                found[name][line[0] == "-"] += 1
        elif hunk := HUNK.match(line):
            before, after = (int(count or 1) for count in hunk.groups())
            found.setdefault(name, [0, 0, ""])
        elif line.startswith("diff --git "):
            name = line.rpartition(" b/")[2]
            found.setdefault(name, [0, 0, ""])
        elif line.startswith(("--- ", "+++ ")) and not line.startswith("/dev/null", 4):
            name = re.sub("^[ab]/", "", line[4:].partition("\t")[0])  # git apply goes by these
        elif line.startswith("GIT binary patch"):
            found.setdefault(name, [0, 0, ""])[2] = ", binary: it cannot be read here"
    return [f"{name} +{added} -{removed}{more}" for name, (added, removed, more) in found.items()]


def foreign_targets(config: object, root: Path, sources: dict[str, str]) -> list[tuple[str, str]]:
    """Return (key, what it names) of all that Hydra would make or call that is neither the experiment's nor a part.

    A part is a class of torch, lightning, torchmetrics or labtrain that trainings are made of. A text with `${` is
    returned too: Hydra resolves it when it makes the object, and it may become a `_target_`.

    Args:
        config: resolved, from somebody else.
        root: the folder of the experiment's code.
        sources: its files that were hashed, by their paths there.
    """
    found = [(key, str(target)) for key, target in _targets(config, "") if not is_known(target, root, sources)]
    made = {group: config.get(group) for group in ORDERED} if isinstance(config, dict) else {}
    found += [(key, text) for key, text in _places(made, "")]
    return found + [(key, text) for key, text in _texts(made, "") if "${" in text and not key.endswith("_target_")]


def is_known(target: object, root: Path, sources: dict[str, str]) -> bool:
    """Return whether a target is a class or function of the experiment's own, or a class of a library's parts.

    What is reached through a module that another one imports is not: `model.os.system`, `torch.nn.functools.partial`.
    """
    if not isinstance(target, str) or not DOTTED.fullmatch(target):
        return False
    top = target.partition(".")[0]
    if any(name.partition("/")[0] in (top, f"{top}.py") for name in sources):  # its modules come before a library's
        return _is_defined(target.split("."), root, sources, MOST_IMPORTS)
    return LIBRARY.fullmatch(target) is not None


def _is_defined(parts: list[str], root: Path, sources: dict[str, str], imports: int) -> bool:
    """Return whether a source of the experiment's defines what `package.module.Name` names; nothing is imported."""
    *module, name = parts
    if not module or not imports:
        return False
    file = next((path for path in (f"{'/'.join(module)}.py", f"{'/'.join(module)}/__init__.py") if path in sources), "")
    if not file:
        return False
    try:
        body = ast.parse((root / file).read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    last = [node for node in body if name in _bound_by(node)][-1:]
    if not last or isinstance(last[0], ast.ClassDef | ast.FunctionDef):
        return bool(last)
    if not isinstance(last[0], ast.ImportFrom):
        return False
    package = module if file.endswith("/__init__.py") else module[:-1]
    base = package[: len(package) - last[0].level + 1] if last[0].level else []
    original = next(alias.name for alias in last[0].names if name in (alias.asname, alias.name))
    return _is_defined([*base, *(last[0].module or "").split("."), original], root, sources, imports - 1)


def _bound_by(node: ast.stmt) -> set[str]:
    """Return the names that a statement of a module gives; of one that holds others, all that stand in it."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    inner = [each for each in ast.walk(node) if isinstance(each, ast.stmt) and each is not node]
    return names.union(*map(_bound_by, inner)) if inner else names


def _targets(node: object, key: str) -> Iterator[tuple[str, object]]:
    """Yield (key, value) of each `_target_` of nested containers."""
    for name, child in _children(node):
        place = f"{key}.{name}" if key else str(name)
        if name == "_target_":
            yield place, child
        yield from _targets(child, place)


def _places(node: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of each path and URL that a library's part is given: ModelCheckpoint's dirpath, say."""
    if isinstance(node, dict) and LIBRARY.fullmatch(str(node.get("_target_"))):
        yield from ((name, text) for name, text in _texts(node, key) if A_PLACE.match(text))
        return
    for name, child in _children(node):
        yield from _places(child, f"{key}.{name}" if key else str(name))


def _texts(node: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of each text of nested containers."""
    if isinstance(node, str):
        yield key, node
    for name, child in _children(node):
        yield from _texts(child, f"{key}.{name}" if key else str(name))


def _children(node: object) -> Iterator[tuple[object, object]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple):
        yield from enumerate(node)
