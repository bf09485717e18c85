import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from labtrain.base.errors import LabtrainError
from labtrain.bootstrap import check_disk, check_memory, check_python, fingerprint, locked_block, set_up
from tests.conftest import ROOT


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (2, 7)])
def test_another_python_is_refused_in_one_line(version: tuple[int, int]) -> None:
    with pytest.raises(LabtrainError, match=r"found Python \d\.\d+, need 3\.11 to 3\.13"):
        check_python(version)


def test_the_pythons_that_are_locked_for_are_taken() -> None:
    for minor in (11, 12, 13):
        check_python((3, minor))


def test_too_little_disk_and_memory_are_refused_before_anything_is_made() -> None:
    with pytest.raises(LabtrainError, match=r"7\.0 GB of disk free here, need 9\.0 GB"):
        check_disk(7_000_000_000)
    with pytest.raises(LabtrainError, match=r"0\.5 GB of memory available"):
        check_memory(500_000_000)


def test_uv_is_installed_by_the_hashes_of_the_lock() -> None:
    block = locked_block((ROOT / "requirements.lock").read_text(), "uv")
    assert block.startswith("uv==")
    assert block.count("--hash=sha256:") > 5
    assert "==" not in block[4:].partition("==")[2]
    with pytest.raises(LabtrainError, match="does not name nothing"):
        locked_block("uv==1 \\\n    --hash=sha256:aa\n", "nothing")


def test_an_environment_follows_its_locks(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("a==1 --hash=sha256:aa\n")
    first = fingerprint(tmp_path, editable=False)
    (tmp_path / "labtrain.lock").write_text("./vendor/labtrain.whl --hash=sha256:bb\n")
    second = fingerprint(tmp_path, editable=False)
    (tmp_path / "requirements.lock").write_text("a==2 --hash=sha256:aa\n")
    assert len({first, second, fingerprint(tmp_path, editable=False)}) == 3


def test_an_environment_follows_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install records the version: a new one in the source is installed by the next `make setup`."""
    before = fingerprint(tmp_path, editable=True)
    monkeypatch.setattr("labtrain.bootstrap.__version__", "99.0.0")
    assert fingerprint(tmp_path, editable=True) != before


def test_a_missing_python_is_said_in_one_line() -> None:
    done = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[0]
        == "error: no-such-python not found; need Python 3.11 to 3.13. hint: apt-get install python3 python3-venv"
    )


@pytest.fixture
def furnished(tmp_path: Path) -> Path:
    """An experiment's setup: its Makefile, its script, and in vendor/ a wheel whose bootstrap leaves a file."""
    for name in ("Makefile", "setup.sh"):
        shutil.copy(next(ROOT.glob(f"template/*/{name}")), tmp_path)
    put_wheel(tmp_path, "labtrain-0.1.0-py3-none-any.whl")
    digest = hashlib.sha256((tmp_path / "vendor/labtrain-0.1.0-py3-none-any.whl").read_bytes()).hexdigest()
    (tmp_path / "labtrain.lock").write_text(f"./vendor/labtrain-0.1.0-py3-none-any.whl --hash=sha256:{digest}\n")
    return tmp_path


def put_wheel(root: Path, name: str, mark: str = "ran") -> None:
    (root / "vendor").mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "vendor" / name, "w") as wheel:
        wheel.writestr("labtrain/__init__.py", f"open({mark!r}, 'w')")
        wheel.writestr("labtrain/bootstrap.py", "")


def make_setup(root: Path, *more: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    environment.pop("MAKEFLAGS", None)
    command = ["make", "setup", f"PYTHON={sys.executable}", *more]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)


def test_setup_runs_the_wheel_that_the_lock_names(furnished: Path) -> None:
    """With a second one beside it, which is not looked at; and where sha256sum is called shasum."""
    put_wheel(furnished, "labtrain-0.0.0-py3-none-any.whl", mark="evil")
    assert make_setup(furnished).returncode == 0
    assert (furnished / "ran").exists()
    (furnished / "ran").unlink()
    programs = furnished / "bin"
    programs.mkdir()
    for name in ("make", "sh", "sed", "grep"):
        (programs / name).symlink_to(str(shutil.which(name)))
    (programs / "shasum").write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-a 256" ] && shift 2 && exec {shutil.which("sha256sum")} "$@"\n'
    )
    (programs / "shasum").chmod(0o755)
    assert make_setup(furnished, path=str(programs)).returncode == 0
    assert (furnished / "ran").exists()
    assert not (furnished / "evil").exists()


WHEEL = "vendor/labtrain-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (f"printf x >> {WHEEL}", f"the sha256 of {WHEEL} is not the one in labtrain.lock"),
        (f"cp evil {WHEEL}", f"the sha256 of {WHEEL} is not the one in labtrain.lock"),
        (f"ln -sf ../evil {WHEEL}", f"the sha256 of {WHEEL} is not the one in labtrain.lock"),
        (f"rm {WHEEL}", f"{WHEEL} is missing"),
        (f"rm {WHEEL}; cp evil vendor/labtrain-0.2.0-py3-none-any.whl", f"{WHEEL} is missing"),
        ("rm labtrain.lock", "no labtrain.lock in "),
        (": > labtrain.lock", "labtrain.lock does not name one wheel"),
        ("cat labtrain.lock labtrain.lock > x; mv x labtrain.lock", "labtrain.lock does not name one wheel"),
        ("echo -e '--index-url x' >> labtrain.lock", "labtrain.lock does not name one wheel"),
        ("sed -i 's/ --hash.*//' labtrain.lock", "labtrain.lock does not name one wheel"),
        ("sed -i 's|./vendor/|./|' labtrain.lock", "labtrain.lock does not name one wheel"),
        ("sed -i 's|vendor/|vendor/../|' labtrain.lock", "labtrain.lock does not name one wheel"),
        ("sed -i 's|$|0|' labtrain.lock", "labtrain.lock does not name one wheel"),
    ],
)
def test_setup_runs_nothing_of_a_wheel_that_the_lock_does_not_name(furnished: Path, spoil: str, says: str) -> None:
    put_wheel(furnished, "../evil", mark="./ran")
    subprocess.run(["bash", "-c", spoil], cwd=furnished, check=True)
    done = make_setup(furnished)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")
    assert "\n\nhint: git checkout " in done.stderr
    assert not (furnished / "ran").exists()
    assert {path.name for path in furnished.iterdir()} <= {"Makefile", "setup.sh", "vendor", "labtrain.lock", "evil"}


def test_nothing_runs_a_wheel_but_by_its_hash() -> None:
    """Each file of an experiment that starts labtrain.bootstrap does so by setup.sh."""
    texts = {path: path.read_text(errors="replace") for folder in ("template", "containers", "nix")
             for path in (ROOT / folder).rglob("*") if path.is_file()}  # fmt: skip
    assert [path.name for path, text in texts.items() if "labtrain.bootstrap" in text] == ["setup.sh"]


def test_a_folder_without_a_lock_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(LabtrainError, match=r"requirements\.lock: no such file"):
        set_up(tmp_path, editable=False)
    assert not any(tmp_path.iterdir())
