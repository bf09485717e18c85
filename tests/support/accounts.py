"""Real accounts of this machine: two in one group, and a stranger."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import LABTRAIN, Experiment, need, skip_or_fail

GROUP, MEMBERS, STRANGER = "labtrain-lab", ("labtrain-one", "labtrain-two"), "labtrain-else"


def opened(hold: Path) -> list[str]:
    """Return the beginning of a command that can read this Python, also if it is in root's home, which is closed.

    In a mount namespace of its own, an open folder lies over the closed one, with only this Python in it.
    """
    base = Path(sys.base_prefix)
    closed = [each for each in reversed(base.parents) if not each.stat().st_mode & stat.S_IXOTH]
    if not closed:
        return []
    over = f"umask 022 && mount --bind {base} {hold} && mount -t tmpfs -o mode=755 none {closed[0]} && mkdir -p {base}"
    return ["unshare", "-m", "sh", "-c", f'{over} && mount --bind {hold} {base} && exec "$@"', "sh"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """An account, its home with a copy of the experiment, and the umask of its shell."""

    name: str
    home: Path
    umask: str

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """Start a command as this user, in the copy of the experiment, with the variables of a fresh login."""
        variables = {"HOME": str(self.home), "TMPDIR": str(self.home), "PATH": os.environ["PATH"], "USER": self.name}
        become = ["setpriv", "--reuid", self.name, "--regid", self.name, "--init-groups"]
        shell = ["sh", "-c", f'umask {self.umask}; exec "$@"', "sh"]
        return subprocess.Popen([*opened(self.home.parent / "python"), *become, *shell, *map(str, command)], cwd=self.home / "digits", env=variables,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.start(*command)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def labtrain(self, *arguments: str | Path, code: int | None = 0) -> str:
        """Run labtrain and return all that it prints."""
        done = self.run(LABTRAIN, *arguments)
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@dataclass(frozen=True, kw_only=True, slots=True)
class Lab:
    """Two members of a group with the umasks 077 and 022, a stranger, and the folder that belongs to the group."""

    one: Account
    two: Account
    stranger: Account
    folder: Path


@pytest.fixture(scope="module")
def lab(shared_experiment: Experiment) -> Iterator[Lab]:
    if os.getuid():
        skip_or_fail("only root can make accounts: run the tests as root to see this one")
    need("setpriv", "util-linux")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        top = Path(place)
        top.chmod(0o755)
        (top / "python").mkdir()
        try:
            subprocess.run(["groupadd", GROUP], check=True)
            accounts = [_account(name, top, umask, shared_experiment)
                        for name, umask in zip((*MEMBERS, STRANGER), ("077", "022", "022"), strict=True)]  # fmt: skip
            (top / "lab").mkdir()
            shutil.chown(top / "lab", group=GROUP)
            (top / "lab").chmod(0o2775)
            if (tried := accounts[2].run(LABTRAIN, "--version")).returncode:
                skip_or_fail(
                    f"other users cannot run {LABTRAIN}: {tried.stderr.strip()}: install it outside of root's home"
                )
            yield Lab(one=accounts[0], two=accounts[1], stranger=accounts[2], folder=top / "lab")
        finally:
            for name in (*MEMBERS, STRANGER):
                subprocess.run(["userdel", name], check=False, capture_output=True)
            subprocess.run(["groupdel", GROUP], check=False, capture_output=True)


def _account(name: str, top: Path, umask: str, experiment: Experiment) -> Account:
    home = top / name
    groups = [] if name == STRANGER else ["-G", GROUP]
    subprocess.run(["useradd", "-M", "-U", "-d", home, "-s", "/bin/sh", *groups, name], check=True)
    shutil.copytree(experiment.root, home / "digits", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    subprocess.run(["chown", "-R", f"{name}:{name}", home], check=True)
    home.chmod(0o700)
    return Account(name=name, home=home, umask=umask)
