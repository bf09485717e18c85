"""`labtrain sign --model-signing`: what OpenSSF's own tool says of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labtrain.assets import asset
from labtrain.base.errors import DamagedError, LabtrainError
from labtrain.record import receipt as receipts
from labtrain.review.openssf import sign_model
from tests.conftest import ROOT, skip_or_fail

SERVERS = ROOT / ".servers"


def key(folder: Path, curve: str = "prime256v1") -> Path:
    made = folder / f"{curve}.pem"
    subprocess.run(["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", made], check=True)
    subprocess.run(["openssl", "ec", "-in", made, "-pubout", "-out", made.with_suffix(".pub")], check=True,
                   capture_output=True)  # fmt: skip
    return made


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The recorded run of this repository, with a checkpoint."""
    folder = tmp_path / "906ca0d1e2f3"
    (folder / "checkpoints" / "step-0000000300").mkdir(parents=True)
    for name in ("receipt.json", "trail.jsonl"):
        shutil.copy(asset(f"golden/{name}"), folder)
    (folder / "checkpoints" / "step-0000000300" / "weights.safetensors").write_bytes(bytes(range(256)))
    (folder / "history.jsonl").write_text("{}\n")
    return folder


def model_signing(run_dir: Path, public: Path) -> subprocess.CompletedProcess[str]:
    """Verify as a reviewer does."""
    if not (SERVERS / "model_signing").is_dir():
        skip_or_fail("model_signing is not installed: make servers")
    command = [sys.executable, "-m", "model_signing", "verify", "key", run_dir, "--signature", run_dir / "model.sig",
               "--public_key", public]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(SERVERS)})  # fmt: skip


@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1", "secp521r1"])
def test_the_tool_verifies_it_and_refuses_a_changed_byte(curve: str, run_dir: Path, tmp_path: Path) -> None:
    """Notes, verdicts and the SSH signature may come later. Each signed file counts, and so does a file that is new."""
    private = key(tmp_path, curve)
    assert sign_model(run_dir, key=private) == run_dir / "model.sig"
    for name in ("note.txt", "verified.jsonl", "receipt.json.sig"):
        (run_dir / name).write_text("later\n")
    assert model_signing(run_dir, private.with_suffix(".pub")).stdout == "Verification succeeded\n"
    for name in ("receipt.json", "trail.jsonl", "checkpoints/step-0000000300/weights.safetensors"):
        before = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        done = model_signing(run_dir, private.with_suffix(".pub"))
        assert done.returncode == 1
        # The tool quotes its list as Python does, so the quotes depend on the digest's bytes.
        assert re.search(rf"Hash mismatch for \\*'{re.escape(name)}", done.stderr + done.stdout)
        (run_dir / name).write_bytes(before)
        if curve != "prime256v1":
            return
    (run_dir / "checkpoints" / "more.pt").touch()
    assert "Extra files found" in str(model_signing(run_dir, private.with_suffix(".pub")))
    (run_dir / "checkpoints" / "more.pt").unlink()
    other = key(tmp_path, "secp384r1")
    assert model_signing(run_dir, other.with_suffix(".pub")).returncode == 1


def test_what_cannot_be_signed_says_why(run_dir: Path, tmp_path: Path) -> None:
    """A key of another kind or with a passphrase, a run in training, a link: nothing is written."""
    private = key(tmp_path)
    rsa, locked = tmp_path / "rsa.pem", tmp_path / "locked.pem"
    subprocess.run(["openssl", "genrsa", "-out", rsa, "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", private, "-aes256", "-passout", "pass:x", "-out", locked], check=True,
                   capture_output=True)  # fmt: skip
    for bad, said in ((rsa, "must be a key of P-256"), (locked, "its passphrase is missing or wrong"),
                      (run_dir / "trail.jsonl", "not a private key in PEM"), (tmp_path / "none.pem", "No such file")):  # fmt: skip
        with pytest.raises(LabtrainError, match=said) as caught:
            sign_model(run_dir, key=bad)
        named = Path(caught.value.hint.partition("-out ")[2].partition(";")[0])
        assert named.name.endswith(".pem")
        assert not named.exists()  # typed, the hint overwrites nothing
    link = run_dir / "checkpoints" / "linked"
    link.symlink_to("/etc/passwd")
    with pytest.raises(DamagedError, match="a link to /etc/passwd"):
        sign_model(run_dir, key=private)
    link.unlink()
    found = receipts.read(run_dir)
    assert found is not None
    found["status"], found["results"] = "running", {}  # type: ignore[typeddict-item]
    receipts.write(run_dir, found)
    with pytest.raises(LabtrainError, match="still training"):
        sign_model(run_dir, key=private)
    assert not (run_dir / "model.sig").exists()
