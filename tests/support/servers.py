"""Real servers on 127.0.0.1: SeaweedFS for S3, OpenSSH for SFTP, MLflow. As any user."""

import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, need
from tests.support.waiting import wait_until

KEY, SECRET = "labtrain-test-key", "labtrain-test-secret"
READ_KEY, READ_SECRET = "labtrain-read-key", "labtrain-read-secret"


def free_ports(count: int = 1) -> int:
    """Return the first of `count` ports in a row on which nobody listens, and which no outgoing connection is given.

    Those of the kernel's own range (ip(7)) are given to any connection that a test opens: a server that starts a second
    later, or again, finds its own taken then, and SeaweedFS takes another without a word.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        first = random.SystemRandom().randrange(10_000, lowest - count)
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first
    raise RuntimeError("no free ports")


def short_folder() -> Path:
    """Make a folder for sockets: their paths have at most 107 bytes (unix(7)), which those below pytest's may exceed."""
    folder = Path(tempfile.mkdtemp(prefix="labtrain-", dir="/tmp"))
    folder.chmod(0o755)
    return folder


def end(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()


@dataclass
class Server:
    """A process that listens, and its folder."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    sockets: Path | None = None
    ports = 1  # in a row

    def __post_init__(self) -> None:
        self.port = free_ports(self.ports)

    def kill(self) -> None:
        if self.process is not None:
            end(self.process)
            self.process = None


class S3(Server):
    """SeaweedFS with one bucket, `lab`."""

    ports = 10

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def variables(self, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": self.endpoint,
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip

    def start(self) -> None:
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        self.sockets = short_folder()
        users = [("lab", KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"]),
                 ("reader", READ_KEY, READ_SECRET, ["Read", "List"])]  # fmt: skip
        (self.folder / "s3.json").write_text(json.dumps({"identities": [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
            for name, key, secret, actions in users
        ]}))  # fmt: skip
        base = self.port
        options = {"dir": self.folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.port": base,
                   "master.port": base + 1, "master.port.grpc": base + 2, "volume.port": base + 3,
                   "volume.port.grpc": base + 4, "filer.port": base + 5, "filer.port.grpc": base + 6,
                   "s3.port.grpc": base + 7, "admin.port": base + 8, "admin.port.grpc": base + 9,
                   "master.telemetry": "false", "admin.ui": "false", "webdav": "false", "s3.port.iceberg": 0,
                   "s3.port.lance": 0, "filer.localSocket": self.sockets / "filer.sock",
                   "s3.localSocket": self.sockets / "s3.sock", "s3.config": self.folder / "s3.json",
                   "s3.autoCreateBucket": "false", "s3.cacheCapacityMB": 0}  # fmt: skip
        command = [weed(), "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "GOMEMLIMIT": "400MiB"}
            )
        wait_until(
            lambda: urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1).status == 200,
            process=self.process,
            log=self.folder / "log.txt",
        )

    def kill(self) -> None:
        super().kill()
        if self.sockets is not None:
            shutil.rmtree(self.sockets)
            self.sockets = None
        for port in range(self.port, self.port + 10):
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):  # it has no option for these
                left.unlink(missing_ok=True)

    def make_bucket(self) -> None:
        import s3fs

        with_retries = s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=self.endpoint, skip_instance_cache=True, use_listings_cache=False
        )
        wait_until(lambda: with_retries.mkdir("lab") is None or True)


class Listener(ABC):
    """Accepts connections at a port of its own; a thread serves each."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    @abstractmethod
    def _serve(self, client: socket.socket) -> None: ...

    def close(self) -> None:
        self.server.close()


class Proxy(Listener):
    """Stands before a server on a port of its own, and makes it slow, or answer 503, or not at all."""

    def __init__(self, port: int, *, gone: Path = Path("/nonexistent/gone")) -> None:
        self.target = port
        self.gone = gone  # a file: once it is there, nobody is reached
        self.bytes_per_second = 0
        self.broken = 0  # so many connections to come get 503
        self.passed = 0
        self.refused = 0  # so many connections found nobody behind it
        super().__init__()

    def _serve(self, client: socket.socket) -> None:
        if self.broken > 0:
            self.broken -= 1
            with suppress(OSError):
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                client.close()
            return
        try:
            if self.gone.exists():
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            self.refused += 1
            client.close()
            return
        threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()
        self._pass(client, server, True)

    def _pass(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 15):
                if self.gone.exists():
                    break
                if slow and self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)  # fixed: the rate is what it is for
                self.passed += len(data) if slow else 0
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def weed() -> str:
    """Return the program of SeaweedFS."""
    own = ROOT / ".servers" / "bin" / "weed"
    if own.exists():
        return str(own)
    need("weed", "")
    return str(shutil.which("weed"))


class SFTP(Server):
    """OpenSSH's server, for one key; `home` is a home folder that knows it."""

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def url(self) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{self.data}"

    def start(self) -> None:
        os.environ["PATH"] += ":/usr/sbin"
        need("sshd", "openssh-server")
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(exist_ok=True)
        for key in (self.folder / "host", ssh / "id_ed25519"):
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(ssh / "id_ed25519.pub", self.folder / "authorized_keys")
        (self.folder / "authorized_keys").chmod(0o600)
        host_key = " ".join((self.folder / "host.pub").read_text().split()[:2])
        (ssh / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}\n")
        (ssh / "config").write_text(
            f"Host 127.0.0.1\n  IdentityFile {ssh}/id_ed25519\n  UserKnownHostsFile {ssh}/known_hosts\n"
        )
        lines = [f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder}/host", f"PidFile {self.folder}/pid",
                 f"AuthorizedKeysFile {self.folder}/authorized_keys", "PermitRootLogin prohibit-password",
                 "PasswordAuthentication no", "KbdInteractiveAuthentication no", "UsePAM no", "StrictModes no",
                 "Subsystem sftp internal-sftp"]  # fmt: skip
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        program = shutil.which("sshd")
        assert program is not None
        self.process = subprocess.Popen(
            [program, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / "log.txt")]
        )
        wait_until(
            lambda: socket.create_connection(("127.0.0.1", self.port), 1),
            process=self.process,
            log=self.folder / "log.txt",
        )

    def refuses(self) -> str:
        """Return why the server lets this user in under no circumstances; empty where it does let them in."""
        import paramiko

        client = paramiko.SSHClient()
        client.load_host_keys(str(self.home / ".ssh" / "known_hosts"))
        try:
            client.connect("127.0.0.1", self.port, getpass.getuser(), key_filename=str(self.home / ".ssh/id_ed25519"))
        except paramiko.AuthenticationException:
            lines = (self.folder / "log.txt").read_text().splitlines()
            return next((line for line in lines if "not allowed because" in line), "")
        finally:
            client.close()
        return ""


class MLflow(Server):
    """MLflow's tracking server, with its runs in SQLite."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if not (ROOT / ".servers" / "mlflow").is_dir():
            need("mlflow", "")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        variables = {"PYTHONPATH": str(ROOT / ".servers"), "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **variables},
                cwd=self.folder,
                start_new_session=True,  # it starts uvicorn, which does not end with it
            )
        wait_until(
            lambda: urllib.request.urlopen(f"{self.url}/health", timeout=1).status == 200,
            process=self.process,
            log=self.folder / "log.txt",
        )

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
        super().kill()


def environment_with_mlflow(folder: Path) -> Path:
    """Return the Python of a copy of this environment into which MLflow is installed, as a person installs it."""
    root = Path(sys.prefix)
    subprocess.run(["cp", "-al", str(root), str(folder / "venv")], check=True)
    (site,) = folder.glob("venv/lib/python3.*/site-packages")
    for path in (ROOT / ".servers").resolve().iterdir():
        if path.name != "bin" and not (site / path.name).exists():
            subprocess.run(["cp", "-al", str(path), str(site)], check=True)
    return folder / "venv" / "bin" / "python"
