"""The image, built and run by a real Docker on a base made here; the files for Compose, Kubernetes and Apptainer."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from labtrain.bootstrap import locked_block
from tests.conftest import ROOT, Experiment, need
from tests.support.containers import Docker, build_with_a_password
from tests.support.servers import end, free_ports
from tests.support.waiting import wait_until

pytest_plugins = ["tests.support.containers"]

CONTAINERS = ROOT / "containers"
GOLDEN = json.loads((ROOT / "tests/golden/receipt.json").read_text())["results"]["weights_digest"]
PORTABLE = ("determinism.mode=portable", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=none")
# As hard as compose.yaml and run.yaml have it.
HARD = ("--read-only", "--tmpfs=/tmp:exec", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--shm-size=1g")
SOMEBODY = "--user=1234:1234"  # who is not in the image's passwd


@pytest.fixture(scope="module")
def image(docker: Docker, shared_experiment: Experiment) -> str:
    """The whole environment, by hash from the lock: 8.8 GB."""
    started = time.monotonic()
    docker.build("digits", shared_experiment.root)
    print(f"built in {time.monotonic() - started:.0f} s")
    return "digits"


@pytest.fixture
def work(own_experiment: Experiment) -> Path:
    """The experiment's folder, which only root may write, and its runs, which anybody may."""
    (own_experiment.root / "runs").mkdir()
    (own_experiment.root / "runs").chmod(0o777)
    return own_experiment.root


def mounted(work: Path) -> list[str]:
    return ["-v", f"{work}:/experiment:ro", "-v", f"{work}/runs:/experiment/runs"]


@contextmanager
def started(docker: Docker, *arguments: str) -> Iterator[str]:
    """A container with a network of its own, which nobody else reaches, that runs until the block ends."""
    container = docker("run", "-d", "--network=none", *HARD, *arguments).stdout.strip()
    try:
        yield container
    finally:
        docker("rm", "-f", container)


def beside(docker: Docker, container: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this machine's in a container's network."""
    number = docker("inspect", "-f", "{{.State.Pid}}", container).stdout.strip()
    return subprocess.run(
        ["nsenter", "-t", number, "-n", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def listening(docker: Docker, container: str) -> bool:
    """Whether a container's processes hold a listening TCP socket."""
    code = (
        "import pathlib, re\n"
        "held = {str(fd.readlink()) for fd in pathlib.Path('/proc').glob('[0-9]*/fd/*') if fd.is_symlink()}\n"
        "lines = [line.split() for name in ('tcp', 'tcp6') for line in open(f'/proc/net/{name}').readlines()[1:]]\n"
        "print(any(f'socket:[{line[9]}]' in held for line in lines if line[3] == '0A'))"
    )
    return docker("exec", container, "python", "-c", code).stdout.strip() == "True"


@pytest.mark.release
def test_a_mirrors_password_is_in_no_layer_and_no_history(docker: Docker, own_experiment: Experiment) -> None:
    """pip and uv reach the mirror with it; the saved image, all its bytes, does not know it; nor do they know the user's files.

    By BuildKit; tests/full has the classic builder.
    """
    build_with_a_password(docker, own_experiment, buildkit=True)


@pytest.mark.release
def test_it_trains_is_stopped_and_goes_on_to_the_golden_digest(docker: Docker, image: str, work: Path) -> None:
    """Read-only root, no capability, no network, a uid that no passwd names: docker stop saves, 75; then the golden bits."""
    arguments = ["--network=none", *HARD, SOMEBODY, *mounted(work), image, *PORTABLE]
    container = docker("run", "-d", *arguments).stdout.strip()
    wait_until(lambda: any(len(path.read_bytes().splitlines()) > 20 for path in work.glob("runs/digits/*/trail.jsonl")))
    docker("stop", "-t", "60", container)
    log = docker("logs", container).stderr
    assert docker("wait", container).stdout.strip() == "75", log
    assert "stopped by SIGTERM, saved" in log
    docker("rm", container)
    done = docker("run", "--rm", *arguments)
    folder, digest = done.stdout.split()
    assert digest == GOLDEN
    found = json.loads((work / folder / "receipt.json").read_text())
    assert len(found["segments"]) == 2, "the second start went on"
    assert (work / folder).stat().st_uid == 1234


def test_a_signal_that_is_not_handled_ends_it(docker: Docker, image: str) -> None:
    """As before Python has imported: a container's first process would ignore it until it is killed. tini is there."""
    with started(docker, SOMEBODY, image, "sleep", "600") as container:
        docker("stop", "-t", "120", container)
        assert docker("wait", container).stdout.strip() == str(128 + 15)


def test_the_doctor_finds_nothing_wrong_in_it(docker: Docker, image: str, work: Path) -> None:
    """Every file of the environment is the lock's, as the image has them."""
    judged = json.loads(
        docker(
            "run", "--rm", "--network=none", *HARD, SOMEBODY, *mounted(work), image, "labtrain", "doctor", "--json"
        ).stdout
    )
    assert len(judged) > 10
    assert not [check for check in judged if check["status"] == "failed"]


def test_nobody_in_it_is_root_and_nothing_outside_the_volumes_can_be_written(
    docker: Docker, image: str, work: Path
) -> None:
    script = (
        "id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; "
        "for place in / /etc /opt/labtrain /opt/labtrain/.venv/bin /lab /var/tmp /experiment /experiment/runs /tmp; do "
        "touch $place/x 2>/dev/null && rm $place/x && echo $place; done; echo $HOME"
    )
    arguments = ["run", "--rm", "--network=none", *HARD]
    as_built = docker(*arguments, *mounted(work), image, "sh", "-c", script).stdout.split()
    assert as_built[0] == "1000"
    somebody = docker(*arguments, SOMEBODY, *mounted(work), image, "sh", "-c", script).stdout.split()
    assert somebody[0] == "1234"
    for found in (as_built, somebody):
        assert found[1:7] == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
        assert found[7:] == ["/experiment/runs", "/tmp", "/tmp"]


def test_an_editor_opens_the_experiment_in_it(docker: Docker, image: str, work: Path) -> None:
    """.devcontainer/devcontainer.json names the Containerfile; its command runs as its user, and a run starts there."""
    found = json.loads((work / ".devcontainer/devcontainer.json").read_text())
    build = {key: (work / ".devcontainer" / place).resolve() for key, place in found["build"].items()}
    assert build == {"dockerfile": work / "containers/Containerfile", "context": work}
    (work / ".vscode").chmod(0o777)
    # As `devcontainer up` runs it: https://github.com/devcontainers/cli
    place = f"/workspaces/{work.name}"
    options = [
        *found["runArgs"],
        "--network=none",
        "--init",
        "-v",
        f"{work}:{place}",
        "-w",
        place,
        "-u",
        found["remoteUser"],
    ]
    train = f"python train.py {' '.join(PORTABLE)} trainer.max_steps=2"
    done = docker(
        "run", "--rm", *options, "--entrypoint=/bin/sh", image, "-c", f"{found['postCreateCommand']} && {train}"
    )
    assert ".vscode/labtrain/config.json" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].startswith("runs/digits/")


def test_without_being_asked_nothing_listens(docker: Docker, image: str, work: Path) -> None:
    with started(docker, SOMEBODY, *mounted(work), image, *PORTABLE, "trainer.max_epochs=100000") as container:
        wait_until(lambda: any(work.glob("runs/digits/*/trail.jsonl")))
        assert not listening(docker, container)
    with started(docker, SOMEBODY, image, "python", "-m", "http.server") as container:
        wait_until(lambda: listening(docker, container))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    need("ssh-keygen", "openssh-client")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "id")], check=True)
    return tmp_path / "id"


def test_ssh_takes_keys_and_nothing_else(docker: Docker, image: str, work: Path, key: Path) -> None:
    """As uid 1000, on port 2222; the host key is made at the first start, and stays on the volume."""
    home = key.parent / "home"
    home.mkdir()
    os.chown(home, 1000, 1000)
    volumes = ["-v", f"{key}.pub:/run/secrets/authorized_keys:ro", "-v", f"{home}:/lab"]
    arguments = [*volumes, *mounted(work), image, "sshd"]
    known = key.parent / "known_hosts"

    options = [f"UserKnownHostsFile={known}", "StrictHostKeyChecking=yes", "IdentityAgent=none", "IdentitiesOnly=yes"]
    flags = [part for option in options for part in ("-o", option)]

    with started(docker, *arguments) as container:

        def ssh(user: str, *command: str) -> subprocess.CompletedProcess[str]:
            place = ["-p", "2222", *command[:-1], f"{user}@127.0.0.1", command[-1]]
            return beside(docker, container, "ssh", "-v", "-F", "none", *flags, *place)

        def scan() -> str:
            return beside(docker, container, "ssh-keyscan", "-p", "2222", "127.0.0.1").stdout

        wait_until(lambda: scan() != "")
        known.write_text(scan())
        done = ssh("lab", "-i", str(key), "id -u; command -v python; cd /experiment && ls train.py")
        assert done.stdout.split() == ["1000", "/opt/labtrain/.venv/bin/python", "train.py"], done.stderr
        assert ssh("lab", "-tt", "-i", str(key), "tty").stdout.startswith("/dev/pts/")
        for refused in (ssh("lab", "-o", "PubkeyAuthentication=no", "true"), ssh("root", "-i", str(key), "true")):
            assert refused.returncode == 255
            assert "Authentications that can continue: publickey\n" in refused.stderr
            assert "Permission denied (publickey)" in refused.stderr
        other = key.parent / "other"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
        assert "Permission denied (publickey)" in ssh("lab", "-i", str(other), "true").stderr
        place = ["-p", "2222", "-i", str(key), "-W", "127.0.0.1:2222", "lab@127.0.0.1"]
        forwarded = beside(docker, container, "ssh", "-F", "none", *flags, *place)
        assert "administratively prohibited" in forwarded.stderr
        docker("restart", "-t", "5", container)
        wait_until(lambda: scan() != "")
        assert ssh("lab", "-i", str(key), "true").returncode == 0, "another host key"


def test_jupyter_wants_its_token(docker: Docker, image: str, work: Path) -> None:
    """A file's, as Compose and Kubernetes mount it, with the end of line that editors leave."""
    token = work / "token"
    token.write_text("a-token-of-the-test\n")
    secret = ["-v", f"{token}:/run/secrets/jupyter_token:ro", "-e", "JUPYTER_TOKEN_FILE=/run/secrets/jupyter_token"]

    code = (
        "import http.client, sys; connection = http.client.HTTPConnection('127.0.0.1', 8888)\n"
        "connection.request('GET', '/api/contents', headers={'Authorization': sys.argv[1]})\n"
        "print(connection.getresponse().status)"
    )
    with started(docker, SOMEBODY, *secret, *mounted(work), image, "jupyter") as container:

        def status(authorization: str) -> str:
            return beside(docker, container, sys.executable, "-c", code, authorization).stdout.strip()

        wait_until(lambda: status(""))
        assert [status(one) for one in ("", "token ", "token another")] == ["403"] * 3
        assert status("token a-token-of-the-test") == "200"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{image}", "jupyter"], "jupyter wants a token"),
        (["-e", "JUPYTER_TOKEN=", "{image}", "jupyter"], "jupyter wants a token"),
        (["-v", "{empty}:/token", "-e", "JUPYTER_TOKEN_FILE=/token", "{image}", "jupyter"], "jupyter wants a token"),
        (["-e", "JUPYTER_TOKEN_FILE=/no", "{image}", "jupyter"], "/no cannot be read by uid 1000"),
        (["{image}", "sshd"], "sshd wants public keys in /run/secrets/authorized_keys"),
        (["-v", "{empty}:/run/secrets/authorized_keys", "{image}", "sshd"], "sshd wants public keys"),
        (
            ["-v", "{keys}:/run/secrets/authorized_keys", SOMEBODY, "{image}", "sshd"],
            "sshd runs as uid 1234, and this image's account has uid 1000",
        ),
        (["{image}"], "no train.py in /experiment"),
        (["{image}", "seed=3"], "no train.py in /experiment"),
    ],
)
def test_what_cannot_start_says_so(docker: Docker, image: str, tmp_path: Path, arguments: list[str], says: str) -> None:
    files = {"image": image, "empty": str(tmp_path / "empty"), "keys": str(tmp_path / "keys")}
    (tmp_path / "empty").write_text("\n" if "jupyter" in arguments else "")
    (tmp_path / "keys").write_text("ssh-ed25519 AAAA\n")
    done = docker("run", "--rm", "--network=none", *HARD, *(part.format(**files) for part in arguments), code=2)
    assert done.stderr.startswith(f"error: {says}")
    assert "\n\nhint: " in done.stderr
    assert done.stdout == ""


def test_a_root_without_tmp_is_refused(docker: Docker, image: str) -> None:
    done = docker("run", "--rm", "--network=none", "--read-only", image, code=2)
    assert done.stderr == "error: neither /lab nor /tmp can be written\n\nhint: docker run --tmpfs /tmp:exec ...\n"


@pytest.mark.parametrize("user", ["0", "00", "", "lab", "-1"])
def test_the_account_is_not_root(docker: Docker, user: str) -> None:
    """In a container: it would change /etc/passwd."""
    script = f"{CONTAINERS / 'system.sh'}:/system.sh:ro"
    done = docker("run", "--rm", "--network=none", "-v", script, "base", "sh", "/system.sh", user, code=2)
    assert done.stderr.startswith(f"error: USER_ID is {user}; expected a number above 0\n\nhint: ")


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """compose.yaml as docker-compose reads it, for a user 1234; it holds it against the specification's schema."""
    need("docker-compose", "docker-compose")
    folder = tmp_path_factory.mktemp("compose") / "digits/containers"
    folder.mkdir(parents=True)
    shutil.copy(CONTAINERS / "compose.yaml", folder)
    (folder / ".env").write_text("USER_ID=1234\nGROUP_ID=5678\nSSH_PORT=2345\nMEMORY=2g\n")
    found: dict[str, Any] = yaml.safe_load(compose(folder / "compose.yaml", code=0))
    return found


def compose(file: Path, *, code: int) -> str:
    done = subprocess.run(
        ["docker-compose", "-f", str(file), "config"], cwd=file.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_compose_holds_its_file_against_the_schema(tmp_path: Path) -> None:
    need("docker-compose", "docker-compose")
    text = (CONTAINERS / "compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(text.replace("read_only: true", "readonly: true"))
    assert "Unsupported config option" in compose(tmp_path / "compose.yaml", code=1)


def test_composes_services_have_limits_and_no_privilege(composed: dict[str, Any]) -> None:
    assert set(composed["services"]) == {"train", "jupyter", "ssh"}
    for service in composed["services"].values():
        assert service["user"] == "1234:5678"
        assert service["build"]["args"] == {"USER_ID": "1234"}
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges"]
        assert service["tmpfs"] == ["/tmp:exec"]
        assert (service["mem_limit"], service["shm_size"]) == ("2g", "8g")
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        targets = [volume.split(":")[1:] for volume in service["volumes"]]
        assert targets == [["/experiment", "rw"], ["/data", "ro"], ["/experiment/runs", "rw"], ["/lab", "rw"]]
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert "ports" not in composed["services"]["train"]


def test_compose_starts_jupyter_and_ssh_only_by_name(composed: dict[str, Any]) -> None:
    """On their ports, which only this machine reaches; with their secrets in files, and none in the file."""
    jupyter, ssh = composed["services"]["jupyter"], composed["services"]["ssh"]
    assert "profiles" not in composed["services"]["train"]
    assert (jupyter["profiles"], ssh["profiles"]) == (["jupyter"], ["ssh"])
    assert (jupyter["command"], ssh["command"]) == (["jupyter"], ["sshd"])
    assert jupyter["ports"] == ["127.0.0.1:8888:8888/tcp"]
    assert ssh["ports"] == ["127.0.0.1:2345:2222/tcp"]
    assert jupyter["environment"] == {"JUPYTER_TOKEN_FILE": "/run/secrets/jupyter_token", "LISTEN": "0.0.0.0"}
    assert [secret["source"] for secret in ssh["secrets"]] == ["authorized_keys"]
    assert [secret["source"] for secret in jupyter["secrets"]] == ["jupyter_token"]


def test_a_secret_is_mounted_where_it_is_needed_alone(composed: dict[str, Any]) -> None:
    """No folder that a container mounts holds one: they lie outside of the experiment, each service has its own."""
    secrets = {name: Path(each["file"]) for name, each in composed["secrets"].items()}
    assert set(secrets) == {"jupyter_token", "authorized_keys"}
    used = {
        name: [each["source"] for each in service.get("secrets", [])] for name, service in composed["services"].items()
    }
    assert used == {"train": [], "jupyter": ["jupyter_token"], "ssh": ["authorized_keys"]}
    for service in composed["services"].values():
        for volume in service["volumes"]:
            place = Path(volume.partition(":")[0])
            assert not [file for file in secrets.values() if place.is_absolute() and file.is_relative_to(place)]
    header = "".join(
        line for line in (CONTAINERS / "compose.yaml").read_text().splitlines(True) if line.startswith("#")
    )
    written = [word for word in header.split() if word.endswith(("/jupyter_token)", "/authorized_keys"))]
    assert [Path(word.rstrip(")")).expanduser() for word in written] == list(
        map(Path, (secrets["jupyter_token"], secrets["authorized_keys"]))
    )


@pytest.mark.parametrize("listen", [None, "0.0.0.0"])
def test_jupyter_is_on_this_machine_alone_unless_it_is_told(tmp_path: Path, listen: str | None) -> None:
    """Apptainer, and Docker's --network=host, share the machine's network: there the default listens to nobody else."""
    (tmp_path / "jupyter").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "jupyter").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "JUPYTER_TOKEN": "x"}
    environment |= {"LISTEN": listen} if listen else {}
    done = subprocess.run(
        ["sh", CONTAINERS / "start.sh", "jupyter"], capture_output=True, text=True, check=True, env=environment
    )
    assert f"--ip={listen or '127.0.0.1'}" in done.stdout.splitlines()
    assert "ListenAddress=${LISTEN-127.0.0.1}" in (CONTAINERS / "start.sh").read_text()


def test_an_ssh_session_leads_nowhere_else(tmp_path: Path, key: Path) -> None:
    """A real sshd with sshd_config, for this user: a shell and files, and no forwarding, unless it is told."""
    os.environ["PATH"] += ":/usr/sbin"
    need("sshd", "openssh-server")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "host"], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    me = getpass.getuser()

    def answers(*more: str) -> dict[str, subprocess.CompletedProcess[str]]:
        port = free_ports()
        options = [f"Port={port}", "ListenAddress=127.0.0.1", f"AllowUsers={me}", "PermitRootLogin=prohibit-password",
                   f"AuthorizedKeysFile={key}.pub", "StrictModes=no", *more]  # fmt: skip
        command = [str(shutil.which("sshd")), "-D", "-f", str(CONTAINERS / "sshd_config"), "-h", str(tmp_path / "host")]
        server = subprocess.Popen(
            [*command, "-E", str(tmp_path / "log"), *(part for each in options for part in ("-o", each))]
        )
        wait_until(lambda: socket.create_connection(("127.0.0.1", port), 1), process=server, log=tmp_path / "log")
        ssh = ["ssh", "-F", "none", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-p", str(port),
               "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/{port}",
               "-o", "ExitOnForwardFailure=yes"]  # fmt: skip
        here = f"127.0.0.1:{port}"
        kinds = {
            "shell": ["echo", "there"],
            "local": ["-W", here],
            "remote": ["-R", f"0:{here}", "true"],
            "socket": ["-R", f"{tmp_path}/socket:{here}", "true"],
        }
        try:
            return {
                kind: subprocess.run(
                    [*ssh, *words[:2], f"{me}@127.0.0.1", *words[2:]] if kind != "shell" else [*ssh, f"{me}@127.0.0.1", *words],
                    capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60,
                )
                for kind, words in kinds.items()
            }  # fmt: skip
        finally:
            end(server)

    found = answers()
    assert (found["shell"].returncode, found["shell"].stdout) == (0, "there\n"), found["shell"].stderr
    assert "administratively prohibited" in found["local"].stderr
    for kind in ("remote", "socket"):
        assert found[kind].returncode == 255
        assert "forwarding failed" in found[kind].stderr
    assert found["local"].stdout == ""
    assert answers("AllowTcpForwarding=local")["local"].stdout.startswith("SSH-2.0-OpenSSH")


KINDS = {"volume.yaml": "PersistentVolumeClaim", "run.yaml": "Job", "desk.yaml": "Pod"}


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes_would_take_its_files(name: str) -> None:
    """By the API's own schemas, strictly: the newest, and 1.29's, the first that has all of the Job's fields switched on."""
    found = yaml.safe_load((CONTAINERS / "k8s" / name).read_text())
    assert found["kind"] == KINDS[name]
    for version in ("1.29", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(found, version, strict=True)
    found["spec"]["resourcez"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resourcez"):
        kubernetes_validate.validate(found, version, strict=True)


def pod(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CONTAINERS / "k8s" / name).read_text())
    spec: dict[str, Any] = found["spec"]["template"]["spec"] if found["kind"] == "Job" else found["spec"]
    return spec


@pytest.mark.parametrize("name", ["run.yaml", "desk.yaml"])
def test_a_pod_has_no_privilege_a_gpu_limit_and_the_claim(name: str) -> None:
    spec = pod(name)
    user = spec["securityContext"]
    assert (user["runAsNonRoot"], user["runAsUser"], user["runAsGroup"], user["fsGroup"]) == (True, 1000, 1000, 1000)
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    (container,) = spec["containers"]
    assert container["securityContext"] == {"privileged": False, "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}  # fmt: skip
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 1
    )
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
    assert set(volumes) == {mount["name"] for mount in container["volumeMounts"]}
    claim = yaml.safe_load((CONTAINERS / "k8s/volume.yaml").read_text())["metadata"]["name"]
    assert volumes["lab"] == {"persistentVolumeClaim": {"claimName": claim}}
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert not [volume for volume in volumes.values() if "hostPath" in volume]
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert (places["/experiment"], places["/dev/shm"], places["/tmp"]) == ("lab", "shm", "tmp")
    assert {env["name"] for env in container.get("env", [])} <= {"JUPYTER_TOKEN_FILE"}, "a secret is a file"


def test_a_jobs_pod_that_stopped_after_saving_is_replaced() -> None:
    """By the policy's first rule that matches, as the Job controller reads it; one of another node's death as well."""
    from labtrain.base.errors import EXIT_STOPPED, EXIT_USAGE

    job = yaml.safe_load((CONTAINERS / "k8s/run.yaml").read_text())["spec"]
    (container,) = pod("run.yaml")["containers"]

    def action(code: int, *conditions: str) -> str | None:
        for rule in job["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes", {"values": []})
            assert codes.get("containerName", container["name"]) == container["name"]
            assert codes.get("operator", "In") == "In"
            if code in codes["values"] or any(one["type"] in conditions for one in rule.get("onPodConditions", [])):
                return str(rule["action"])
        return None

    assert action(EXIT_STOPPED) == "Ignore"
    assert action(EXIT_USAGE) == "FailJob"
    assert action(137, "DisruptionTarget") == "Ignore"
    assert action(1) is None  # counts against backoffLimit
    assert job["backoffLimit"] == 3
    assert job["podReplacementPolicy"] == "Failed", "two pods would write to one run"
    assert pod("run.yaml")["restartPolicy"] == "Never", "a failure policy wants it"
    assert pod("run.yaml")["terminationGracePeriodSeconds"] >= 60


def sections() -> dict[str, str]:
    """The sections of apptainer.def, the header's as ''."""
    found, name = {"": ""}, ""
    for line in (CONTAINERS / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:]
            found[name] = ""
        elif not line.startswith("#"):
            found[name] += f"{line}\n"
    return found


def test_apptainers_commands_make_the_environment(docker: Docker, own_experiment: Experiment, tmp_path: Path) -> None:
    """%files, %post, %environment, %runscript and %test, run in Docker, since Apptainer is not to be had here; a short lock."""
    parts = sections()
    root = own_experiment.root
    lock = (root / "requirements.lock").read_text()
    (root / "requirements.lock").write_text(locked_block(lock, "uv") + locked_block(lock, "click"))
    based = (CONTAINERS / "Containerfile").read_text()
    header = dict(line.split(": ", 1) for line in parts[""].splitlines() if line)
    assert f"ARG BASE={header['From']}\n" in based
    copies = [
        f"COPY {line.strip()}{'/' * (root / line.split()[0]).is_dir()}\n"
        for line in parts["files"].splitlines()
        if line
    ]
    for name in ("post", "test", "runscript"):
        (root / "containers" / f"{name}.sh").write_text(
            "set -e\n" + parts["environment"] * (name == "runscript") + parts[name]
        )
    passed = [f"ENV {name}={os.environ[name]}\n" for name in ("PIP_INDEX_URL",) if name in os.environ]
    (root / "containers/Containerfile").write_text(
        f"FROM base\n{''.join(passed)}{''.join(copies)}COPY containers/*.sh /sections/\nRUN sh /sections/post.sh && sh /sections/test.sh\n"
    )
    docker.build("apptainer", root)
    done = docker(
        "run", "--rm", "--network=none", SOMEBODY, "apptainer", "sh", "/sections/runscript.sh", "labtrain", "--version"
    )
    assert done.stdout.startswith("labtrain, version")
    docker("rmi", "-f", "apptainer")
