"""Show what a receipt's code would run, and ask whether it may run, unless the run is the user's own. No torch.

A rerun executes the receipt's code and what its configuration names: Hydra instantiates each `_target_`. Hydra's list
of refused targets is not a protection (https://hydra.cc/docs/1.3/advanced/instantiate_objects/overview/).
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from labtrain.base.console import one_line, shown
from labtrain.base.errors import ConfigError
from labtrain.record.identity import ORDERED
from labtrain.record.own_runs import is_own, patch_of
from labtrain.record.receipt import Receipt

Ask = Callable[[list[str]], bool]  # shows lines to a person and returns whether they agree

# In these modules, names that begin with a capital are classes for training: layers, optimizers, schedules, datasets,
# metrics, callbacks. Functions are excluded: torch.load and torch.hub.load run code.
LIBRARY = re.compile(
    r"(?:torch\.nn(?:\.modules(?:\.[a-z]+)?)?|torch\.optim(?:\.lr_scheduler|\.swa_utils)?|torch\.utils\.data"
    r"|lightning\.pytorch(?:\.callbacks)?|torchmetrics(?:\.[a-z]+)?|labtrain(?:\.augment)?)\.[A-Z]\w*"
)
DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
A_PLACE = re.compile(r"[/~]|.*(?:\.\.|://)", re.DOTALL)
HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
MOST_IMPORTS = 10  # to follow from file to file until a class's definition


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
    ways: str = "",
) -> None:
    """Show what training a receipt's run would execute here, and return if it may run.

    Args:
        receipt: of the run to train.
        run_dir: the run's folder.
        root: the folder of its code.
        home: the experiment's folder here, the working directory of the rerun.
        sandboxed: it runs in a sandbox, so it may run.
        trust: it may run without asking.
        ask: asks the user; None: there is no terminal.
        say: receives the lines if nobody is asked.
        ways: the hint of a refusal; empty: that of `labtrain verify`.

    Raises:
        ConfigError: it may not run. Nothing was run.
    """
    if is_own(receipt, run_dir, home):
        return
    runs = "in the sandbox" if sandboxed else "as you, with your files and your network"
    lines = [f"runs         {runs}, code that you did not train here:", *what_runs(receipt, run_dir, root, home)]
    if ask is not None and not trust and not sandboxed:
        if ask(lines):
            return
        raise ConfigError("not confirmed; none of the receipt's code was run", hint=ways or _ways(run_dir))
    for line in lines:
        say(line)
    if not trust and not sandboxed:
        raise ConfigError(
            f"you did not train {shown(run_dir)} in {home}, so its code is untrusted, and there is no terminal to ask"
            " on",
            hint=ways or _ways(run_dir),
        )


def _ways(run_dir: Path) -> str:
    return (
        f"labtrain verify {shown(run_dir)} --sandbox trains it without network and home; --trust runs it as you;"
        " --steps 0 runs nothing"
    )


# ----------------------------------------------------------------------------------------------- what would run


def what_runs(receipt: Receipt, run_dir: Path, root: Path, home: Path) -> list[str]:
    """Return what a rerun executes, as lines: the code and its origin, the patch, other targets."""
    code, lines = receipt["code"], list[str]()
    if root == home:
        names = ", ".join(sorted(code["sources"])[:8]) + (", ..." if len(code["sources"]) > 8 else "")
        lines.append(f"  code       the {len(code['sources'])} sources in {home.resolve()}: {names}")
    else:
        patch = patch_of(receipt, run_dir) or ""
        lines.append(f"  code       commit {code['commit']} of {home.resolve()}{', with the patch' if patch else ''}")
        lines += [f"  | {line}" for line in patch.split("\n")[: -1 if patch.endswith("\n") else None] if patch]
        lines += [f"  patch      {each}" for each in _summary(patch)]
    for key, text in foreign_targets(receipt["config"], root, receipt["code"]["sources"]):
        lines.append(f"  target     {key}: {text}")
    return [one_line(line) for line in lines]


def _summary(patch: str) -> list[str]:
    """Return which files a patch changes, and how much: shown directly before the question."""
    found: dict[str, list[int]] = {}  # lines added and removed
    more: dict[str, str] = {}
    name, before, after = "", 0, 0  # the file, and the remaining lines of the hunk on each side
    for line in patch.split("\n"):
        if before > 0 or after > 0:
            before -= line[:1] not in ("+", "\\")
            after -= line[:1] not in ("-", "\\")
            if line[:1] in ("+", "-"):
                found[name][line[0] == "-"] += 1
        elif hunk := HUNK.match(line):
            before, after = (int(count or 1) for count in hunk.groups())
            found.setdefault(name, [0, 0])
        elif line.startswith("diff --git "):
            name = line.rpartition(" b/")[2]
            found.setdefault(name, [0, 0])
        elif line.startswith(("--- ", "+++ ")) and not line.startswith("/dev/null", 4):
            name = re.sub("^[ab]/", "", line[4:].partition("\t")[0])  # git apply uses these
        elif line.startswith("GIT binary patch"):
            found.setdefault(name, [0, 0])
            more[name] = ", binary: not shown"
    return [f"{name} +{added} -{removed}{more.get(name, '')}" for name, (added, removed) in found.items()]


def foreign_targets(config: object, root: Path, sources: dict[str, str]) -> list[tuple[str, str]]:
    """Return (key, what it names) for everything Hydra would make or call outside the experiment and LIBRARY.

    LIBRARY has the training classes of torch, lightning, torchmetrics and labtrain. A text with `${` is returned too:
    Hydra resolves it when it makes the object, and it may become a `_target_`.

    Args:
        config: resolved, untrusted.
        root: the folder of the experiment's code.
        sources: its hashed files, by path.
    """
    found = [(key, str(target)) for key, target in _targets(config, "") if not is_known(target, root, sources)]
    made = {group: config.get(group) for group in ORDERED} if isinstance(config, dict) else {}
    found += [(key, text) for key, text in _places(made, "")]
    return found + [(key, text) for key, text in _texts(made, "") if "${" in text and not key.endswith("_target_")]


def is_known(target: object, root: Path, sources: dict[str, str]) -> bool:
    """Return whether a target is the experiment's own class or function, or a class in LIBRARY.

    A target reached through another module's import is not known: `model.os.system`, `torch.nn.functools.partial`.
    """
    if not isinstance(target, str) or not DOTTED.fullmatch(target):
        return False
    top = target.partition(".")[0]
    if any(
        name.partition("/")[0] in (top, f"{top}.py") for name in sources
    ):  # the experiment's modules take precedence
        return _is_defined(target.split("."), root, sources, MOST_IMPORTS)
    return LIBRARY.fullmatch(target) is not None


def _is_defined(parts: list[str], root: Path, sources: dict[str, str], imports: int) -> bool:
    """Return whether a source of the experiment defines `package.module.Name`; imports nothing."""
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
    """Return the names that a module's statement binds, including nested statements."""
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
    """Yield (key, text) of each path and URL given to a class in LIBRARY, such as ModelCheckpoint's dirpath."""
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
