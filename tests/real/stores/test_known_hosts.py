"""Which servers are accepted over SFTP: real sshds, with certificates too, each asked by ssh itself as well."""

import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from labtrain.base.errors import StoreError
from labtrain.stores.known_hosts import fingerprint
from labtrain.stores.store import Store
from tests.conftest import need
from tests.support.servers import end, free_ports
from tests.support.waiting import wait_until

KINDS = ("ed25519", "ecdsa", "rsa")
ALIAS = "node7.lab.example"


def keygen(*arguments: object) -> None:
    subprocess.run(["ssh-keygen", "-q", *map(str, arguments)], check=True, capture_output=True)


class Lab:
    """Keys, and servers that show them."""

    def __init__(self, folder: Path) -> None:
        os.environ["PATH"] += ":/usr/sbin"
        need("sshd", "openssh-server")
        need("ssh", "openssh-client")
        self.folder, self.processes = folder, list[subprocess.Popen[bytes]]()
        self.ports: dict[str, int] = {}
        for name in ("client", "ca", "another_ca", "other"):
            keygen("-t", "ed25519", "-N", "", "-f", folder / name)
        keygen("-t", "rsa", "-N", "", "-f", folder / "rsa_ca")
        for kind in KINDS:
            keygen("-t", kind, "-N", "", "-f", folder / kind)
        (folder / "authorized_keys").write_text((folder / "client.pub").read_text())
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)

    def key(self, name: str) -> str:
        return " ".join((self.folder / f"{name}.pub").read_text().split()[:2])

    def serve(self, name: str, *kinds: str, certificate: tuple[str, ...] = (), ca: str = "ca") -> None:
        """Start a server with keys of these kinds; `certificate`: of the first, by these options of ssh-keygen."""
        folder, port = self.folder / f"server-{len(self.processes)}", free_ports()
        folder.mkdir()
        lines = [f"Port {port}", "ListenAddress 127.0.0.1", f"PidFile {folder}/pid", "StrictModes no", "UsePAM no",
                 f"AuthorizedKeysFile {self.folder}/authorized_keys", "PasswordAuthentication no",
                 "KbdInteractiveAuthentication no", "Subsystem sftp internal-sftp"]  # fmt: skip
        for kind in kinds:
            shutil.copy(self.folder / kind, folder)
            lines.append(f"HostKey {folder / kind}")
        if certificate:
            shutil.copy(self.folder / f"{kinds[0]}.pub", folder)
            keygen("-s", self.folder / ca, "-I", name, *certificate, folder / f"{kinds[0]}.pub")
            lines.append(f"HostCertificate {folder / kinds[0]}-cert.pub")
        (folder / "sshd_config").write_text("\n".join(lines) + "\n")
        sshd = str(shutil.which("sshd"))
        self.processes.append(subprocess.Popen([sshd, "-D", "-f", folder / "sshd_config", "-E", folder / "log"]))
        wait_until(
            lambda: socket.create_connection(("127.0.0.1", port), 1), process=self.processes[-1], log=folder / "log"
        )
        self.ports[name] = port


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    names = ("-h", "-n", f"127.0.0.1,{ALIAS}")
    try:
        lab.serve("plain", *KINDS)
        lab.serve("ed25519", "ed25519", certificate=names)
        lab.serve("ecdsa", "ecdsa", certificate=names)
        lab.serve("rsa", "rsa", certificate=names)
        lab.serve("by rsa", "ed25519", certificate=names, ca="rsa_ca")
        lab.serve("for all", "ed25519", certificate=("-h",))
        lab.serve("of a pattern", "ed25519", certificate=("-h", "-n", "*.lab.example"))
        lab.serve("elsewhere", "ed25519", certificate=("-h", "-n", "other.example"))
        lab.serve("expired", "ed25519", certificate=(*names, "-V", "20200101:20210101"))
        lab.serve("not yet", "ed25519", certificate=(*names, "-V", "20900101:20910101"))
        lab.serve("a user's", "ed25519", certificate=("-n", "127.0.0.1"))
        yield lab
    finally:
        for process in lab.processes:
            end(process)


# Server, lines of known_hosts, taken or why not. {h} is the host as ssh looks it up; {ed25519} and so on are keys.
CA = "@cert-authority {h} {ca}\n"
CASES = {
    "its key": ("plain", "{h} {ed25519}\n", ""),
    "its second kind of key alone": ("plain", "{h} {ecdsa}\n", ""),
    "its third": ("plain", "{h} {rsa}\n", ""),
    "nothing": ("plain", "", "which is not in"),
    "another key of that kind": ("plain", "{h} {other}\n", "but known_hosts has another"),
    "another key, and its own": ("plain", "{h} {other}\n{h} {ed25519}\n", ""),
    "another key of a kind, its own of another": ("plain", "{h} {other}\n{h} {rsa}\n", "but known_hosts has another"),
    "another host's": ("plain", "other.example {ed25519}\n", "which is not in"),
    "among names": ("plain", "a,{h},b {ed25519}\n", ""),
    "a pattern": ("plain", "[127.*]:* {ed25519}\n", ""),
    "a pattern of a letter": ("plain", "[127.?.0.1]:* {ed25519}\n", ""),
    "brackets are no pattern": ("plain", "[[]127.0.0.1[]]:* {ed25519}\n", "which is not in"),
    "a negated name": ("plain", "[*]:*,!{h} {ed25519}\n", "which is not in"),
    "a negated name first": ("plain", "!{h},[*]:* {ed25519}\n", "which is not in"),
    "a negated other": ("plain", "[*]:*,!other.example {ed25519}\n", ""),
    "a negated name, and a line": ("plain", "[*]:*,!{h} {other}\n{h} {ed25519}\n", ""),
    "without the port": ("plain", "127.0.0.1 {ed25519}\n", ""),
    "another without the port": ("plain", "127.0.0.1 {other}\n", "which is not in"),
    "another with it": ("plain", "127.0.0.1 {ed25519}\n{h} {other}\n", "but known_hosts has another"),
    "revoked": ("plain", "@revoked * {ed25519}\n{h} {ed25519}\n", "sent a revoked key"),
    "revoked after": ("plain", "{h} {ed25519}\n@revoked {h} {ed25519}\n", "sent a revoked key"),
    "another revoked": ("plain", "@revoked * {other}\n{h} {ed25519}\n", ""),
    "an authority of others": ("plain", "@cert-authority *.lab.example {ca}\n{h} {ed25519}\n", ""),
    "an authority is no host": ("plain", "@cert-authority {h} {ed25519}\n", "which is not in"),
    "malformed lines": (
        "plain",
        "{h}\n{h} ssh-ed25519\n{h} ssh-ed25519 AAAA\n{h} ssh-ed25519 !!!\n@unknown {h} {other}\n@revoked\n@cert-authority {h}\n"
        "{h} 1024 35 1234\n{h} ssh-rsa {ed25519}\n|1|x|y {other}\n|2|eA==|eA== {other}\n|1| {other}\n\0\0\n\xff {other}\n{h} {ed25519}\n",
        "",
    ),
    "comments and spaces": ("plain", "# {h} {other}\n\n  \t{h}\t {ed25519} me@here\n #\n", ""),
    "CRLF": ("plain", "{h} {ed25519}\r\n", ""),
    "its certificate": ("ed25519", CA, ""),
    "of ecdsa": ("ecdsa", CA, ""),
    "of rsa": ("rsa", CA, ""),
    "by an authority with rsa": ("by rsa", "@cert-authority {h} {rsa_ca}\n", ""),
    "for all hosts": ("for all", CA, ""),
    "an authority without the port": ("ed25519", "@cert-authority 127.0.0.1 {ca}\n", ""),
    "an authority of a pattern": ("ed25519", "@cert-authority * {ca}\n", ""),
    "two authorities": ("ed25519", "@cert-authority {h} {another_ca}\n" + CA, ""),
    "another authority": ("ed25519", "@cert-authority {h} {another_ca}\n", "which is not in"),
    "an authority elsewhere": ("ed25519", "@cert-authority *.lab.example {ca}\n", "which is not in"),
    "a revoked authority": ("ed25519", CA + "@revoked * {ca}\n", "sent a revoked key"),
    "a certificate of a revoked key": ("ed25519", CA + "@revoked * {ed25519}\n", "sent a revoked key"),
    "a certificate, and its key": ("ed25519", "{h} {ed25519}\n", ""),
    "a certificate, and another key": ("ed25519", CA + "{h} {other}\n", ""),
    "a certificate of elsewhere": ("elsewhere", CA, "its certificate: it is for other.example"),
    "an expired one": ("expired", CA, "its certificate: it has expired"),
    "an expired one, and its key": ("expired", CA + "{h} {ed25519}\n", ""),
    "one to come": ("not yet", CA, "its certificate: it is not valid yet"),
    "a user's": ("a user's", CA, "its certificate: it is for a user"),
}


def configure(lab: Lab, home: Path, server: str, known: bytes, **more: str) -> Path:
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "kh").write_bytes(known)
    options = {"HostName": "127.0.0.1", "Port": lab.ports[server], "User": getpass.getuser(), "BatchMode": "yes",
               "IdentityFile": lab.folder / "client", "IdentitiesOnly": "yes", "StrictHostKeyChecking": "yes",
               "UserKnownHostsFile": home / ".ssh/kh", "GlobalKnownHostsFile": "none", "UpdateHostKeys": "no",
               "LogLevel": "ERROR", **more}  # fmt: skip
    config = home / ".ssh" / "config"
    config.write_text("Host good\n" + "".join(f"  {name} {value}\n" for name, value in options.items()))
    return config


def takes(config: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return why labtrain does not take the server, empty where it does; ssh itself must decide alike."""
    monkeypatch.setenv("HOME", str(config.parents[1]))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    done = subprocess.run(["ssh", "-F", config, "good", "true"], capture_output=True, text=True, check=False)
    why = ""
    try:
        Store("sftp://good/tmp")
    except StoreError as error:
        why = str(error)
    assert (done.returncode == 0) == (why == ""), (why, done.stderr)
    return why


@pytest.mark.parametrize("case", CASES)
def test_a_server_is_taken_where_ssh_takes_it(
    lab: Lab, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, text, says = CASES[case]
    names = ("ed25519", "ecdsa", "rsa", "ca", "another_ca", "rsa_ca", "other")
    known = text.format(h=f"[127.0.0.1]:{lab.ports[server]}", **{name: lab.key(name) for name in names})
    config = configure(lab, tmp_path / "home", server, known.encode("latin-1"))
    found = takes(config, monkeypatch)
    assert bool(found) == bool(says)
    assert says in found


@pytest.mark.parametrize("name", ["[127.0.0.1]:{p}", "127.0.0.1", "other.example"])
def test_hashed_names_are_read(lab: Lab, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ssh-keygen -H` hashes them."""
    config = configure(lab, tmp_path / "home", "plain", b"")
    file = config.with_name("kh")
    file.write_text(f"{name.format(p=lab.ports['plain'])} {lab.key('ed25519')}\n")
    keygen("-H", "-f", file)
    assert file.read_text().startswith("|1|")
    assert ("which is not in" in takes(config, monkeypatch)) == (name == "other.example")


@pytest.mark.parametrize(
    ("text", "server", "taken"),
    [
        ("node7.lab.example {ed25519}\n", "plain", True),
        ("NODE7.Lab.example {ed25519}\n", "plain", True),
        ("*.lab.example {ed25519}\n", "plain", True),
        ("[127.0.0.1]:* {ed25519}\n127.0.0.1 {ed25519}\n", "plain", False),
        ("@cert-authority *.lab.example {ca}\n", "ed25519", True),
        ("@cert-authority * {ca}\n", "elsewhere", False),
        ("@cert-authority * {ca}\n", "of a pattern", False),
    ],
)
def test_an_alias_is_the_name(
    lab: Lab, tmp_path: Path, text: str, server: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HostKeyAlias, without a port; in certificates as well."""
    known = text.format(ed25519=lab.key("ed25519"), ca=lab.key("ca"))
    config = configure(lab, tmp_path / "home", server, known.encode(), HostKeyAlias=ALIAS)
    assert (takes(config, monkeypatch) == "") == taken


def test_the_files_are_those_that_ssh_reads(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, everybody's, with ~ and spaces; one that is not there is passed over; `none` is none; revoked keys."""
    line = f"[127.0.0.1]:{lab.ports['plain']} {lab.key('ed25519')}\n"
    for number, (options, taken) in enumerate([
        ({"UserKnownHostsFile": "{}/no {}/own"}, True),
        ({"UserKnownHostsFile": '"{}/with space"'}, True),
        ({"GlobalKnownHostsFile": "{}/own"}, True),
        ({"UserKnownHostsFile": "none"}, False),
        ({"UserKnownHostsFile": "{}/own", "RevokedHostKeys": "{}/revoked"}, False),
        ({"UserKnownHostsFile": "{}/own", "RevokedHostKeys": "{}/krl"}, False),
        ({"UserKnownHostsFile": "{}/own", "RevokedHostKeys": "{}/no"}, False),
        ({"UserKnownHostsFile": "{}/own", "RevokedHostKeys": "{}/others"}, True),
    ]):  # fmt: skip
        home = tmp_path / str(number)
        config = configure(
            lab, home, "plain", b"", **{key: text.replace("{}", str(home)) for key, text in options.items()}
        )
        for name in ("own", "with space"):
            (home / name).write_text(line)
        (home / "revoked").write_text(f"# gone\n{lab.key('ed25519')} node\n")
        (home / "others").write_text(f"{lab.key('other')}\n")
        keygen("-k", "-f", home / "krl", lab.folder / "ed25519.pub")
        assert (takes(config, monkeypatch) == "") == taken, options


def test_a_changed_key_is_no_key_to_add(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, line and both fingerprints are named; the hint appends nothing. For a new host it is ssh that asks."""
    port = lab.ports["plain"]
    known = f"# a comment\n[127.0.0.1]:{port} {lab.key('other')}\n"
    config = configure(lab, tmp_path / "home", "plain", known.encode())
    said = takes(config, monkeypatch)

    def shown(name: str) -> str:
        done = subprocess.run(
            ["ssh-keygen", "-lf", lab.folder / f"{name}.pub"], capture_output=True, text=True, check=True
        )
        return done.stdout.split()[1]

    assert f"sent the ssh-ed25519 key {shown('ed25519')}, but known_hosts has another: " in said
    assert f"{config.with_name('kh')}:2 (ssh-ed25519 {shown('other')})" in said
    assert said.endswith("hint: first ask the administrator of 127.0.0.1 for its key's fingerprint")
    assert "keyscan" not in said
    assert "ssh-keygen -R" not in said
    config.with_name("kh").write_text("")
    said = takes(config, monkeypatch)
    assert f"hint: ssh -p {port} 127.0.0.1: it shows the fingerprint and asks" in said
    assert ">>" not in said


def test_a_fingerprint_is_sshs() -> None:
    assert fingerprint(b"") == "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU"
