"""`labtrain update`: what it refuses before it makes anything."""

import dataclasses
import errno
import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from packaging.version import Version

from labtrain import __version__
from labtrain.assets import asset
from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.project.origin import read_carried, recovered
from labtrain.project.update import GOLDEN, _refuse_newer, _trained, update_experiment
from tests.support.old import unpack
from tests.support.update import git


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("old"))


def _other_wheel(root: Path) -> None:
    wheel = next((root / "vendor").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    git(root, "commit", "-qam", "another wheel")


def _no_wheel(root: Path) -> None:
    shutil.rmtree(root / "vendor")
    git(root, "commit", "-qam", "no wheel")


def _ignored_wheel(root: Path) -> None:
    git(root, "rm", "-q", "--cached", "-r", "vendor")
    git(root, "commit", "-qm", "no wheel in git")


def _no_lock(root: Path) -> None:
    (root / "labtrain.lock").unlink()


def _outside(root: Path) -> None:
    (root / "labtrain.lock").write_text(f"./../../x/labtrain-0.1.0-py3-none-any.whl --hash=sha256:{'0' * 64}\n")
    git(root, "commit", "-qam", "outside")


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another wheel": (_other_wheel, "is not the wheel in labtrain.lock: its sha256 is "),
    "no wheel": (
        _no_wheel,
        "vendor/labtrain-0.1.0-py3-none-any.whl: No such file or directory; labtrain.lock names it",
    ),
    "a wheel that git does not have": (_ignored_wheel, "is not committed: nobody could install the experiment"),
    "of before wheels were carried": (_no_lock, "has no labtrain.lock: nothing says which labtrain made"),
    "a wheel elsewhere": (_outside, "is outside the experiment"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_merge_is_refused_and_stays(kept: Path, case: str, tmp_path: Path) -> None:
    prepare, says = CASES[case]
    root = shutil.copytree(kept, tmp_path / "digits", ignore=shutil.ignore_patterns("runs"))
    prepare(root)
    status = git(root, "status", "--porcelain")
    with pytest.raises(LabtrainError, match="hint: ") as caught:
        update_experiment(root)
    assert says in str(caught.value)
    assert git(root, "status", "--porcelain") == status


def test_any_name_that_the_owner_gave_it_is_updated(kept: Path, tmp_path: Path) -> None:
    """Also one that `labtrain new` refuses: the name is only a value of the template."""
    root = shutil.copytree(kept, tmp_path / "anything", ignore=shutil.ignore_patterns("runs"))
    for name in ("README.md", "pyproject.toml", "train.sbatch", "conf/config.yaml"):
        (root / name).write_text((root / name).read_text().replace("digits", "my.exp"))
    git(root, "commit", "-qam", "my.exp")
    updated = update_experiment(root)
    assert updated is not None
    assert updated.conflicts == []
    assert 'name = "my.exp"' in (root / "pyproject.toml").read_text()
    assert "digits" not in (root / "README.md").read_text()
    assert not list((root / ".git").glob("labtrain*index*"))


def test_a_temporary_folder_that_cannot_be_written_is_an_error(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: copying the wheel fails."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "wheel")

    root = shutil.copytree(kept, tmp_path / "digits", ignore=shutil.ignore_patterns("runs"))
    status = git(root, "status", "--porcelain")
    monkeypatch.setattr("labtrain.project.origin.shutil.copyfile", full)
    with pytest.raises(LabtrainError, match=r"No space left on device: 'wheel'\. No file has changed\n\nhint: df -h"):
        update_experiment(root)
    assert git(root, "status", "--porcelain") == status


def test_a_newer_build_of_the_same_version_is_told_by_its_reference_run(kept: Path, tmp_path: Path) -> None:
    """Both builds call themselves 0.1.0. One second later is newer; the same time, or none, is not."""
    carried = dataclasses.replace(read_carried(kept), version=Version(__version__))
    started = datetime.fromisoformat(_trained(asset(GOLDEN)))
    golden = tmp_path / "receipt.json"
    for later_s, refused in ((1, True), (0, False), (-1, False)):
        text = (started + timedelta(seconds=later_s)).isoformat()
        golden.write_text(json.dumps({"segments": [{"started": text}]}))
        if refused:
            with pytest.raises(ConfigError, match=re.escape(f"with a reference run of {text}, newer than")):
                _refuse_newer(carried, golden)
        else:
            _refuse_newer(carried, golden)
    _refuse_newer(carried, tmp_path / "none")
    with pytest.raises(ConfigError, match="newer than the labtrain that is running"):
        _refuse_newer(dataclasses.replace(carried, version=Version("99.1")), golden)


def test_outside_an_experiment_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(LabtrainError, match="is not in an experiment"):
        update_experiment(tmp_path)


def test_names_are_found_in_edited_files(tmp_path: Path) -> None:
    """The value that most lines agree on, of those that a person has left; special characters are values, too."""
    for root, name, author in (
        ("marked", "labtrain0name0value", "labtrain0author0value"),
        ("own", "x-1", "A. (B) \\1"),
    ):
        (tmp_path / root).mkdir()
        (tmp_path / root / "README.md").write_text(f"# {name}\n\nof {author}.\n\nconda -n {name} {name}\n")
        (tmp_path / root / "pyproject.toml").write_text(f'name = "{name}"\ndescription = "by {author}"\n')
    readme = tmp_path / "own" / "README.md"
    readme.write_text(readme.read_text().replace("# x-1", "# A title").replace("conda", "mamba"))
    found = recovered(tmp_path / "marked", tmp_path / "own", ["name", "author", "other"])
    assert found == {"name": "x-1", "author": "A. (B) \\1"}
