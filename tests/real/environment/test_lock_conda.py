"""The conda locks and pixi's, solved and written from a channel that the test makes: real conda-lock, real rattler."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from labtrain.base.errors import LabtrainError
from labtrain.base.files import write_atomically
from labtrain.environment.lock import conda, derive, pixi
from labtrain.environment.lock.write import lock_conda, lock_pixi
from tests.conftest import ROOT
from tests.support.conda_channel import index, package, write_conda
from tests.support.locks import change

pytest_plugins = ["tests.support.conda_channel"]


@pytest.fixture
def project(tmp_path: Path, channel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a spec, and a channel with its packages; `conda` is the stand-in."""
    folder, address = channel
    package(folder, "base", "1\n", [])
    package(folder, "cuda-version", "12.9\n", [], version="12.9")
    for build in ("cuda129", "cpu_mkl"):
        package(folder, "libtorch", f"{build}\n", ["base"], version="2.9.1", build=build)
        needs = ["base", f"libtorch 2.9.1 {build}", *(["__cuda"] if build == "cuda129" else [])]
        package(folder, "pytorch", f"{build}\n", needs, version="2.9.1", build=build)
    package(folder, "pytorch-gpu", "gpu\n", ["pytorch 2.9.1 cuda*"], version="2.9.1")
    index(folder)
    write_conda(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RATTLER_CACHE_DIR", str(tmp_path / "cache"))
    root = tmp_path / "project"
    root.mkdir()
    spec = {"name": "labtrain", "channels": [address], "platforms": ["linux-64"],
            "dependencies": ["base", "pytorch-gpu=2.9.1", "cuda-version=12.9"]}  # fmt: skip
    (root / conda.SPEC).write_text(yaml.safe_dump(spec))
    (root / conda.VIRTUAL).write_text((ROOT / conda.VIRTUAL).read_text())
    (root / conda.CPU.spec).write_text(conda.cpu_spec(root))
    assert lock_conda(root, conda.DEFAULT)
    package(folder, "base", "2\n", [], version="2.0")  # a newer release, before the second lock is solved
    index(folder)
    assert lock_conda(root, conda.CPU)
    return root


def versions(root: Path, profile: conda.Profile) -> dict[str, str]:
    return {entry["name"]: f"{entry['version']} {conda.build_of(entry)}"
            for entry in conda.read_conda_lock(root, profile)["package"]}  # fmt: skip


def test_the_cpu_profile_has_the_builds_of_the_default_one(project: Path) -> None:
    """Although the channel has a newer base by then; a second time nothing is solved."""
    assert versions(project, conda.DEFAULT) == {
        "base": "1.0 0", "cuda-version": "12.9 0", "libtorch": "2.9.1 cuda129", "pytorch": "2.9.1 cuda129",
        "pytorch-gpu": "2.9.1 0",
    }  # fmt: skip
    assert versions(project, conda.CPU) == {"base": "1.0 0", "libtorch": "2.9.1 cpu_mkl", "pytorch": "2.9.1 cpu_mkl"}
    assert list(conda.unlike_default(project)) == []
    assert not any(lock_conda(project, profile) for profile in conda.PROFILES)


def test_a_cpu_lock_with_other_builds_is_solved_again(project: Path) -> None:
    """One of before the default lock changed; and a solver that takes no pins is an error."""
    change(project / conda.CPU.lock, "base-1.0-0", "base-2.0-0")
    change(project / conda.CPU.lock, "- name: base\n  version: '1.0'", "- name: base\n  version: '2.0'")
    assert [name for name, *_ in conda.unlike_default(project)] == ["base"]
    before = (project / conda.CPU.lock).read_text()
    assert lock_conda(project, conda.CPU)
    assert versions(project, conda.CPU)["base"] == "1.0 0"

    (project / conda.CPU.lock).write_text(before)
    solver = project.parent / "conda"
    solver.write_text(solver.read_text().replace("exec ", "unset CONDA_PINNED_PACKAGES\nexec "))
    with pytest.raises(LabtrainError, match=r"conda-lock-cpu\.yml: the solver chose other builds .* of base"):
        lock_conda(project, conda.CPU)


@pytest.mark.parametrize("profile", conda.PROFILES)
def test_a_damaged_lock_is_an_error_and_is_not_solved_again(profile: conda.Profile, project: Path) -> None:
    """That would take newer packages; the file that was committed is the better one."""
    (md5,) = {
        entry["hash"]["md5"] for entry in conda.read_conda_lock(project, profile)["package"] if entry["name"] == "base"
    }
    change(project / profile.lock, md5, "abcd")
    with pytest.raises(LabtrainError, match=rf"{profile.lock}: base: found md5 abcd, expected 32 hex digits") as raised:
        lock_conda(project, profile)
    assert raised.value.hint == f"git checkout {profile.lock}"


@pytest.mark.parametrize("damage", ["", "{[", "subdirs: 3", "a: b"])
def test_a_damaged_list_of_virtual_packages_is_an_error(damage: str, project: Path) -> None:
    (project / conda.VIRTUAL).write_text(damage)
    with pytest.raises(LabtrainError, match=r"virtual-packages\.yml: not virtual packages|environment\.yml: "):
        lock_conda(project, conda.DEFAULT)
    with pytest.raises(LabtrainError, match=r"virtual-packages\.yml: not virtual packages"):
        lock_conda(project, conda.CPU)


def test_pixi_gets_full_records_from_the_channel_and_keeps_them(project: Path, channel: tuple[Path, str]) -> None:
    assert lock_pixi(project) == "pixi.lock: 5 packages for default, 3 packages for cpu"
    text = (project / pixi.LOCK).read_text()
    sizes = {path.name: path.stat().st_size for path in (channel[0] / "noarch").glob("*.tar.bz2")}
    for entry in pixi.read_pixi_lock(project)["packages"]:
        assert entry["size"] == sizes[pixi.file_name(entry)]
    for repodata in channel[0].rglob("repodata*"):
        repodata.unlink()
    lock_pixi(project)
    assert (project / pixi.LOCK).read_text() == text, "with no channel, the records are those in pixi.lock"


def test_a_record_that_somebody_changed_is_fetched_again(project: Path, channel: tuple[Path, str]) -> None:
    """What the seal contradicts is not sealed again; without a channel it is an error, and the file stays."""
    lock_pixi(project)
    text = (project / pixi.LOCK).read_text()
    components = [
        {"bom-ref": key, "properties": [{"name": "labtrain:seal", "value": digest}]}
        for key, digest in derive.seal_pixi(pixi.read_pixi_lock(project)).items()
    ]
    write_atomically(project / derive.SEAL, json.dumps({"components": components}))
    (size,) = re.findall(r"pytorch-2.9.1-cpu_mkl.tar.bz2\n(?:  .*\n)*?  size: (\d+)", text)
    changed = text.replace(f"  size: {size}\n", "  size: 7\n")
    (project / pixi.LOCK).write_text(changed)
    lock_pixi(project)
    assert (project / pixi.LOCK).read_text() == text

    (project / pixi.LOCK).write_text(changed)
    for repodata in channel[0].rglob("repodata*"):
        repodata.unlink()
    with pytest.raises(LabtrainError, match=r"pixi\.lock needs the full records? of pytorch-2\.9\.1-cpu_mkl") as raised:
        lock_pixi(project)
    assert "git checkout" in raised.value.hint or "solved again" in raised.value.hint
    assert (project / pixi.LOCK).read_text() == changed


def test_a_channel_with_another_file_of_that_name_is_an_error(project: Path, channel: tuple[Path, str]) -> None:
    package(channel[0], "base", "another\n", [])
    index(channel[0])
    with pytest.raises(LabtrainError, match=r"record of base-1\.0-0\.tar\.bz2, and http://\S+ has other hashes for it"):
        lock_pixi(project)
    assert not (project / pixi.LOCK).exists()
    assert not (project / pixi.MANIFEST).exists()
