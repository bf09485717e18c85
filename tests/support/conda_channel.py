"""A conda channel that a test makes, served over loopback http."""

import asyncio
import functools
import hashlib
import http.server
import io
import json
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rattler.index import index_fs

from tests.conftest import ROOT

STANDIN = ROOT / "tests/support/conda_standin.py"


def write_conda(folder: Path) -> Path:
    """Write the stand-in for conda as a program `conda`, and return it."""
    conda = folder / "conda"
    conda.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    conda.chmod(0o755)
    return conda


def index(folder: Path) -> None:
    """Write the channel's repodata, by rattler."""
    asyncio.run(index_fs(folder, write_zst=False, write_shards=False, force=True))


def package(
    folder: Path, name: str, text: str, depends: list[str], *, version: str = "1.0", build: str = "0"
) -> dict[str, str]:
    """Write a conda package of one file into a channel, and return its hashes."""
    about = {
        "name": name,
        "version": version,
        "build": build,
        "build_number": 0,
        "depends": depends,
        "subdir": "noarch",
        "noarch": "generic",
    }
    file = f"share/{name}.txt"
    digest = hashlib.sha256(text.encode()).hexdigest()
    paths = [{"_path": file, "path_type": "hardlink", "sha256": digest, "size_in_bytes": len(text)}]
    contents = {
        "info/index.json": json.dumps(about),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/files": f"{file}\n",
        file: text,
    }
    path = folder / "noarch" / f"{name}-{version}-{build}.tar.bz2"
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
