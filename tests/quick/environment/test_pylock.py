"""`labtrain lock export`: what is in the file, and what it refuses. It is installed in tests/real."""

import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.pylock import Pylock
from packaging.tags import sys_tags

from labtrain.base.errors import ConfigError, DamagedError
from labtrain.cli import main
from labtrain.environment.lock import PYTHON_312_LINUX, read_lock
from labtrain.environment.lock.pylock import export_pylock
from tests.conftest import ROOT

HERE = f"cp{sys.version_info[0]}{sys.version_info[1]}"
FILES = {
    "pure-1.0-py3-none-any.whl": "pure==1.0",
    f"built-1.0-{HERE}-{HERE}-linux_x86_64.whl": "built==1.0 ; sys_platform == 'linux'",
    "built-1.0-cp35-cp35m-linux_x86_64.whl": "",  # also of `built`, for another Python
    "source-1.0.tar.gz": "source==1.0",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A lock of three packages, and a folder with their files."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    pins: list[str] = []
    for name, pin in FILES.items():
        (wheels / name).write_text(name)
        pins += [pin] if pin else []
        pins[-1] += f" --hash=sha256:{hashlib.sha256(name.encode()).hexdigest()}"
    pins.append(f"windows==1.0 ; sys_platform == 'win32' --hash=sha256:{'0' * 64}")
    (tmp_path / "requirements.lock").write_text("\n".join(pins) + "\n")
    return tmp_path


def read(path: Path) -> Pylock:
    """Parse a pylock.toml with packaging, the library of pip."""
    return Pylock.from_dict(tomllib.loads(path.read_text()))


def test_the_files_of_a_folder_are_found_by_their_hashes(project: Path) -> None:
    (project / "wheels" / "stranger-1.0-py3-none-any.whl").touch()
    (project / "out").mkdir()
    export_pylock(project, project / "out" / "pylock.mine.toml", project / "wheels")
    lock = read(project / "out" / "pylock.mine.toml")
    assert str(lock.requires_python) == f"=={sys.version_info[0]}.{sys.version_info[1]}.*"
    chosen = {package.name: file for package, file in lock.select(tags=list(sys_tags()))}
    for name, file in chosen.items():
        content = (project / "out" / str(file.path)).read_bytes()
        assert file.hashes == {"sha256": hashlib.sha256(content).hexdigest()}, name
    assert {name: str(file.path) for name, file in chosen.items()} == {
        "pure": "../wheels/pure-1.0-py3-none-any.whl",
        "built": f"../wheels/built-1.0-{HERE}-{HERE}-linux_x86_64.whl",
        "source": "../wheels/source-1.0.tar.gz",
    }
    assert {package.name: str(package.marker) for package in lock.packages if package.marker} == {
        "built": 'sys_platform == "linux"'
    }
    assert "://" not in (project / "out" / "pylock.mine.toml").read_text()


def test_without_a_folder_it_names_the_files_that_nix_installs(tmp_path: Path) -> None:
    """Of the real locks, for Python 3.12: each pin that applies there, with a hash of the lock."""
    lock = export_pylock(ROOT, tmp_path / "pylock.toml")
    assert read(tmp_path / "pylock.toml") == lock
    pins = read_lock(ROOT / "requirements.lock", PYTHON_312_LINUX)
    assert [package.name for package in lock.packages] == sorted(pins)
    entries = {entry["name"]: entry for entry in json.loads((ROOT / "nix/wheels.json").read_text())}
    for package in lock.packages:
        file = package.sdist or (package.wheels or [])[0]
        assert file.hashes["sha256"] in pins[package.name].hashes
        assert str(file.path).startswith(f"wheels/{entries[package.name]['pname']}-{package.version}")
    assert str(lock.requires_python) == "==3.12.*"


def test_an_experiments_own_wheel_is_in_it(project: Path) -> None:
    (project / "labtrain.lock").write_text(f"./vendor/labtrain-0.1.0-py3-none-any.whl --hash=sha256:{'a' * 64}\n")
    export_pylock(project, project / "pylock.toml", project / "wheels")
    own = read(project / "pylock.toml").packages[-1]
    assert (own.name, str(own.version)) == ("labtrain", "0.1.0")
    assert [(wheel.path, wheel.hashes) for wheel in own.wheels or ()] == [
        ("vendor/labtrain-0.1.0-py3-none-any.whl", {"sha256": "a" * 64})
    ]
    (project / "labtrain.lock").write_text("what\n")
    with pytest.raises(DamagedError, match=r"labtrain\.lock: must be a wheel and its sha256"):
        export_pylock(project, project / "pylock.toml", project / "wheels")


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["-o", "lock.toml"], "lock.toml: installers read pylock.toml or pylock.NAME.toml", "-o pylock.toml"),
        (["-o", "pylock.a.b.toml"], "pylock.a.b.toml: installers read", "-o pylock.toml"),
        (["-o", ""], "no file name: installers read pylock.toml", "-o pylock.toml"),
        (["-o", "wheels/pure-1.0-py3-none-any.whl/pylock.toml"], "any.whl: not a folder", "-o FOLDER/pylock.toml"),
        (["--wheels", "wheels", "-o", "/proc/pylock.toml"], "/proc/pylock.toml: cannot be written: ", "where you may"),
        (["-o", f"{'x' * 300}/pylock.toml"], "cannot be written: File name too long", "-o FOLDER/pylock.toml"),
        (["-o", "no/pylock.toml"], "no: no such folder", "mkdir -p no"),
        (["--wheels", "none"], "none: no such folder", "pip download --require-hashes --no-deps"),
        (["--wheels", "empty"], "empty lacks files for Python 3.", "-r requirements.lock -d empty"),
        (["--format", "conda"], "'conda' is not 'pylock'", ""),
    ],
)
def test_bad_input_is_an_error_and_nothing_is_written(
    arguments: list[str], says: str, hint: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    (project / "empty").mkdir()
    done = CliRunner().invoke(main, ["lock", "export", *arguments])
    assert done.exit_code == 2
    assert says in done.stderr
    assert hint in done.stderr
    assert not list(project.rglob("*.toml"))


def test_a_folder_is_not_overwritten(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (project / "pylock.toml").mkdir()
    done = CliRunner().invoke(main, ["lock", "export", "--wheels", "wheels"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: pylock.toml: is a folder, must be a file\n\nhint: labtrain lock export -o ")


def test_files_that_are_missing_or_changed_are_named(project: Path) -> None:
    (project / "wheels" / "pure-1.0-py3-none-any.whl").write_text("changed")
    (project / "wheels" / "source-1.0.tar.gz").unlink()
    says = r"lacks files for Python 3\.\d+: pure 1\.0; source 1\.0; the hash of pure-1\.0-py3-none-any\.whl is not in"
    with pytest.raises(ConfigError, match=says):
        export_pylock(project, project / "pylock.toml", project / "wheels")
    assert not (project / "pylock.toml").exists()


def test_a_wheel_of_another_python_is_no_file_for_this_one(project: Path) -> None:
    (project / "wheels" / f"built-1.0-{HERE}-{HERE}-linux_x86_64.whl").unlink()
    with pytest.raises(ConfigError, match=r"lacks files for Python 3\.\d+: built 1\.0\n"):
        export_pylock(project, project / "pylock.toml", project / "wheels")
    assert not (project / "pylock.toml").exists()


@pytest.mark.parametrize(
    "damage", ["", "[{}]", '[{"name": "x", "version": "1", "format": "wheel", "hash": "sha256-?"}]', "[]"]
)
def test_a_damaged_list_of_nix_is_an_error(damage: str, project: Path) -> None:
    (project / "nix").mkdir()
    (project / "nix" / "wheels.json").write_text(damage)
    with pytest.raises(DamagedError, match=r"nix/wheels\.json"):
        export_pylock(project, project / "pylock.toml")
    shutil.rmtree(project / "nix")
    with pytest.raises(DamagedError, match=r"nix/wheels\.json"):
        export_pylock(project, project / "pylock.toml")
    (project / "requirements.lock").unlink()
    with pytest.raises(DamagedError, match=r"requirements\.lock"):
        export_pylock(project, project / "pylock.toml")
    assert not (project / "pylock.toml").exists()
