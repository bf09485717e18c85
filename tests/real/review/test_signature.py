"""Signatures of receipts: by OpenSSH, with keys that are made here, and a home and a git of their own."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.record import receipt
from labtrain.review.signature import FILE, NAMESPACE, Signature, check_signature, sign
from tests.conftest import LABTRAIN, need
from tests.quick.record.test_receipt import whole
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's keys, agent and settings but the test's."""
    need("ssh-keygen", "openssh-client")
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "home" / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("SSH_AUTH_SOCK", "DISPLAY", "WAYLAND_DISPLAY", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    receipt.write(tmp_path / "run", whole(run_id="0123456789ab", status="complete"))
    return tmp_path / "run"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "key")


def make_key(path: Path, passphrase: str = "", kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "", "-f", path], check=True)
    return path


def allow(key: Path, *, who: str = "ada@lab", options: str = "") -> Path:
    """Return an allowed signers file with this key alone."""
    file = key.with_name("allowed_signers")
    file.write_text(f"# whom the lab trusts\n{who} {options} {key.with_name(f'{key.name}.pub').read_text()}")
    return file


def fingerprint(key: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", f"{key}.pub"], capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


def git_config(name: str, value: str) -> None:
    subprocess.run(["git", "config", "--global", name, value], check=True)


def labtrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LABTRAIN, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
    )


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_what_was_signed_is_by_whom_the_file_says(run_dir: Path, tmp_path: Path, kind: str) -> None:
    key = make_key(tmp_path / kind, kind=kind)
    before = (run_dir / receipt.FILE).read_bytes()
    assert sign(run_dir, key=key) == run_dir / "receipt.json.sig"
    found = check_signature(run_dir, signers=allow(key))
    assert found == Signature(principal="ada@lab", fingerprint=fingerprint(key))
    assert (run_dir / receipt.FILE).read_bytes() == before
    assert sorted(path.name for path in run_dir.iterdir()) == [receipt.FILE, FILE]


def test_a_receipt_that_is_not_signed_has_no_signer(run_dir: Path, key: Path) -> None:
    assert check_signature(run_dir, signers=allow(key)) is None
    assert check_signature(run_dir, signers=None) is None


def test_ssh_keygen_itself_verifies_it(run_dir: Path, key: Path) -> None:
    """As somebody without labtrain would."""
    sign(run_dir, key=key)
    command = ["ssh-keygen", "-Y", "verify", "-f", allow(key), "-I", "ada@lab", "-n", "labtrain-receipt"]
    with (run_dir / receipt.FILE).open() as text:
        assert subprocess.run([*command, "-s", run_dir / FILE], stdin=text, check=False).returncode == 0


def test_one_changed_byte_of_the_receipt_is_refused(run_dir: Path, key: Path) -> None:
    """Each byte of it, one that no reader of JSON sees too; and one whose digest was written anew."""
    sign(run_dir, key=key)
    text = (run_dir / receipt.FILE).read_bytes()
    for changed in (text.replace(b"0123456789ab", b"0123456789ad"), text + b" ", text[:-1], b""):
        (run_dir / receipt.FILE).write_bytes(changed)
        with pytest.raises(DamagedError, match=r"is not a signature of this receipt\.json: .*incorrect signature"):
            check_signature(run_dir, signers=allow(key))
    receipt.write(run_dir, whole(run_id="0123456789ad", status="complete"))
    assert receipt.read(run_dir) is not None
    with pytest.raises(DamagedError):
        check_signature(run_dir, signers=allow(key))
    (run_dir / receipt.FILE).write_bytes(text)
    assert check_signature(run_dir, signers=allow(key)) is not None


def test_a_changed_signature_is_refused(run_dir: Path, key: Path) -> None:
    sign(run_dir, key=key)
    lines = (run_dir / FILE).read_text().splitlines(keepends=True)
    other = "B" if lines[-2][0] == "A" else "A"
    for changed in ([*lines[:-2], other + lines[-2][1:], lines[-1]], lines[:2], ["nothing\n"], []):
        (run_dir / FILE).write_text("".join(changed))
        with pytest.raises(DamagedError, match="is not a signature of this"):
            check_signature(run_dir, signers=allow(key))


def test_a_signature_without_a_receipt_is_refused(run_dir: Path, key: Path) -> None:
    sign(run_dir, key=key)
    (run_dir / receipt.FILE).unlink()
    with pytest.raises(DamagedError, match=r"exists, but no receipt\.json"):
        check_signature(run_dir, signers=allow(key))


def test_anothers_key_is_refused_with_its_fingerprint_and_the_line_to_add(
    run_dir: Path, key: Path, tmp_path: Path
) -> None:
    """Which is enough: with that line it is somebody's."""
    (tmp_path / "other").mkdir()
    stranger = make_key(tmp_path / "other" / "key")
    sign(run_dir, key=stranger)
    signers = allow(key)
    with pytest.raises(LabtrainError, match="which is not in") as caught:
        check_signature(run_dir, signers=signers)
    assert not isinstance(caught.value, DamagedError)
    assert fingerprint(stranger) in str(caught.value)
    line = re.search(r"NAME@HOST .*", caught.value.hint)
    assert line
    signers.write_text(signers.read_text() + line[0].replace("NAME@HOST", "grace@lab") + "\n")
    assert check_signature(run_dir, signers=signers) == Signature(
        principal="grace@lab", fingerprint=fingerprint(stranger)
    )


@pytest.mark.parametrize(
    ("who", "found"), [("ada@lab,grace@lab", "ada@lab"), ("*@lab", "*@lab"), ('"Ada Lovelace"', "Ada Lovelace")]
)
def test_the_principal_is_the_first_that_the_file_names(run_dir: Path, key: Path, who: str, found: str) -> None:
    sign(run_dir, key=key)
    signature = check_signature(run_dir, signers=allow(key, who=who))
    assert signature is not None
    assert signature.principal == found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ('valid-before="20200101"', "expired"),
        ('valid-after="29990101"', "not yet valid"),
        ('namespaces="git"', "not permitted"),
    ],
)
def test_a_key_that_may_not_sign_this_today_is_refused_and_said_why(
    run_dir: Path, key: Path, options: str, says: str
) -> None:
    sign(run_dir, key=key)
    with pytest.raises(LabtrainError, match="does not allow the key SHA256:") as caught:
        check_signature(run_dir, signers=allow(key, options=options))
    assert says in str(caught.value)
    assert check_signature(run_dir, signers=allow(key, options=f'namespaces="git,{NAMESPACE}"')) is not None


def test_a_signature_for_another_purpose_is_none(run_dir: Path, key: Path) -> None:
    """One that somebody got for a commit or a mail, over the same bytes."""
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", "git", run_dir / receipt.FILE],
        check=True,
        capture_output=True,
    )
    with pytest.raises(DamagedError, match="namespace does not match"):
        check_signature(run_dir, signers=allow(key))


def test_a_running_receipt_is_not_signed(tmp_path: Path, key: Path) -> None:
    receipt.write(tmp_path, whole(run_id="0123456789ab", status="running", results={}))
    with pytest.raises(LabtrainError, match="its receipt will change"):
        sign(tmp_path, key=key)
    assert not (tmp_path / FILE).exists()


def test_what_cannot_be_trusted_is_not_signed(run_dir: Path, tmp_path: Path, key: Path) -> None:
    (run_dir / receipt.FILE).write_text((run_dir / receipt.FILE).read_text().replace("0123456789ab", "0123456789ad"))
    with pytest.raises(DamagedError, match="was changed after it was written"):
        sign(run_dir, key=key)
    with pytest.raises(LabtrainError, match=r"is not a run: looked for receipt\.json"):
        sign(tmp_path, key=key)
    assert not (run_dir / FILE).exists()


def test_a_key_with_a_passphrase_is_refused_in_a_batch_and_does_not_wait(run_dir: Path, tmp_path: Path) -> None:
    """Without a terminal as its input, and also where its session has one: a pseudo-terminal that nobody types in."""
    key = make_key(tmp_path / "locked", passphrase="a secret")
    started = time.monotonic()
    done = labtrain("sign", str(run_dir), "--key", str(key))
    assert (done.returncode, done.stdout) == (2, "")
    assert "passphrase" in done.stderr
    assert f"hint: ssh-add {key}" in done.stderr
    pid, terminal = os.forkpty()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execv(LABTRAIN, [LABTRAIN, "sign", str(run_dir), "--key", str(key)])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    os.close(terminal)
    assert time.monotonic() - started < 20
    assert not (run_dir / FILE).exists()


def test_a_person_at_a_terminal_is_asked_for_the_passphrase(run_dir: Path, tmp_path: Path) -> None:
    key = make_key(tmp_path / "locked", passphrase="a secret")
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(LABTRAIN, [LABTRAIN, "sign", str(run_dir), "--key", str(key)])
    said = b""
    while b"passphrase" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"a secret\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert check_signature(run_dir, signers=allow(key)) is not None


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    need("ssh-agent", "openssh-client")
    socket = tmp_path / "s"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    wait_until(socket.exists, process=process)
    yield
    process.kill()
    process.wait()


@pytest.mark.usefixtures("agent")
def test_an_agent_signs_with_a_key_that_git_has_by_value(run_dir: Path, key: Path) -> None:
    subprocess.run(["ssh-add", "-q", key], check=True)
    public = Path(f"{key}.pub").read_text().strip()
    signers = allow(key)
    key.unlink()
    git_config("gpg.format", "ssh")
    for value in (f"key::{public}", public, f"{key}.pub"):
        git_config("user.signingkey", value)
        sign(run_dir, key=None)
        assert check_signature(run_dir, signers=signers) is not None
        (run_dir / FILE).unlink()
    subprocess.run(["ssh-add", "-q", "-D"], check=True)
    with pytest.raises(LabtrainError, match="cannot sign: No private key"):
        sign(run_dir, key=None)


def test_the_keys_and_signers_of_git_are_the_usual_ones(run_dir: Path, key: Path, tmp_path: Path) -> None:
    """With gpg.format=ssh alone: of a key of GnuPG nothing is asked. Paths below the home are found as git finds them."""
    with pytest.raises(LabtrainError, match=r"no key to sign with: looked for .*id_ed25519") as caught:
        sign(run_dir, key=None)
    assert "user.signingkey" in str(caught.value)
    usual = make_key(tmp_path / "home" / ".ssh" / "id_ed25519")
    sign(run_dir, key=None)
    with pytest.raises(LabtrainError, match=r"gpg\.ssh\.allowedSignersFile") as caught:
        check_signature(run_dir, signers=None)
    assert "--signers FILE" in caught.value.hint
    git_config("gpg.ssh.allowedSignersFile", "~/.ssh/allowed_signers")
    with pytest.raises(LabtrainError, match="no such file"):
        check_signature(run_dir, signers=None)
    allow(usual)
    assert check_signature(run_dir, signers=None) == Signature(principal="ada@lab", fingerprint=fingerprint(usual))

    git_config("user.signingkey", "~/key")
    shutil.copy(key, tmp_path / "home" / "key")
    sign(run_dir, key=None)
    assert check_signature(run_dir, signers=None) is not None
    git_config("gpg.format", "ssh")
    sign(run_dir, key=None)
    with pytest.raises(LabtrainError, match="which is not in"):
        check_signature(run_dir, signers=None)
    assert check_signature(run_dir, signers=allow(key)) is not None


def test_a_repository_names_its_signers_and_a_runs_folder_does_not(run_dir: Path, key: Path, tmp_path: Path) -> None:
    """A folder that somebody hands on could hold a .git, with signers of its own."""
    sign(run_dir, key=key)
    signers = allow(key)
    for folder in (run_dir, tmp_path / "lab"):
        subprocess.run(["git", "init", "-q", folder], check=True)
        subprocess.run(
            ["git", "-C", folder, "config", "gpg.ssh.allowedSignersFile", "trusted/allowed_signers"], check=True
        )
        (folder / "trusted").mkdir()
        shutil.copy(signers, folder / "trusted")
    with pytest.raises(LabtrainError, match="no allowed signers"):
        check_signature(run_dir, signers=None)
    (tmp_path / "lab" / "runs").mkdir()
    os.chdir(tmp_path / "lab" / "runs")
    assert check_signature(run_dir, signers=None) is not None


def test_a_run_that_went_on_is_signed_again(run_dir: Path, key: Path) -> None:
    receipt.write(run_dir, whole(run_id="0123456789ab", status="interrupted", results={}))
    sign(run_dir, key=key)
    receipt.write(run_dir, whole(run_id="0123456789ab", status="complete"))
    with pytest.raises(DamagedError, match="is not a signature of this") as caught:
        check_signature(run_dir, signers=allow(key))
    assert "labtrain sign run" in caught.value.hint
    sign(run_dir, key=key)
    assert check_signature(run_dir, signers=allow(key)) is not None


def test_without_ssh_keygen_it_says_how_to_get_it(
    run_dir: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(run_dir, key=key)
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (lambda: sign(run_dir, key=key), lambda: check_signature(run_dir, signers=allow(key))):
        with pytest.raises(LabtrainError, match="ssh-keygen is not installed") as caught:
            call()
        assert caught.value.hint == "apt-get install openssh-client"


def test_the_command_prints_the_signature_and_says_what_is_wrong(run_dir: Path, key: Path, tmp_path: Path) -> None:
    done = labtrain("sign", "run", "--key", str(key))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{Path('run', FILE)}\n", "")
    assert check_signature(run_dir, signers=allow(key)) is not None
    for run, given in (
        (str(tmp_path), str(key)),
        (str(run_dir), str(tmp_path / "none")),
        (str(run_dir), str(tmp_path)),
    ):
        done = labtrain("sign", run, "--key", given)
        assert (done.returncode, done.stdout) == (2, "")
        assert "hint: " in done.stderr
