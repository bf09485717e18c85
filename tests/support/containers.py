"""A real Docker of the tests' own, and a base image made of this Debian machine's files: nothing is pulled.

As root, on a Debian machine: dockerd in a folder with a socket there, without a bridge and without iptables.
"""

import base64
import http.server
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labtrain.bootstrap import locked_block
from tests.conftest import Experiment, need, skip_or_fail
from tests.support.servers import end
from tests.support.waiting import wait_until

# What the Containerfile would else get with apt, which needs more of a Debian than files: so that it skips them.
PROGRAMS = ("python3", "python3-venv", "ca-certificates", "openssh-server", "git", "gcc", "libc6-dev", "tini")
# Debian's client has BuildKit built in, a newer one wants its buildx beside it.
CLIENT = "/usr/bin/docker"
PASSED = ("PIP_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
DISK_BYTES = 32_000_000_000  # at most: the image, the stage that it is copied from, and what the next stage wants free
Completed = subprocess.CompletedProcess[str]


class Docker:
    """dockerd, its client, and a folder for both; `end` leaves nothing of it."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            skip_or_fail("dockerd needs root: run the tests as root to see this one")
        for program, package in (("dockerd", "docker.io"), (CLIENT, "docker.io"), ("dpkg-query", "dpkg")):
            need(program, package)
        for package in PROGRAMS:
            if subprocess.run(["dpkg", "-s", package], capture_output=True, check=False).returncode:
                skip_or_fail(f"{package} is not installed: apt-get install {package}")
        if shutil.disk_usage("/var/tmp").free < DISK_BYTES:
            skip_or_fail(
                f"/var/tmp has less than {DISK_BYTES / 1e9:.0f} GB: the environment is 8.8 GB, once in each stage"
            )
        # A socket's path holds 107 bytes, and /tmp may be memory.
        self.folder = Path(tempfile.mkdtemp(prefix="labtrain-docker-", dir="/var/tmp"))
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{self.folder}/socket", "DOCKER_BUILDKIT": "1",
                            "DOCKER_CONFIG": str(self.folder / "client")}  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._mount_disk()
        options = {"data-root": "data", "exec-root": "exec", "pidfile": "pid"}
        command = ["dockerd", *(f"--{name}={self.folder / value}" for name, value in options.items())]
        command += [f"--host=unix://{self.folder}/socket", "--iptables=false", "--ip6tables=false", "--bridge=none"]
        with (self.folder / "log.txt").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(lambda: self("version", code=None).returncode == 0)
        self._import_base()

    def __call__(self, *arguments: str, code: int | None = 0, env: dict[str, str] | None = None) -> Completed:
        """Run docker; `code` is the exit code that is expected (None: any)."""
        done = subprocess.run(
            [CLIENT, *arguments],
            env=self.environment | (env or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=1500,
        )
        assert code is None or done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def build(self, tag: str, context: Path, *arguments: str, **options: Any) -> Completed:
        """Build an experiment's Containerfile, with this machine's network."""
        passed = [part for name in PASSED if name in os.environ for part in ("--build-arg", name)]
        local = ["--network=host", "--build-arg", "BASE=base", *passed, *arguments]
        return self(
            "build", *local, "-t", tag, "-f", str(context / "containers/Containerfile"), str(context), **options
        )

    def end(self) -> None:
        """End dockerd, which ends its containers, and remove what it mounted and wrote."""
        if self.process is not None:
            for container in self("ps", "-q", code=None).stdout.split():
                self("rm", "-f", container, code=None)
            end(self.process, signal.SIGTERM)
        for line in reversed(Path("/proc/mounts").read_text().splitlines()):
            if (place := line.split()[1]) == str(self.folder) or place.startswith(f"{self.folder}/"):
                subprocess.run(["umount", place], check=True)
        self.folder.rmdir()

    def _mount_disk(self) -> None:
        """Put a file system in one sparse file below the folder: removed at once, where 200,000 files take minutes."""
        disk = self.folder.with_suffix(".disk")
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "nodiscard", str(disk)], check=True)
        subprocess.run(["mount", "-o", "loop", str(disk), str(self.folder)], check=True)
        disk.unlink()  # it lives as long as it is mounted, and goes with this machine's power too

    def _import_base(self) -> None:
        """Make the image `base`: the files of Debian's essential packages and of PROGRAMS, with everything they need."""

        def output(*command: str) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        root = self.folder / "base"
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        installed = [line.split() for line in output("dpkg-query", "-Wf", "${Package} ${Essential}\n").splitlines()]
        wanted = [*(name for name, essential in installed if essential == "yes"), *PROGRAMS]
        no = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
        lines = output("apt-cache", "depends", "--recurse", "--installed", *no, *wanted).splitlines()
        needed = sorted({line.partition(":")[0] for line in lines if line[0].isalnum()})
        files = {
            # Paths before Debian merged /bin into /usr/bin.
            path if path.startswith(("/usr/", "/etc/", "/var/")) else f"/usr{path}"
            for path in subprocess.run(["dpkg", "-L", *needed], capture_output=True, text=True, check=False).stdout.split("\n")
            if path and (Path(path).is_symlink() or Path(path).is_file())
        }  # fmt: skip
        bundle = "/etc/ssl/certs/ca-certificates.crt"  # made when ca-certificates was installed
        (self.folder / "files.txt").write_text("\n".join(sorted({*files, bundle})))
        tar = f"tar -C / --no-recursion -T {self.folder}/files.txt -c 2>/dev/null | tar -C {root} -x"
        subprocess.run(["sh", "-c", tar], check=True)
        for name in ("dev", "proc", "root", "run", "sys", "tmp", "var/tmp"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("tmp", "var/tmp"):
            (root / name).chmod(0o1777)
        for name in ("passwd", "group"):
            (root / "etc" / name).write_text(
                "".join(f"{line}\n" for line in Path("/etc", name).read_text().splitlines() if int(line.split(":")[2]) < 1000)
            )  # fmt: skip
        subprocess.run(["ldconfig", "-r", str(root)], check=True)
        subprocess.run(["sh", "-c", f"tar -C {root} -c . | {CLIENT} import - base"], env=self.environment, check=True)
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    docker = Docker()
    try:
        docker.start()
        yield docker
    finally:
        docker.end()


class Index(http.server.BaseHTTPRequestHandler):
    """A mirror that wants a password, and sends who has it to the index that this machine uses."""

    password = "labtrain-canary-8c1f"
    served: list[str]  # user agents

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Basic " + base64.b64encode(f"lab:{self.password}".encode()).decode():
            self.send_response(401)
        else:
            from pip._internal.models.index import PyPI

            self.served.append(self.headers["User-Agent"])
            self.send_response(307)
            index = os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/")
            self.send_header("Location", index + self.path.removeprefix("/simple"))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        pass


def build_with_a_password(docker: Docker, experiment: Experiment, *, buildkit: bool) -> None:
    """Build an image by a mirror that wants a password, and look for it in all that is left."""
    root = experiment.root
    lock = (root / "requirements.lock").read_text()
    (root / "requirements.lock").write_text(locked_block(lock, "uv") + locked_block(lock, "click"))
    for name in (".env", "containers/.env", "containers/secrets/jupyter_token", "runs/data.csv"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(Index.password * 1_000_000)
    Index.served = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mirror = f"http://lab:{Index.password}@127.0.0.1:{server.server_port}/simple"
    built = docker.build(
        "small", root, "--build-arg", f"PIP_INDEX_URL={mirror}", env={"DOCKER_BUILDKIT": str(int(buildkit))}
    )
    server.shutdown()
    assert {agent.partition("/")[0] for agent in Index.served} == {"pip", "uv"}, built.stderr
    assert docker("run", "--rm", "--network=none", "small", "labtrain", "--version").stdout.startswith("labtrain")
    if not buildkit:
        assert re.search(r"Sending build context to Docker daemon +[\d.]+kB", built.stdout), (
            "files of the user's went to it"
        )
    told = docker("history", "--no-trunc", "small").stdout + docker("inspect", "small").stdout
    assert "start.sh" in told
    assert "PIP_INDEX_URL" not in told
    saved = docker.folder / "small.tar"
    docker("save", "-o", str(saved), "small")
    data = saved.read_bytes()
    saved.unlink()
    docker("rmi", "-f", "small")
    assert b"containers/start.sh" in data
    assert Index.password.encode() not in data
    assert f"127.0.0.1:{server.server_port}".encode() not in data
