"""Train untrusted code in a sandbox: bubblewrap, https://github.com/containers/bubblewrap.

The sandbox has no network, no home and no other processes, and only the environment variables that a training needs.
It can read the environment, the experiment and the data that the user names, and write to the scratch folder. A bug in
the kernel or in a GPU driver could still let code out. Memory and time are not limited.
"""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from labtrain.base.contracts import Config, as_options
from labtrain.base.credentials import names_a_secret, without_secrets
from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import is_recorded
from labtrain.record.identity import ORDERED

# What programs need of the system, if it exists. Of /etc only what the loader and the C library read, no passwords or
# host keys, because root in the sandbox reads files as root. /opt and /nix have libraries and toolkits.
SYSTEM = ("/usr", "/opt", "/nix/store", "/gnu/store", "/sys")
LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")  # to /usr, on most
ETC = ("alternatives", "fonts", "group", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime",
       "nsswitch.conf", "passwd")  # fmt: skip
DEVICES = ("nvidia*", "dxg")  # besides those of bubblewrap, such as /dev/null
# Besides the variables that can change bits, which a receipt records (determinism.py). An allow list, since no list of
# credentials' names is complete.
KEPT = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR", "LANG", "LANGUAGE", "LC_ALL", "LC_COLLATE",
        "LC_CTYPE", "LC_MESSAGES", "LC_NUMERIC", "LC_TIME", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONNOUSERSITE",
        "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONUTF8", "TMPDIR", "TZ")  # fmt: skip
OURS = ("LABTRAIN_FROM_SOURCE", "LABTRAIN_JOB", "LABTRAIN_ROOT")  # set by labtrain for the training
ISOLATED = ("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
PROBE_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandbox:
    """What a training can see.

    Attributes:
        home: its working directory.
        reads: folders and files that it can read, besides the system's.
        interpreter: the folders of its Python and its imports; None: this process's.
    """

    home: Path
    reads: tuple[Path, ...]
    interpreter: tuple[Path, ...] | None = None

    def __str__(self) -> str:
        return f"no network, no home; reads {', '.join(str(path) for path in dict.fromkeys(self.reads))}"

    def hidden(self, config: Config) -> list[str]:
        """Return KEY=PATH of each existing path in the configuration that the sandbox hides."""
        groups = *ORDERED, "init_from"
        return [f"{key}={text}" for group in groups for key, text in _texts(as_options(config).get(group), group)
                if Path(text).is_absolute() and not any(Path(text).is_relative_to(path) for path in self.reads)
                and _paths_in(text, self.home)]  # fmt: skip

    def around(
        self, command: list[str], environment: dict[str, str], *, scratch: Path
    ) -> tuple[list[str], dict[str, str]]:
        """Return a command, and its variables, that runs another command in the sandbox.

        Args:
            command: what to run.
            environment: its variables; those that it does not need are left out.
            scratch: the only folder that it can write to.
        """
        own_home = scratch / "home"
        own_home.mkdir(exist_ok=True)
        bound = [*ISOLATED, *_system(), "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
        for pattern in DEVICES:
            for device in sorted(Path("/dev").glob(pattern)):
                bound += ["--dev-bind", str(device), str(device)]
        shown = [*(_interpreter() if self.interpreter is None else self.interpreter), *self.reads]
        for path in sorted({path.absolute() for path in shown}, key=lambda path: len(path.parts)):
            bound += ["--ro-bind-try", str(path), str(path)]
        for link, target in _links(Path(command[0]), shown):
            bound += ["--symlink", target, str(link)]
        bound += ["--bind", str(scratch), str(scratch), "--remount-ro", "/", "--chdir", str(self.home)]
        kept = {name: value for name, value in environment.items() if name in OURS or is_kept(name, value)}
        return ["bwrap", *bound, "--", *command], kept | {"HOME": str(own_home)}


def make_sandbox(
    *, code: Path, home: Path, changes: dict[str, object], interpreter: tuple[Path, ...] | None = None
) -> Sandbox:
    """Return the sandbox for a receipt's code, after checking that this machine can make one.

    The receipt has no influence on it: the user must name data outside the experiment's folder.

    Args:
        code: the folder of the code.
        home: the experiment's folder here.
        changes: configuration keys that the user has set, dotted; paths in them can be read.
        interpreter: the folders of the Python that runs in it; None: of this one.

    Raises:
        ConfigError: bubblewrap is missing or may not make namespaces, or a folder would show the user's home.
    """
    check_bubblewrap()
    home = home.resolve()
    reads = [home, code.absolute(), *_paths_in(list(changes.values()), home)]
    for path in [*reads, *(_interpreter() if interpreter is None else interpreter)]:
        if shows_a_home(path):
            raise ConfigError(
                f"--sandbox: {path} is a home directory or contains one, and the sandbox would show it",
                hint="move the experiment and its data to separate folders, and run labtrain verify there",
            )
    return Sandbox(home=home, reads=tuple(reads), interpreter=interpreter)


def check_bubblewrap() -> None:
    """Raise ConfigError, with a hint, if bubblewrap is missing or may not make namespaces."""
    if shutil.which("bwrap") is None:
        raise ConfigError(
            "--sandbox: bubblewrap is not installed: bwrap is not on PATH",
            hint="apt-get install bubblewrap; or dnf install bubblewrap",
        )
    probe = ["bwrap", *ISOLATED, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    try:
        done = subprocess.run(
            probe, capture_output=True, text=True, errors="replace", check=False, timeout=PROBE_TIMEOUT_S
        )
        said = "" if not done.returncode else " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        said = f"it did not end within {PROBE_TIMEOUT_S} seconds"
    if said:
        raise ConfigError(f"--sandbox: bubblewrap cannot make a sandbox here: {said[:300]}", hint=_remedy())


def _remedy() -> str:
    """Return the command that lets users make namespaces on this kernel."""
    for name, off, on in (
        ("kernel.unprivileged_userns_clone", "0", "1"),  # Debian's
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),  # Ubuntu's, from 24.04 on
        ("user.max_user_namespaces", "0", "15000"),
    ):
        try:
            found = Path("/proc/sys", *name.split(".")).read_text().strip()
        except OSError:
            continue
        if found == off:
            return f"sudo sysctl -w {name}={on}"
    return "use a machine or container that allows user namespaces; labtrain verify RUN --steps 0 runs nothing"


def is_kept(name: str, value: str = "") -> bool:
    """Return whether a sandbox has a variable: a training needs it, and it is not a credential."""
    needed = name in KEPT or is_recorded(name)
    return needed and not names_a_secret(name) and without_secrets(value, names=False) == value


@contextmanager
def only_kept() -> Iterator[None]:
    """Reduce this process's environment temporarily to what a sandbox has."""
    others = {name: value for name, value in os.environ.items() if not is_kept(name, value)}
    for name in others:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(others)


def shows_a_home(path: Path) -> bool:
    """Return whether a folder is this user's home or contains it."""
    real = path.resolve()
    return real == Path("/") or any(home.resolve().is_relative_to(real) for home in _homes())


def _homes() -> set[Path]:
    """Return this user's home directories, by the environment and by the system."""
    found = {os.environ.get("HOME", "")}
    with suppress(KeyError):  # in a container the user may have no entry
        found.add(pwd.getpwuid(os.geteuid()).pw_dir)
    return {Path(home) for home in found if home not in ("", "/")}


def _system() -> list[str]:
    """Return bubblewrap's arguments for the system's files."""
    bound = [part for path in SYSTEM for part in ("--ro-bind-try", path, path)]
    bound += [part for name in ETC for part in ("--ro-bind-try", f"/etc/{name}", f"/etc/{name}")]
    for path in map(Path, LINKS):
        if path.is_symlink():
            bound += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            bound += ["--ro-bind", str(path), str(path)]
    for home in _homes():
        for place in {home, home.resolve()}:
            if any(place.is_relative_to(path) for path in SYSTEM):
                bound += ["--tmpfs", str(place)]
    return bound


def _interpreter() -> list[Path]:
    """Return the folders of this interpreter and of its imports."""
    named = [sys.prefix, sys.base_prefix, sys.exec_prefix, *(entry for entry in sys.path if entry)]
    named += os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    found = {place for name in named if name for place in (Path(name).absolute(), Path(name).resolve())}
    return sorted(path for path in found if path.exists() and path != Path("/usr"))


def _links(program: Path, shown: list[Path]) -> list[tuple[Path, str]]:
    """Return the links from a program to its file that are in no visible folder, such as ~/.local/bin/python3.11."""
    links: list[tuple[Path, str]] = []
    here = program.absolute()
    while here.is_symlink() and len(links) < 40:
        target = str(here.readlink())
        if not any(here.is_relative_to(path) for path in (*shown, *map(Path, SYSTEM), *map(Path, LINKS))):
            links.append((here, target))
        here = Path(os.path.normpath(here.parent / target))
    return links


def _paths_in(node: object, home: Path) -> list[Path]:
    """Return the existing paths in nested values; relative ones begin at the experiment's folder."""
    if isinstance(node, dict | list):
        return [
            path for child in (node.values() if isinstance(node, dict) else node) for path in _paths_in(child, home)
        ]
    with suppress(OSError, RuntimeError, ValueError):  # not a path: too long, an unknown user, a NUL
        if isinstance(node, str) and node and (path := home / Path(node).expanduser()).exists():
            return [path]
    return []


def _texts(node: object, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of each text of nested mappings."""
    if isinstance(node, str):
        yield key, node
    for name, child in node.items() if isinstance(node, dict) else ():
        yield from _texts(child, f"{key}.{name}")
