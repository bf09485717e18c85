"""`conda-lock install` from end to end: a channel that the test makes, served over loopback http, and a tampered package."""

import functools
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import LABTRAIN, ROOT

STANDIN = ROOT / "tests/support/conda_standin.py"


def package(folder: Path, name: str, text: str, depends: list[str]) -> dict[str, str]:
    """Write a conda package of one file into a channel, and return its hashes."""
    index = {
        "name": name,
        "version": "1.0",
        "build": "0",
        "build_number": 0,
        "depends": depends,
        "subdir": "noarch",
        "noarch": "generic",
    }
    file = f"share/{name}.txt"
    digest = hashlib.sha256(text.encode()).hexdigest()
    paths = [{"_path": file, "path_type": "hardlink", "sha256": digest, "size_in_bytes": len(text)}]
    contents = {
        "info/index.json": json.dumps(index),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/files": f"{file}\n",
        file: text,
    }
    path = folder / "noarch" / f"{name}-1.0-0.tar.bz2"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:bz2") as archive:
        for member, body in contents.items():
            info = tarfile.TarInfo(member)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body.encode()))
    raw = path.read_bytes()
    return {"md5": hashlib.md5(raw).hexdigest(), "sha256": hashlib.sha256(raw).hexdigest()}


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "channel"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


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
    conda = tmp_path / "conda"
    conda.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    conda.chmod(0o755)
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
