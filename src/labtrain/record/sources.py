"""Find and hash the code that a run depends on: the experiment, labtrain, and their imports from outside.

The lock identifies the environment: the standard library and the folders of installed distributions. Outside it are
folders on PYTHONPATH, editable installs, the user's site and link targets. Their modules are found from the imports in
the experiment's sources and the names in the configuration, without importing them. A package is one unit: all its
sources are hashed, and their imports followed.

The code that runs is the code that was hashed: modules outside the environment are compiled from source
(`load_from_source`). See https://docs.python.org/3.11/reference/import.html for finders, loaders and bytecode.
"""

import ast
import hashlib
import os
import re
import site
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path

from labtrain.base.errors import ConfigError
from labtrain.base.untrusted import read_source

SUFFIXES = (".py", ".pyc", ".so")  # also bytecode without source, and extension modules
OWN = Path(__file__).parents[1]
FROM_SOURCE = "LABTRAIN_FROM_SOURCE"  # makes child processes load from source too
IGNORE = ".labtrainignore"
STARTS_WITH_PYTHON = ("sitecustomize", "usercustomize")  # imported by the interpreter itself
MOST_FILES, MOST_BYTES = 20_000, 1_000_000_000  # outside the environment; more than this is another environment
IMPORT = re.compile(r"(?:^|[;:])[ \t]*(?:from[ \t]+([^\W\d]\w*)|import[ \t]+([\w.,\t ]+))", re.MULTILINE)
BY_NAME = re.compile(r"""(?:import_module|__import__)\(\s*['"]([^\W\d]\w*)""")
DOTTED = re.compile(r"([^\W\d]\w*)(?:\.\w+)+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """The code that a run depends on.

    Attributes:
        sources: sha256 of each of the experiment's files, by path in the experiment.
        outside: sha256 of each file outside experiment and environment, by path in its import folder.
        shadows: names of modules that shadow the environment's.
        files: sha256 of all these, by real path on this machine.
        path: the module search path.
    """

    sources: dict[str, str]
    outside: dict[str, str]
    shadows: list[str]
    files: dict[str, str]
    path: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """The sha256 over names and contents; part of the run's name."""
        sha = hashlib.sha256()
        parts = [self.sources, labtrain_sources(), *([self.outside] if self.outside else [])]
        for digests in parts:
            for name, digest in digests.items():
                sha.update(f"{name}\0".encode())
                sha.update(bytes.fromhex(digest))
            sha.update(b"\0")
        return sha.hexdigest()


def read_code(root: Path, config: dict[str, object], *, path: Iterable[str] | None = None) -> Code:
    """Find and hash the code that a run depends on; import nothing.

    Args:
        root: the experiment's folder.
        config: its configuration; texts in `model`, `data` and `callbacks` may be module names.
        path: the module search path after `root`; None: sys.path.

    Raises:
        ConfigError: it is too large to be code, for example another environment; or a file is not a regular file.
    """
    path = search_path(root, sys.path if path is None else path)
    sources = source_digests(root)
    files = {os.path.realpath(root / name): digest for name, digest in sources.items()}
    shadows = shadowing(path)
    own_groups = [config.get(group) for group in ("model", "data", "callbacks")]
    named: dict[str, list[str]] = {name: [] for name in (*STARTS_WITH_PYTHON, *shadows, *_names_in(own_groups))}
    _mention(named, (os.path.join(root, name) for name in sources))  # noqa: PTH118
    outside: dict[str, str] = {}
    size, queue = 0, list(named)
    while queue:
        name = queue.pop()
        unit = [(key, file) for key, file in _unit(name, path) if os.path.realpath(file) not in files]
        if unit and named[name] and not any(_imports(file, name) for file in named[name]):
            del named[name]  # another file may import it
            continue
        for key, file in unit:
            data = read_source(Path(file))
            size += len(data)
            files[os.path.realpath(file)] = digest = hashlib.sha256(data).hexdigest()
            outside[key if outside.get(key, digest) == digest else f"{key}#{len(outside)}"] = digest
            if len(outside) > MOST_FILES or size > MOST_BYTES:
                raise ConfigError(
                    f"{name} is imported from {file}: {len(outside)} files with {size} bytes are too much to be code",
                    hint="unset PYTHONPATH; labtrain doctor lists what shadows the locked packages",
                )
        queue += _mention(named, (file for _, file in unit))
    return Code(sources=sources, outside=dict(sorted(outside.items())), shadows=shadows, files=files, path=path)


def source_digests(root: Path) -> dict[str, str]:
    """Return the sha256 of each of the experiment's files that a run can depend on, by path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(read_source(path)).hexdigest()
        for path in sorted(sources(root))
    }


def labtrain_sources() -> dict[str, str]:
    """Return the sha256 of each of labtrain's sources; the same for an installed wheel and for a source tree."""
    return {name: digest for name, digest in source_digests(OWN).items() if not name.startswith("assets/")}


def sources(root: Path) -> Iterator[Path]:
    """Yield the modules below `root` that a run can depend on.

    Skip tests, runs, hidden folders, environments, and what `.labtrainignore` names. If code imports a module that is
    named there, `read_code` hashes it like one outside the folder.
    """
    ignored = ignored_by(root)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        place = here.relative_to(root)
        folders[:] = [name for name in folders if not ignored(place / name, True)]
        files = [name for name in files if not ignored(place / name, False)]
        folders[:] = [name for name in folders if not name.startswith("__") and not _is_left_out(here / name)]
        if here == root:
            folders[:] = [name for name in folders if name not in ("runs", "tests", "vendor")]
        yield from (here / name for name in files if name.endswith(SUFFIXES))


def ignored_by(root: Path) -> Callable[[Path, bool], bool]:
    """Return whether `.labtrainignore` names a path below `root`; the second argument: whether it is a folder.

    Its lines have the form of .gitignore: a name or pattern anywhere, or with a slash from `root` on. A slash at its
    end names folders only. # begins a comment. `!` and `**` are not supported.

    Raises:
        ConfigError: a line is not supported.
    """
    path = root / IGNORE
    patterns = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("!") or "**" in pattern:
            raise ConfigError(
                f"{IGNORE}, line {number}: {pattern}: ! and ** are not supported",
                hint="write a file's or folder's name, such as plot.py, figures/ or *_plot.py",
            )
        bare = pattern.rstrip("/")
        patterns.append((bare.lstrip("/"), "/" in bare, pattern.endswith("/")))

    def is_ignored(place: Path, is_folder: bool) -> bool:
        return any(
            fnmatchcase(place.as_posix() if anchored else place.name, pattern)
            for pattern, anchored, folders_only in patterns
            if is_folder or not folders_only
        )

    return is_ignored


def _is_left_out(folder: Path) -> bool:
    is_environment = (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").is_dir()
    return folder.name.startswith(".") or folder.name == "__pycache__" or is_environment


# ------------------------------------------------------------------------------------------------- outside


@cache
def installed_folders() -> tuple[str, ...]:
    """Return the folders of installed distributions; each ends with a slash."""
    found = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    return tuple(sorted({f"{place}/" for folder in found for place in (folder, os.path.realpath(folder))}))


@cache
def environment_folders() -> tuple[str, ...]:
    """Return `installed_folders`, the standard library's folders, and labtrain's own, with its Hydra plugin."""
    found = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(OWN), f"{OWN.parent}/hydra_plugins"}
    return (*installed_folders(), *(f"{place}/" for folder in found for place in (folder, os.path.realpath(folder))))


def in_environment(file: str) -> bool:
    """Return whether a file belongs to the standard library, labtrain or an installed distribution."""
    return file.startswith(environment_folders())


def _is_pythons_own(file: str) -> bool:
    """Return whether a file is in the standard library, even as a link: Debian links sitecustomize to /etc."""
    stdlib = tuple(f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib"))
    return file.startswith(stdlib) and not file.startswith(installed_folders())


def search_path(root: Path, path: Iterable[str]) -> list[str]:
    """Return the module search path of a training in `root`, without the folder of this script."""
    scripts = sysconfig.get_path("scripts")
    others = [entry or os.getcwd() for entry in path if entry != scripts]  # noqa: PTH109
    return list(dict.fromkeys([str(root), *others]))


def moved(path: Iterable[str], home: Path, root: Path) -> list[str]:
    """Return the module search path for code in `root` instead of `home`."""
    home = home.resolve()
    places = [(entry, (home / entry).resolve()) for entry in path]
    return [str(root / place.relative_to(home)) if entry and place.is_relative_to(home) else entry
            for entry, place in places]  # fmt: skip


def shadowing(path: list[str]) -> list[str]:
    """Return the names of modules on `path` that shadow the environment's."""
    found = set()
    for folder in path:
        if in_environment(f"{folder}/") or not os.path.isdir(folder):  # noqa: PTH112
            continue
        for entry in os.scandir(folder):
            name = entry.name.partition(".")[0]
            is_module = entry.name.endswith((".py", *EXTENSION_SUFFIXES)) or (
                "." not in entry.name and os.path.exists(f"{entry.path}/__init__.py")  # noqa: PTH110
            )
            if is_module and name not in ("labtrain", *STARTS_WITH_PYTHON) and _is_installed(name):
                found.add(name)
    return sorted(name for name in found if next(_unit(name, path), None))


def _is_installed(name: str) -> bool:
    if name in sys.stdlib_module_names:
        return True
    return any(
        os.path.exists(f"{folder}{name}{kind}")  # noqa: PTH110
        for folder in installed_folders()
        for kind in ("/__init__.py", ".py", *EXTENSION_SUFFIXES)
    )


def _unit(name: str, path: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, file) of each file of a top-level module; nothing if the environment has it."""
    if (spec := _spec(name, path)) is None:
        return
    if isinstance(archive := getattr(spec.loader, "archive", None), str):
        yield os.path.basename(archive), archive  # noqa: PTH119
    elif spec.submodule_search_locations is not None:
        for folder in dict.fromkeys(spec.submodule_search_locations):
            if not in_environment(f"{os.path.realpath(folder)}/") and not _is_recorded(folder):
                yield from ((f"{name}/{os.path.relpath(file, folder)}", file) for file in sorted(_files_of(folder)))
    else:
        file = spec.origin if spec.has_location else None
        if file is None or _is_pythons_own(file) or in_environment(os.path.realpath(file)) or _is_recorded(file):
            return
        yield os.path.basename(file), file  # noqa: PTH119


def _spec(name: str, path: list[str]) -> ModuleSpec | None:
    """Return what importing a top-level name would find; import nothing.

    Other finders, such as those of editable installs, are asked only if the environment has no such module: the finder
    of setuptools changes its behaviour when asked for pip (_distutils_hack).
    """
    if name in sys.builtin_module_names:
        return None
    own = PathFinder.find_spec(name, path)
    if own is not None and own.origin is not None and in_environment(own.origin):
        return own
    for finder in sys.meta_path:
        try:
            found = own if finder is PathFinder else finder.find_spec(name, None)
        except Exception:  # a third-party finder can raise anything
            continue
        if found is not None:
            return found
    return None


def _files_of(folder: str) -> Iterator[str]:
    entered = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(here))
        folders[:] = [
            name
            for name in folders
            if not _is_left_out(Path(here, name)) and os.path.realpath(f"{here}/{name}") not in entered
        ]
        yield from (f"{here}/{name}" for name in files if name.endswith(SUFFIXES))


@cache
def _is_recorded(file: str) -> bool:
    """Return whether a distribution's RECORD lists a link in the environment; uv and conda install links."""
    folder = next((folder for folder in environment_folders() if file.startswith(folder)), None)
    if folder is None:
        return False
    line = b"\n" + file.removeprefix(folder).partition("/")[0].encode()
    return any(line in b"\n" + record.read_bytes() for record in Path(folder).glob("*.dist-info/RECORD"))


def texts_in(node: object) -> Iterator[str]:
    """Yield each text in a configuration, without keys."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from texts_in(child)
    elif isinstance(node, str):
        yield node


def _names_in(node: object) -> Iterator[str]:
    """Yield the first part of each text that looks like a module's name."""
    return (match[1] for text in texts_in(node) if (match := DOTTED.fullmatch(text)))


def _mention(named: dict[str, list[str]], files: Iterable[str]) -> list[str]:
    """Record which files seem to import a name; return the new names."""
    new = []
    for file in files:
        if not file.endswith(".py"):
            continue
        text = Path(file).read_text(errors="replace").replace("\\\n", " ")
        seen = {match[1] for match in BY_NAME.finditer(text)}
        for match in IMPORT.finditer(text):
            each = [match[1]] if match[1] else [part.strip().partition(" ")[0] for part in match[2].split(",")]
            seen |= {name.partition(".")[0] for name in each}
        for name in sorted(seen - {"", "labtrain"}):
            if name not in named:
                new.append(name)
                named[name] = []
            elif not named[name]:
                continue  # found already, without a file that imports it
            named[name].append(file)
    return new


def _imports(file: str, name: str) -> bool:
    """Return whether a file really imports a top-level module; a sentence in a docstring does not count."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (SyntaxError, ValueError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == name for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == name:
            return True
        first = node.args[0] if isinstance(node, ast.Call) and node.args else None
        if isinstance(first, ast.Constant) and str(first.value).partition(".")[0] == name:
            return True
    return False


# ------------------------------------------------------------------------------------------------- what runs

_compiled: dict[str, str] = {}  # sha256 of what was compiled, by its file


def load_from_source() -> None:
    """From now on, compile each module outside the environment from source and ignore its bytecode.

    Python runs bytecode that is marked as unchecked, or that has the source's time and size. This also applies to child
    processes, as soon as they import labtrain.
    """
    os.environ[FROM_SOURCE] = "1"
    read = SourceFileLoader.get_code
    if read is _from_source:
        return
    environment_folders()  # sysconfig imports a module when it is first asked, which from below would ask it again
    _from_source.read = read  # type: ignore[attr-defined]
    SourceFileLoader.get_code = _from_source  # type: ignore[method-assign, assignment]


def _from_source(self: SourceFileLoader, fullname: str) -> types.CodeType | None:
    path = self.get_filename(fullname)
    if in_environment(path):
        return _from_source.read(self, fullname)  # type: ignore[attr-defined, no-any-return]
    data = self.get_data(path)
    _compiled[os.path.realpath(path)] = hashlib.sha256(data).hexdigest()
    code: types.CodeType = self.source_to_code(data, path)
    return code


_executed: dict[str, bool] = {}  # files of code that ran: whether `newly_executed` has returned them
_is_hooked = False


def note_executed() -> None:
    """From now on, record the files of all code that this process executes: as a module, by path, or in exec."""
    global _is_hooked
    _executed.clear()
    if not _is_hooked:  # a hook cannot be removed, and forked processes inherit it
        _is_hooked = True
        sys.addaudithook(_note)


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "exec" and type(arguments[0]) is types.CodeType:
        _executed.setdefault(arguments[0].co_filename, False)


def newly_executed() -> list[str]:
    """Return the files of code that this process has executed since the last call."""
    found = [file for file, told in _executed.items() if not told]
    _executed.update(dict.fromkeys(found, True))
    return found


def add_executed(files: Iterable[str]) -> None:
    """Record files of code that another process executed, such as a loader's worker."""
    for file in files:
        _executed.setdefault(file, False)


def count_of_code() -> int:
    """Return a number that grows when a module is imported or other code is executed."""
    return len(sys.modules) + len(_executed)


def unnamed_modules(code: Code, before: set[str]) -> list[tuple[str, str]]:
    """Return (name, file) of code that ran but is neither in the environment nor hashed.

    Args:
        code: the hashed code.
        before: module names to leave out: those imported before the training, in a notebook.
    """
    found: list[tuple[str, str]] = []
    # Output of torch.compile: triton/knobs.py and torch/_inductor/runtime/cache_dir_utils.py.
    compiled = (
        os.environ.get("TRITON_CACHE_DIR") or os.path.join(os.environ.get("TRITON_HOME") or Path.home(), ".triton/"),  # noqa: PTH118
        os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_",
    )
    ran = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.copy().items()]
    modules = {file for _, file in ran}
    ran += [(Path(file).stem, file) for file in list(_executed) if file not in modules and Path(file).is_file()]
    for name, file in ran:
        if not isinstance(file, str) or name in before or name in ("__main__", "__mp_main__"):
            continue
        if file.startswith(compiled):
            continue
        top = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None) or ""
        if in_environment(file) or (top != file and in_environment(top)):
            continue  # a module that a library generates under its own name, as torch.compile does
        real = os.path.realpath(file)
        if in_environment(real):
            continue
        if real not in code.files and not any(str(parent) in code.files for parent in Path(real).parents):
            found.append((name, file))
    return found


def can_be_found(name: str, file: str, path: list[str]) -> bool:
    """Return whether `import NAME` in the experiment's sources would find this file on `path`, so that it is hashed."""
    unit = _unit(name.partition(".")[0], path)
    return os.path.realpath(file) in {os.path.realpath(each) for _, each in unit}


def stale_modules(code: Code) -> list[str]:
    """Return the names of modules that differ from their file: edited since, or loaded from bytecode."""
    found = []
    real_folder = cache(os.path.realpath)  # five thousand modules are in few folders
    for name, module in sys.modules.copy().items():
        file = getattr(module, "__file__", None)
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        if type(loader) is not SourceFileLoader or file is None:
            continue
        folder, last = os.path.split(file)
        real = os.path.realpath(file) if os.path.islink(file) else os.path.join(real_folder(folder), last)  # noqa: PTH114, PTH118
        if real not in code.files:
            continue
        if real in _compiled:
            if _compiled[real] != code.files[real]:
                found.append(name)
            continue
        try:
            written = set(_inner(compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)))
        except (SyntaxError, ValueError):
            continue
        functions = [*vars(module).values()]
        functions += [part for kind in functions if isinstance(kind, type) for part in vars(kind).values()]
        for function in functions:
            function = getattr(function, "__func__", getattr(function, "fget", function))
            mine = getattr(function, "__code__", None)
            if isinstance(mine, types.CodeType) and mine.co_filename == file and mine not in written:
                found.append(name)
                break
    return found


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _inner(constant)
