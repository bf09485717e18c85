"""A real Slurm on 127.0.0.1: two nodes of two slots, and the experiment on it. As any user."""

import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import Experiment, Run, need
from tests.support.servers import free_ports, short_folder
from tests.support.waiting import PATIENCE_S, wait_until

NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve everywhere
# Some ten seconds of steps on two cores, so that there is a middle.
PORTABLE = ("determinism.mode=portable", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=none")
EPOCHS = "trainer.max_epochs=4"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")


class Slurm:
    """slurmctld, a slurmd a node, and munged, in a folder."""

    def __init__(self, folder: Path) -> None:
        os.environ["PATH"] += ":/usr/sbin"
        for program, package in (("munged", "munge"), ("slurmctld", "slurm-wlm"), ("slurmd", "slurm-wlm")):
            need(program, package)
        self.folder = folder
        self.sockets = (
            short_folder()
        )  # the steps' too: a daemon whose socket cannot be made holds the job back for ever
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("state", "log"):
            (self.folder / name).mkdir(parents=True)
        host, user, port = socket.gethostname().partition(".")[0], getpass.getuser(), free_ports(3)
        lines = {
            "ClusterName": "labtest",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": port,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.sockets}/munge.sock,cred_expire=5",  # a job that is requeued waits for it
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.sockets / "%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.%n.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerType": "sched/builtin",
            "SchedulerParameters": "sched_interval=1,batch_sched_delay=0,requeue_delay=1",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "ReturnToService": 2,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmdParameters": "config_overrides",
            "MessageTimeout": 100,  # a daemon of a busy machine that answers late is not a failed launch
            "SlurmdTimeout": 5,
            "KillWait": 5,
            "MinJobAge": 300,
        }
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        for number, node in enumerate(NODES, 1):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} CPUs=2 RealMemory=4000\n"
            )
        (self.folder / "slurm.conf").write_text(
            f"{text}PartitionName=test Nodes={','.join(NODES)} Default=YES MaxTime=1440 PriorityTier=1 GraceTime=30 State=UP\n"
            f"PartitionName=urgent Nodes={','.join(NODES)} MaxTime=1440 PriorityTier=9 PreemptMode=OFF State=UP\n"
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run(
            "munged", "munged", "--foreground", "--force", f"--socket={self.sockets}/munge.sock",
            *(f"--{option}={self.folder}/munge.{name}" for option, name in files.items()),
        )  # fmt: skip
        wait_until((self.sockets / "munge.sock").exists)
        self._run("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_until(self.ready)

    def clear(self, seconds: float = PATIENCE_S) -> None:
        """Cancel what a test has left, and wait until both nodes are free for the next one."""
        for node in set(NODES) - set(self.processes):
            self.start_node(node)
        self.run("scancel", f"--user={getpass.getuser()}")
        wait_until(lambda: not self.run("squeue", "--noheader") and self.ready(), seconds)

    def start_node(self, node: str) -> None:
        self._run(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node as a power failure would: its daemon, its steps' daemons, and what they started."""
        tasks = [process for process in psutil.process_iter() if self._runs_on(process, node)]
        steps = {parent for task in tasks for parent in task.parents() if parent.name() == "slurmstepd"}
        daemon = self.processes.pop(node)
        for process in (daemon, *steps, *tasks):  # in this order: nobody reports the end of the next
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()

    def _runs_on(self, process: psutil.Process, node: str) -> bool:
        with suppress(psutil.Error):
            variables = process.environ()
            return (variables.get("SLURM_CONF"), variables.get("SLURMD_NODENAME")) == (
                self.variables["SLURM_CONF"],
                node,
            )
        return False

    def stop(self) -> None:
        with suppress(Exception):
            self.clear(15)
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            process.wait()
        shutil.rmtree(self.sockets)

    def _run(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.txt").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(shutil.which(command[0])), *command[1:]],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.variables},
            )

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def ready(self) -> bool:
        """Return whether each node is idle and answers; one that does not is `idle*`."""
        return self.run("sinfo", "--noheader", "--Node", "--partition=test", "--format=%t").split() == ["idle"] * len(
            NODES
        )

    def submit(self, *command: str, cwd: Path, **variables: str) -> int:
        """Submit a batch script and return the job's number."""
        return int(self.run("sbatch", "--parsable", *command, cwd=cwd, **variables))

    def state(self, job: int) -> str:
        """Return a job's state: PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.field(job, "JobState")

    def field(self, job: int, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "show", "job", str(job)))
        assert found is not None
        return found[1]

    def ended(self, job: int) -> str:
        """Wait for a job's end and return its state."""
        wait_until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
        return self.state(job)

    def signal(self, job: int, name: str) -> None:
        self.run("scancel", f"--signal={name}", str(job))

    def hold_back(self, number: int) -> int:
        """Return how many tasks, of all steps that run now, have a signal blocked."""
        found = 0
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                of_a_task = process.environ().get("SLURM_STEP_ID") and process.parent().name() == "slurmstepd"
                if of_a_task and process.environ().get("SLURM_CONF") == self.variables["SLURM_CONF"]:
                    blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
                    found += blocked is not None and int(blocked[1], 16) >> (number - 1) & 1
        return found


@contextmanager
def patient(log: Path) -> Iterator[None]:
    """Show a job's output where waiting for it fails."""
    try:
        yield
    except (TimeoutError, AssertionError) as error:
        text = log.read_text(errors="replace")[-6000:] if log.exists() else "no output"
        raise AssertionError(f"{error}\n{text}") from error


def wait_for_steps(run_dirs: Path, steps: int) -> Path:
    """Wait until a run below a folder has trained so many steps; return its folder."""
    found: list[Path] = []

    def there() -> bool:
        found[:] = [path.parent for path in run_dirs.glob("*/trail.jsonl") if path.read_bytes().count(b"\n") >= steps]
        return bool(found)

    wait_until(there)
    return found[0]


def break_rank(experiment: Experiment, rank: int) -> None:
    """Have one rank raise at its fourth step."""
    model = experiment.root / "model.py"
    line = "        images, labels = batch  # (B, 1, 8, 8), (B,)\n"
    assert line in model.read_text()
    bad = f"        if self.global_step == 3 and self.global_rank == {rank}:\n            raise ArithmeticError('of rank {rank}')\n"
    model.write_text(model.read_text().replace(line, line + bad))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    server = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def cleared(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.clear()


@pytest.fixture(scope="module")
def alone(shared_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in one process, without Slurm."""
    return shared_experiment.train(*PORTABLE, EPOCHS, f"paths.runs={tmp_path_factory.mktemp('alone')}")


class Cluster:
    """The experiment on the cluster; what it prints is in `out`."""

    def __init__(self, slurm: Slurm, experiment: Experiment, folder: Path) -> None:
        self.slurm, self.root, self.runs, self.out = slurm, experiment.root, folder / "runs", folder / "out.txt"

    def submit(self, *overrides: str, options: tuple[str, ...] = TWO_NODES, **variables: str) -> int:
        script = (*options, f"--output={self.out}", "train.sbatch", *PORTABLE, f"paths.runs={self.runs}", *overrides)
        return self.slurm.submit(*script, cwd=self.root, PYTHON=sys.executable, **variables)

    def result(self) -> tuple[dict, str]:
        """Return the only run's receipt, and the digest that was printed."""
        ((folder, digest),) = re.findall(
            rf"^({re.escape(str(self.runs))}\S*) ([0-9a-f]{{64}})$", self.out.read_text(), re.M
        )
        return json.loads((Path(folder) / "receipt.json").read_text()), digest


@pytest.fixture
def cluster(slurm: Slurm, shared_experiment: Experiment, tmp_path: Path) -> Cluster:
    return Cluster(slurm, shared_experiment, tmp_path)
