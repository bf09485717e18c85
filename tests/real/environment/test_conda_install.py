"""`conda-lock install` from end to end: a channel that the test makes, served over loopback http, and a tampered package."""

import os
import subprocess
from pathlib import Path

import yaml

from tests.conftest import LABTRAIN
from tests.support.conda_channel import package, write_conda

pytest_plugins = ["tests.support.conda_channel"]


def install(
    tmp_path: Path, folder: Path, address: str, *, tamper: bool
) -> tuple[subprocess.CompletedProcess[str], Path]:
    hashes = {
        "tiny-base": package(folder, "tiny-base", "base\n", []),
        "tiny": package(folder, "tiny", "hello\n", ["tiny-base"]),
    }
    lock = {
        "version": 1,
        "metadata": {
            "content_hash": {"linux-64": "0" * 64},
            "channels": [{"url": address, "used_env_vars": []}],
            "platforms": ["linux-64"],
            "sources": ["environment.yml"],
        },
        "package": [
            {
                "name": name,
                "version": "1.0",
                "manager": "conda",
                "platform": "linux-64",
                "dependencies": {},
                "url": f"{address}/noarch/{name}-1.0-0.tar.bz2",
                "hash": hashes[name],
                "category": "main",
                "optional": False,
            }
            for name in ("tiny-base", "tiny")
        ],
    }
    (tmp_path / "conda-lock.yml").write_text(yaml.safe_dump(lock, sort_keys=False))
    if tamper:
        package(folder, "tiny", "hullo\n", ["tiny-base"])
    conda = write_conda(tmp_path)
    prefix = tmp_path / "prefix"
    program = str(Path(LABTRAIN).with_name("conda-lock"))
    command = [program, "install", "--conda", str(conda), "--prefix", str(prefix), "conda-lock.yml"]
    environment = {**os.environ, "HOME": str(tmp_path), "RATTLER_CACHE_DIR": str(tmp_path / "cache")}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    ), prefix


def test_a_lock_is_installed(channel: tuple[Path, str], tmp_path: Path) -> None:
    done, prefix = install(tmp_path, *channel, tamper=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (prefix / "share/tiny.txt").read_text() == "hello\n"
    assert (prefix / "share/tiny-base.txt").read_text() == "base\n"


def test_a_package_that_was_tampered_with_is_refused(channel: tuple[Path, str], tmp_path: Path) -> None:
    """The same name, size and time; another letter."""
    done, prefix = install(tmp_path, *channel, tamper=True)
    assert done.returncode != 0
    assert "hash" in (done.stdout + done.stderr).lower()
    assert not (prefix / "share/tiny.txt").exists()
