"""verified.jsonl: what a line claims, what a signed one proves, and to whom. By OpenSSH, with keys that are made here."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.record import receipt
from labtrain.review.report.data import read_runs
from labtrain.review.report.page import ShownVerdict, verdict_of
from labtrain.review.verdicts import MOST_CHECKED, VERIFIED, Verification, check_key, note, read_verifications
from tests.conftest import LABTRAIN, ROOT, need
from tests.real.review.test_signature import allow, fingerprint, make_key


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's keys, agent and settings but the test's."""
    need("ssh-keygen", "openssh-client")
    for name in ("SSH_AUTH_SOCK", "DISPLAY", "SSH_ASKPASS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HOME", "home"), ("GIT_CONFIG_GLOBAL", "home/gitconfig")):
        monkeypatch.setenv(name, str(tmp_path / value))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The golden run's receipt and trail."""
    (tmp_path / "run").mkdir()
    for name in ("receipt.json", "trail.jsonl"):
        shutil.copy(ROOT / "tests/golden" / name, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "key")


def noted(run_dir: Path, key: Path | None = None, **more: Any) -> None:
    found = receipt.read(run_dir)
    assert found is not None
    note(run_dir, found, **{"hardware": {"cpu": "A CPU"}, "from_step": 0, "to_step": 300, "whole": True, "same": True,
         "found": "the same bits to the end", "key": key, **more})  # fmt: skip


def read(run_dir: Path, signers: Path | None) -> list[Verification]:
    found = receipt.read(run_dir)
    assert found is not None
    return read_verifications(run_dir, digest=found["digest"], signers=signers)


def shown(run_dir: Path, signers: Path | None) -> ShownVerdict:
    return verdict_of(read_runs([run_dir], signers)[0])


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / VERIFIED).read_text().splitlines()]


def rewrite(run_dir: Path, *entries: dict[str, Any]) -> None:
    (run_dir / VERIFIED).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_line_by_hand_is_shown_as_what_it_claims(run_dir: Path, key: Path) -> None:
    """Whatever name stands in it; and nothing of the page says that it was verified."""
    noted(run_dir)
    rewrite(run_dir, lines(run_dir)[0] | {"by": "nature-reviewer-2"})
    verdict = shown(run_dir, allow(key))
    assert (verdict.mark, verdict.word) == ("none", "Claimed, not verified")
    assert verdict.text.startswith(
        "verified.jsonl claims: A rerun to the end, steps 1 to 300, gave the same bits. By nature-reviewer-2 on "
    )
    assert "Nothing proves this claim: it is not signed." in verdict.text
    assert verdict.command == "labtrain verify run"
    subprocess.run([LABTRAIN, "report", run_dir, "-o", "a.html"], check=True, capture_output=True)
    page = Path("a.html").read_text()
    assert "<strong>Claimed, not verified</strong>" in page
    assert "no known signer: it is not signed" in page
    assert "<strong>Verified" not in page


def test_a_signed_line_is_verified_by_whom_the_reader_knows(run_dir: Path, key: Path) -> None:
    """To one with an allowed signers file, by the option or by git; to another it is a claim, with the key that signed."""
    noted(run_dir, key)
    (found,) = read(run_dir, allow(key))
    assert found.signer is not None
    assert (found.signer.principal, found.signer.fingerprint, found.doubt) == ("ada@lab", fingerprint(key), "")
    verdict = shown(run_dir, allow(key))
    assert (verdict.mark, verdict.word, verdict.command) == ("same", "Verified", "")
    assert f"By ada@lab, who signed it with the key {fingerprint(key)}, on " in verdict.text
    subprocess.run([LABTRAIN, "report", run_dir, "-o", "a.html", "--signers", "allowed_signers"], check=True)
    assert "<strong>Verified</strong>" in Path("a.html").read_text()

    assert "no allowed signers" in shown(run_dir, None).text
    assert shown(run_dir, None).mark == "none"
    subprocess.run(["git", "config", "--global", "gpg.ssh.allowedSignersFile", str(allow(key))], check=True)
    assert shown(run_dir, None).mark == "same"
    (key.parent / "theirs").mkdir()
    other = allow(make_key(key.parent / "theirs/key"))
    verdict = shown(run_dir, other)
    assert (verdict.mark, verdict.word) == ("none", "Claimed, not verified")
    assert f"its signature: made with the key {fingerprint(key)}, which is not in {other}" in verdict.text


@pytest.mark.parametrize(
    "change",
    [{"to_step": 301}, {"whole": False}, {"same": False}, {"found": "x"}, {"by": "bob"}, {"host": "x"}, {"cpu": "x"},
     {"gpus": ["x"]}, {"when": "2027-01-16T12:00:00+00:00"}, {"from_step": 1}, {"labtrain": "9"}, {"more": 1}],
)  # fmt: skip
def test_a_signature_holds_for_every_word_of_its_line(run_dir: Path, key: Path, change: dict[str, Any]) -> None:
    noted(run_dir, key, same=None if "same" in change else True)
    rewrite(run_dir, lines(run_dir)[0] | change)
    (found,) = read(run_dir, allow(key))
    assert found.signer is None
    assert "its signature does not match this line" in found.doubt
    assert shown(run_dir, allow(key)).mark == "none"


def test_a_signature_holds_for_this_receipt_alone(run_dir: Path, key: Path) -> None:
    """The line of another receipt, and the receipt's own signature, are none of it."""
    noted(run_dir, key)
    (line,) = lines(run_dir)
    rewrite(run_dir, line | {"receipt": "0" * 64})
    assert "earlier state of this receipt" in shown(run_dir, allow(key)).text
    subprocess.run([LABTRAIN, "sign", run_dir, "--key", key], check=True, capture_output=True)
    for text in (
        (run_dir / "receipt.json.sig").read_text(),
        "",
        "x",
        "-----BEGIN SSH SIGNATURE-----\n\ud800\0",
        "\n" * 9,
    ):
        rewrite(run_dir, line | {"signature": text})
        assert read(run_dir, allow(key))[0].signer is None
    rewrite(run_dir, line | {"signature": 3})
    assert read(run_dir, allow(key))[0].doubt == "it is not signed"


def test_signed_lines_outweigh_claims(run_dir: Path, key: Path) -> None:
    """Ten newer claims, of which nobody knows who wrote them, change no verdict; neither way."""
    noted(run_dir, key, same=False, found="not the same bits: first at step 3, in the loss")
    (line,) = lines(run_dir)
    claim = {key: value for key, value in line.items() if key != "signature"}
    claim |= {"same": True, "when": "2099-01-01T00:00:00+00:00"}
    rewrite(run_dir, line, *[claim] * 10)
    verdict = shown(run_dir, allow(key))
    assert (verdict.mark, verdict.word) == ("differs", "Differs")
    assert verdict.text.startswith("A rerun differed: not the same bits: first at step 3, in the loss. By ada@lab, ")
    assert verdict.text.endswith(f"10 more in {VERIFIED} are claims without a known signer.")
    noted(run_dir, key, whole=False, to_step=7)
    assert shown(run_dir, allow(key)).word == "Verified in part"


def test_a_file_full_of_signatures_is_read_in_seconds(run_dir: Path, key: Path) -> None:
    """The newest are checked; the rest stay claims, and say so."""
    noted(run_dir, key)
    rewrite(run_dir, *lines(run_dir) * 2000)
    found = read(run_dir, allow(key))
    assert [each.signer is not None for each in found] == [True] * MOST_CHECKED + [False] * (2000 - MOST_CHECKED)
    assert found[-1].doubt == "its signature is not checked"


def test_anybody_can_check_a_line_without_labtrain(run_dir: Path, key: Path) -> None:
    """As docs/guides/receipts.md has it, with jq and ssh-keygen; names that are no ASCII too."""
    need("jq", "jq")
    noted(run_dir, key, found="größer \u2028 \u0001 \U0001f600", hardware={"cpu": "A CPU", "gpus": [{"name": "é"}]})
    script = (
        "tail -1 verified.jsonl > line && jq -r .signature line > line.sig && jq -cSj 'del(.signature)' line |"
        f" ssh-keygen -Y verify -n labtrain-verification -f {allow(key)} -I ada@lab -s line.sig"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], cwd=run_dir, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('Good "labtrain-verification" signature for ada@lab')


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_no_verdict_is_written_through_a_link(
    run_dir: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that came by mail gets no line into a file of whoever verifies it, and no pipe holds them; said."""
    (tmp_path / "authorized_keys").write_text("mine\n")
    path = run_dir / VERIFIED
    {
        "link": lambda: path.symlink_to(tmp_path / "authorized_keys"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    noted(run_dir)
    assert "the verdict is not recorded" in capsys.readouterr().err
    assert (tmp_path / "authorized_keys").read_text() == "mine\n"
    with pytest.raises(DamagedError, match=r"verified\.jsonl is (a link to|not a regular file)"):
        read_verifications(run_dir)


@pytest.mark.parametrize(
    "change",
    [{"from_step": "1"}, {"to_step": True}, {"gpus": "x"}, {"gpus": [1]}, {"same": 1}, {"when": 3}, {"when": "x"},
     {"by": None}, {"found": []}, {"receipt": {}}, {"when": "0001-01-01T00:00:00+23:00"}],
)  # fmt: skip
def test_a_line_of_the_wrong_kind_is_broken(run_dir: Path, change: dict[str, Any]) -> None:
    noted(run_dir)
    rewrite(run_dir, lines(run_dir)[0] | change)
    with pytest.raises(DamagedError, match=r"verified\.jsonl is broken"):
        read_verifications(run_dir)
    (run_dir / VERIFIED).write_text("[" * 100_000 + "\n")
    with pytest.raises(DamagedError, match=r"verified\.jsonl is broken"):
        read_verifications(run_dir)


def test_a_key_that_cannot_sign_is_refused_before_anything_is_trained(run_dir: Path, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase="secret")
    for path in (locked, tmp_path / "none"):
        with pytest.raises(LabtrainError, match="cannot sign"):
            check_key(path)
    for more, says in (([], "cannot sign"), (["--steps", "0"], "--steps 0 trains nothing")):
        command = [LABTRAIN, "verify", run_dir, "--key", locked, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr


def test_a_verdict_that_cannot_be_signed_is_kept_as_a_claim(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """The agent is gone after hours of training: the verdict is not lost."""
    noted(run_dir, tmp_path / "none")
    assert "the verdict is not signed" in capsys.readouterr().err
    assert "signature" not in lines(run_dir)[0]
