"""`labtrain verify` and `gate` of somebody else's receipt: nothing runs unless the user says so, or in a sandbox."""

import json
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from labtrain.record import receipt as receipts
from labtrain.record.sources import source_digests
from labtrain.review.sandbox import make_sandbox
from tests.conftest import LABTRAIN, QUICK, Experiment, Run, changed, need, skip_or_fail
from tests.support.verification import git
from tests.support.waiting import wait_until

SHORT = (*QUICK, "trainer.max_steps=2")
# Model code that tries all that it should not be able to, where it is verified; what it could is in its error.
PROBE = """
def _probe():
    import ctypes, json, os, pathlib, socket, subprocess

    if "labtrain-verify-" not in os.environ.get("HOME", ""):
        return
    here = pathlib.Path(__file__).parent
    wanted = json.loads((here / "probe.json").read_text())
    could = []

    def tries(name, action):
        try:
            if action() is not False:
                could.append(name)
        except Exception:
            pass

    def connects(family, address):
        with socket.socket(family, socket.SOCK_STREAM) as end:
            end.settimeout(3)
            end.connect(address)

    def can_write(path):  # nothing is: this code also runs outside of a sandbox
        return os.access(path, os.W_OK)

    tries("loopback", lambda: connects(socket.AF_INET, ("127.0.0.1", wanted["port"])))
    tries("address", lambda: connects(socket.AF_INET, ("192.0.2.1", 80)))
    tries("interfaces", lambda: {name for _, name in socket.if_nameindex()} != {"lo"})
    tries("agent", lambda: connects(socket.AF_UNIX, wanted["agent"]))
    tries("abstract", lambda: connects(socket.AF_UNIX, "\\0" + wanted["abstract"]))
    for path in wanted["secrets"]:
        tries(f"reads {path}", lambda: pathlib.Path(path).read_bytes())
        tries(f"writes {path}", lambda: can_write(path))
    for folder in (*wanted["folders"], str(here), "/", "/etc", "/usr", "/var/tmp", "/sys"):
        tries(f"writes into {folder}", lambda: can_write(folder))
    for name in wanted["variables"]:
        tries(f"variable {name}", lambda: os.environ[name])
    for environ in pathlib.Path("/proc").glob("[0-9]*/environ"):
        tries(f"environment of {environ}", lambda: wanted["value"].encode() in environ.read_bytes())
    tries("processes", lambda: any(wanted["program"].encode() in each.read_bytes()
                                   for each in pathlib.Path("/proc").glob("[0-9]*/cmdline")))
    tries("mount", lambda: subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f"mount -o remount,bind,rw '{here}' && test -w '{here}'"],
        check=True, capture_output=True))
    tries("chroot", lambda: os.chroot(os.path.join("/proc/1/root", "..")))
    tries("terminal", lambda: os.open("/dev/tty", os.O_RDWR))
    tries("no scratch", lambda: not can_write(os.environ["TMPDIR"]) or not can_write("/tmp"))
    raise RuntimeError("could: " + json.dumps(could))


_probe()
"""


SPOIL = """
import atexit
import os
import pathlib


def _spoil():
    if pathlib.Path("spoil").exists():
        for run in pathlib.Path(os.environ["TMPDIR"]).glob("runs/*/*"):
            run.rename(run.with_name("away"))
            run.symlink_to("/etc")


atexit.register(_spoil)
"""


def verify(run: Path, *options: str, cwd: Path, code: int | None, prefix: tuple[str, ...] = (), **env: str) -> Run:
    """Run `labtrain verify` without a terminal."""
    done = subprocess.run(
        [*prefix, LABTRAIN, "verify", str(run), *options], capture_output=True, text=True, check=False, timeout=300,
        cwd=cwd, env=os.environ | env, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Run(done.returncode, done.stdout, done.stderr, cwd)


def on_a_terminal(*command: str, answer: str, cwd: Path) -> tuple[int, str]:
    """Run a command on a terminal, type an answer when it asks, and return its exit code and all that was shown."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execv(command[0], command)
    shown, typed = b"", False
    with suppress(OSError):  # its end
        while select.select([terminal], [], [], 300)[0] and (part := os.read(terminal, 65536)):
            shown += part
            if not typed and b"[y/N]" in shown:
                os.write(terminal, answer.encode())
                typed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


@pytest.fixture(scope="module")
def own(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """An experiment in a git repository, and a run of it that this user has trained."""
    root = tmp_path_factory.mktemp("trust") / "digits"
    shutil.copytree(shared_experiment.root, root, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    (root / "model.py").write_text((root / "model.py").read_text() + PROBE)
    (root / "probe.json").write_text("{}")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    experiment = Experiment(root)
    return experiment, experiment.train(*SHORT, cwd=root).folder


@pytest.fixture
def mailed(own: tuple[Experiment, Path], tmp_path: Path) -> Path:
    """Its receipt alone, in a folder of its own: forge it, and verify it in the experiment."""
    (tmp_path / "mail").mkdir()
    shutil.copy(own[1] / "receipt.json", tmp_path / "mail")
    return tmp_path / "mail"


def with_canary(mailed: Path, canary: Path) -> None:
    """Put what writes a file when it is run into a receipt: in its patch, and as a target of its configuration."""
    found = receipts.read(mailed)
    assert found is not None
    found["config"]["callbacks"] = {
        "x": {"_target_": "sympy.sympify", "a": f"__import__('pathlib').Path({str(canary)!r}).touch()"}
    }
    receipts.write(mailed, found)


def test_of_a_run_of_ones_own_nothing_is_asked(own: tuple[Experiment, Path]) -> None:
    """Where it was trained; the folder is also what its receipt is given with from elsewhere."""
    experiment, run_dir = own
    found = verify(run_dir, "--steps", "1", cwd=experiment.root, code=0)
    assert "the same bits, step" in found.out
    assert "runs   " not in found.out


def test_what_was_changed_or_lies_elsewhere_is_asked_for_and_refused_without_a_terminal(
    own: tuple[Experiment, Path], mailed: Path, tmp_path: Path, state_home: Path
) -> None:
    experiment, run_dir = own
    remembered = len(list((state_home / "labtrain" / "trained").iterdir()))
    asked = (
        lambda: changed(mailed, "config/seed", 43),
        lambda: changed(mailed, "code/patch", "\n"),
        lambda: shutil.copytree(experiment.root, tmp_path / "copy"),
    )
    for number, change in enumerate(asked):
        change()
        copied = number == len(asked) - 1
        place = tmp_path / "copy" / run_dir.relative_to(experiment.root) if copied else mailed
        found = verify(place, cwd=tmp_path / "copy" if copied else experiment.root, code=2)
        assert "there is no terminal to ask on" in found.err
        assert "hint: labtrain verify " in found.err
        assert "runs         as you, with your files and your network" in found.out
    assert len(list((state_home / "labtrain" / "trained").iterdir())) == remembered


def test_a_person_sees_commit_patch_and_targets_and_decides(
    own: tuple[Experiment, Path], mailed: Path, tmp_path: Path
) -> None:
    """Enter is a no, and runs nothing; a yes does. What the patch holds is shown escaped, and applied as it is."""
    experiment, canary = own[0], tmp_path / "ran"
    changed_file = experiment.root / "data.py"
    before = changed_file.read_text()
    changed_file.write_text(before + "HIDDEN = '\x1b[1A\u202e'\n")
    patch = subprocess.run(["git", "-C", experiment.root, "diff"], capture_output=True, text=True, check=True).stdout
    sources = receipts.read(mailed)["code"]["sources"]  # type: ignore[index]
    changed(mailed, "code/sources", sources | {"data.py": source_digests(experiment.root)["data.py"]})
    changed_file.write_text(before)
    changed(mailed, "code/patch", patch)
    with_canary(mailed, canary)
    command = (LABTRAIN, "verify", str(mailed / "receipt.json"))
    code, shown = on_a_terminal(*command, answer="\n", cwd=experiment.root)
    assert code == 2
    assert "not confirmed" in shown
    commit = receipts.read(mailed)["code"]["commit"]  # type: ignore[index]
    assert f"code       commit {commit} of {experiment.root}, with the patch" in shown
    assert r"  | +HIDDEN = '\x1b[1A\u202e'" in shown
    assert "patch      data.py +1 -0" in shown
    assert "target     callbacks.x._target_: sympy.sympify" in shown
    assert "\u202e" not in shown
    assert not canary.exists()
    code, shown = on_a_terminal(*command, answer="y\n", cwd=experiment.root)
    assert code == 2  # the target is no callback
    assert canary.exists()


def test_nothing_is_run_with_steps_0_in_a_folder_from_the_mail(own: tuple[Experiment, Path], tmp_path: Path) -> None:
    """Not train.py, model.py or a module beside them, no target, patch or search path, nothing of .git/config."""
    root, canary = tmp_path / "digits", tmp_path / "ran"
    shutil.copytree(own[0].root, root)
    run_dir = root / own[1].relative_to(own[0].root)
    with_canary(run_dir, canary)
    runs = f"touch {canary}; false"
    script = root / ".git" / "evil"
    script.write_text(f"#!/bin/sh\n{runs}\n")
    script.chmod(0o755)
    settings = {
        "core.fsmonitor": script, "core.hooksPath": root / ".git" / "evil-hooks", "core.sshCommand": script,
        "core.editor": script, "core.pager": script, "diff.external": script, "diff.x.textconv": script,
        "diff.x.command": script, "filter.x.clean": script, "filter.x.smudge": script, "filter.x.process": script,
        "filter.x.required": "true", "core.askPass": script, "credential.helper": f"!{script}", "core.gitProxy": script,
        "extensions.partialClone": "origin", "remote.origin.promisor": "true", "remote.origin.url": f"ext::{script}",
        "remote.origin.uploadpack": script, "protocol.ext.allow": "always", "uploadpack.packObjectsHook": script,
        "gpg.program": script, "interactive.diffFilter": script, "alias.rev-parse": f"!{script}", "alias.init": f"!{script}",
    }  # fmt: skip
    for key, value in settings.items():
        git(root, "config", key, str(value))
    (root / ".git" / "evil-hooks").mkdir()
    for hook in ("post-checkout", "post-index-change", "reference-transaction", "pre-auto-gc", "fsmonitor-watchman"):
        for folder in ("hooks", "evil-hooks"):
            shutil.copy(script, root / ".git" / folder / hook)
    (root / ".gitattributes").write_text("* filter=x diff=x\n")
    python = f"import os; os.system({runs!r})\n"
    for name in (
        "train.py",
        "model.py",
        "data.py",
        "sitecustomize.py",
        "yaml.py",
        "evil/__init__.py",
        "hydra_plugins/x.py",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(python)
    conf = root / "conf" / "config.yaml"
    conf.write_text(conf.read_text() + "\nhydra: {searchpath: [pkg://evil]}\n")
    verify(run_dir, "--steps", "0", cwd=root, code=0)
    assert not canary.exists()
    patch = f"diff --git a/new.py b/new.py\nnew file mode 100644\n--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+{python}"
    changed(run_dir, "code/patch", patch)
    assert "does not match the receipt: new.py" in verify(run_dir, "--steps", "1", cwd=root, code=2).err
    changed(run_dir, "code/commit", "0" * 40)
    assert "is not in this repository" in verify(run_dir, "--steps", "0", cwd=root, code=2).err
    assert not canary.exists()
    subprocess.run(["git", "-C", root, "status"], capture_output=True, check=False)
    assert canary.exists()  # they would run where git is asked


def test_a_gate_asks_as_well(own: tuple[Experiment, Path], mailed: Path) -> None:
    changed(mailed, "config/seed", 43)
    done = subprocess.run([LABTRAIN, "gate", own[1], mailed / "receipt.json"], capture_output=True, text=True, check=False,
                          cwd=own[0].root, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 2
    assert "there is no terminal to ask on" in done.stderr


# ------------------------------------------------------------------------------------------------------ the sandbox


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[dict[str, object]]:
    """What a sandbox must not reach: a server on the loopback, a socket of an agent, an abstract one."""
    need("bwrap", "bubblewrap")
    ends = [socket.socket(family, socket.SOCK_STREAM) for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_UNIX)]
    folder, before = tmp_path / "agent", Path.cwd()
    folder.mkdir()
    os.chdir(folder)  # a path of a socket has at most 107 bytes
    ends[0].bind(("127.0.0.1", 0))
    ends[1].bind("s")
    os.chdir(before)
    ends[2].bind(f"\0labtrain-{os.getpid()}")
    for end in ends:
        end.listen()
    yield {"port": ends[0].getsockname()[1], "agent": str(folder / "s"), "abstract": f"labtrain-{os.getpid()}"}
    for end in ends:
        end.close()


def test_in_the_sandbox_model_code_reaches_nothing(
    own: tuple[Experiment, Path], listening: dict[str, object], tmp_path: Path
) -> None:
    """No network, home, agent, file outside, process, terminal or credential; scratch and /tmp of its own it has."""
    root = tmp_path / "digits"
    shutil.copytree(own[0].root, root)
    home = tmp_path / "labtrain-verify-home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_ed25519").write_text("secret")
    names = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "SSH_AUTH_SOCK", "TORCH_TOKEN", "MY_PASSWORD")
    variables = dict.fromkeys(names, "hidden-by-the-sandbox") | {"HOME": str(home)}
    variables["SSH_AUTH_SOCK"] = str(listening["agent"])
    wanted = listening | {
        "secrets": [
            str(home / ".ssh" / "id_ed25519"),
            str(Path.home() / ".bashrc"),
            str(Path.home() / ".profile"),
            "/etc/shadow",
        ],
        "folders": [str(home), str(Path.home())],
        "variables": names,
        "value": "hidden-by-the-sandbox",
        "program": "labtrain\0verify",
    }
    (root / "probe.json").write_text(json.dumps(wanted))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_socket()}
    run_dir = root / own[1].relative_to(own[0].root)
    found = verify(run_dir, "--sandbox", cwd=root, code=2, **variables)
    assert "could: []" in found.err, found.err
    assert f"sandbox      no network, no home; reads {root}" in found.out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    outside = verify(run_dir, "--trust", cwd=root, code=2, **variables).err  # the probe can tell
    for could in ("loopback", "agent", "abstract", "reads ", "variable HF_TOKEN", "environment of", "processes"):
        assert could in outside


def test_in_the_sandbox_the_bits_are_the_same(own: tuple[Experiment, Path], tmp_path: Path) -> None:
    """On two devices, which meet on the sandbox's own loopback."""
    need("bwrap", "bubblewrap")
    root = tmp_path / "digits"
    shutil.copytree(own[0].root, root, ignore=shutil.ignore_patterns("runs"))
    model = (root / "model.py").read_text().replace("\n_probe()\n", "\n")
    (root / "model.py").write_text(model + SPOIL)
    run = Experiment(root).train(*SHORT, cwd=root)
    shutil.copytree(run.folder, tmp_path / "mail")
    found = verify(tmp_path / "mail", "--sandbox", "--devices", "2", cwd=root, code=0)
    assert found.out.splitlines()[-1] == "yes          the same bits to the end"
    (root / "spoil").touch()  # the same code now ends with a link in place of its run, and exit code 0
    found = verify(tmp_path / "mail", "--sandbox", cwd=root, code=2)
    assert "error: the rerun left no valid " in found.err
    assert "a link to /etc" in found.err
    assert "Traceback" not in found.err


def test_the_users_git_filters_do_not_run_for_a_sandbox(own: tuple[Experiment, Path], tmp_path: Path) -> None:
    """They would run outside of it, on what somebody else committed, and nobody was asked."""
    need("bwrap", "bubblewrap")
    root, canary = tmp_path / "digits", tmp_path / "ran"
    shutil.copytree(own[0].root, root, ignore=shutil.ignore_patterns("runs"))
    (root / ".gitattributes").write_text("*.bin filter=x\n")
    (root / "w.bin").write_text("pointer\n")
    (root / "model.py").write_text((root / "model.py").read_text().replace("\n_probe()\n", "\n"))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a file of data")
    shutil.copytree(Experiment(root).train(*SHORT, cwd=root).folder, tmp_path / "mail")
    (root / "model.py").write_text("changed = 1\n")
    (tmp_path / "gitconfig").write_text(f'[filter "x"]\n\tsmudge = touch {canary} && cat\n')
    config = {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig")}
    assert "the same bits" in verify(tmp_path / "mail", "--sandbox", "--steps", "1", cwd=root, code=0, **config).out
    assert not canary.exists()
    assert "the same bits" in verify(tmp_path / "mail", "--trust", "--steps", "1", cwd=root, code=0, **config).out
    assert canary.exists()


def test_it_reads_what_the_user_names_and_writes_to_scratch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it ends, with all that it started, when what started it is killed."""
    need("bwrap", "bubblewrap")
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if not tmp_path.is_relative_to(entry or ".")])
    for name in ("lab", "data", "other", "scratch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    sandbox = make_sandbox(code=tmp_path / "lab", home=tmp_path / "lab", changes={"data.root": "../data", "x": 3})
    script = "; ".join(
        f"cat {tmp_path}/{name}/file; echo > {tmp_path}/{name}/new" for name in ("lab", "data", "other", "scratch")
    )
    command, variables = sandbox.around(["sh", "-c", script], dict(os.environ), scratch=tmp_path / "scratch")
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.stdout == "labdatascratch"
    assert [path.parent.name for path in tmp_path.glob("*/new")] == ["scratch"]
    beat = tmp_path / "scratch" / "beat"
    script = f"(while :; do date +%s%N > {beat}; sleep 0.01; done) & wait"  # fixed: until it is killed
    command, variables = sandbox.around(["sh", "-c", script], dict(os.environ), scratch=tmp_path / "scratch")
    child = subprocess.Popen(command, env=variables)
    wait_until(beat.read_text, process=child)
    alive = lambda: [each for each in psutil.process_iter(["cmdline"]) if script in (each.info["cmdline"] or [])]  # noqa: E731
    assert alive()
    child.kill()
    child.wait()
    wait_until(lambda: not alive(), 30)


def test_without_bubblewrap_or_namespaces_the_sandbox_is_refused(own: tuple[Experiment, Path], tmp_path: Path) -> None:
    """Not installed; and in a user namespace that may have no more of them, as where a kernel or container forbids it."""
    need("bwrap", "bubblewrap")
    experiment, run_dir = own
    (tmp_path / "bin").mkdir()
    for program in ("git", "ssh-keygen"):
        if (found := shutil.which(program)) is not None:
            (tmp_path / "bin" / program).symlink_to(found)
    without = verify(run_dir, "--sandbox", cwd=experiment.root, code=2, PATH=str(tmp_path / "bin"))
    assert "bubblewrap is not installed" in without.err
    assert "hint: apt-get install bubblewrap" in without.err
    forbids = ("unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh")
    if subprocess.run([*forbids, "true"], check=False, capture_output=True).returncode:
        skip_or_fail("this machine allows no user namespace to try it in")
    refused = verify(run_dir, "--sandbox", cwd=experiment.root, code=2, prefix=forbids)
    assert "bubblewrap cannot make a sandbox here" in refused.err
    assert "hint: sudo sysctl -w user.max_user_namespaces=15000" in refused.err
