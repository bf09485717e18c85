"""This process's rank, from the variables of srun or torchrun; and what rank 0 tells the process that started it.

No torch.

srun: the variables of the step, because the job may be larger (https://slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT
VARIABLES"). torchrun: https://docs.pytorch.org/docs/2.9/elastic/run.html.
"""

import mmap
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from labtrain.base.errors import ConfigError
from labtrain.record.identity import Config

FIRST_PORT, PORTS = 15000, 10000  # chosen by job id, as in Lightning, and step id
FRUITLESS_RESTARTS = 3
RESTARTED = "LABTRAIN_RESTARTED"  # how a rank died, in the environment of the next start


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process's place among the processes of one training.

    Attributes:
        launcher: srun or torchrun.
        rank: 0 to world - 1.
        local_rank: rank within its node; the number of its GPU.
        node: 0 to nodes - 1.
        address: of rank 0, the rendezvous address.
        port: the rendezvous port.
        name: of this start: the same in all ranks and after a requeue, new in the next start; empty: unknown.
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    node: int
    nodes: int
    address: str
    port: int
    name: str


def find_ranks(variables: Mapping[str, str] = os.environ) -> Ranks | None:
    """Read the launcher's variables; None if no launcher started this process.

    Raises:
        ConfigError: nodes have different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in variables:
        world, per_node = int(variables["WORLD_SIZE"]), int(variables["LOCAL_WORLD_SIZE"])
        if world % per_node:
            raise uneven(world, "torchrun --nproc-per-node=N, the same N on each node")
        name = variables["TORCHELASTIC_RUN_ID"]
        return Ranks(
            launcher="torchrun",
            rank=int(variables["RANK"]),
            world=world,
            local_rank=int(variables["LOCAL_RANK"]),
            node=int(variables["GROUP_RANK"]),
            nodes=world // per_node,
            address=variables["MASTER_ADDR"],
            port=int(variables["MASTER_PORT"]),
            name="" if name == "none" else name,
        )
    if in_slurm_step(variables) and (world := int(variables["SLURM_STEP_NUM_TASKS"])) > 1:
        if "," in variables["SLURM_STEP_TASKS_PER_NODE"]:  # uneven: 2,1; even: 2(x2)
            raise uneven(world, "srun --ntasks-per-node=N")
        job, step = int(variables["SLURM_JOB_ID"]), int(variables["SLURM_STEP_ID"])  # step ids restart after a requeue
        return Ranks(
            launcher="srun",
            rank=int(variables["SLURM_PROCID"]),
            world=world,
            local_rank=int(variables["SLURM_LOCALID"]),
            node=int(variables["SLURM_NODEID"]),
            nodes=int(variables["SLURM_STEP_NUM_NODES"]),
            address=variables.get("MASTER_ADDR") or first_node(variables["SLURM_STEP_NODELIST"]),
            port=int(variables.get("MASTER_PORT") or FIRST_PORT + (job + 331 * step) % PORTS),
            name=f"{job}-{step}" if step else str(job),
        )
    return None


def own_rank() -> int:
    """Return the rank of this process; 0 if no launcher started it."""
    ranks = find_ranks()
    return ranks.rank if ranks else 0


def uneven(world: int, hint: str) -> ConfigError:
    """Return the error for nodes with different numbers of processes."""
    return ConfigError(f"{world} processes are not evenly distributed over the nodes", hint=hint)


def first_node(nodes: str) -> str:
    """Return the first name of a Slurm list of nodes: `gpu-a` of `gpu-a,gpu-b`, `n08-ib` of `n[08-11,14]-ib,m3`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def in_slurm_step(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether srun started this process, directly: not in a batch script or an interactive shell."""
    shell = variables.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning's names for it
    return "SLURM_STEP_ID" in variables and "SLURM_PROCID" in variables and not shell


def alone(variables: Mapping[str, str]) -> dict[str, str]:
    """Return variables without the launcher's, for a process that is not one of its ranks."""
    launchers = ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
    return {name: value for name, value in variables.items() if name not in launchers}


def restarted() -> bool:
    """Return whether this is a restart, after a requeue or a failure."""
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return RESTARTED in os.environ or any(count != "0" for count in counts)


def adopt(config: Config, ranks: Ranks | None) -> None:
    """Set `trainer.devices` and `trainer.num_nodes` to what the launcher started.

    Raises:
        ConfigError: the user set them to something else, or there are several nodes and no launcher.
    """
    trainer = config["trainer"]
    if ranks is None:
        if isinstance(trainer["num_nodes"], int) and trainer["num_nodes"] > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer['num_nodes']}, but no launcher started processes on other nodes",
                hint="srun python train.py in a Slurm job, or torchrun on each node (docs/guides/cluster.md)",
            )
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        if tasks > 1 and not in_slurm_step():
            sys.stderr.write(
                f"warning: this Slurm job has {tasks} tasks, but srun did not start this process: it trains alone"
                " (srun python train.py starts all)\n"
            )
        return
    per_node = ranks.world // ranks.nodes
    said: tuple[object, int] = (trainer["devices"], trainer["num_nodes"])
    devices = len(said[0]) if isinstance(said[0], list) else said[0]
    if said != (1, 1) and not (devices in ("auto", per_node) and said[1] in (1, ranks.nodes)):
        raise ConfigError(
            f"trainer.devices={said[0]} trainer.num_nodes={said[1]}, but {ranks.launcher} started {ranks.world}"
            f" process{'es' if ranks.world > 1 else ''} on {ranks.nodes} node{'s' if ranks.nodes > 1 else ''}",
            hint="leave both out: labtrain takes them from the launcher",
        )
    if not isinstance(trainer["devices"], list):
        trainer["devices"] = per_node
    trainer["num_nodes"] = ranks.nodes


def wants_requeue(signum: int) -> bool:
    """Return whether the job must be requeued after a signal: after SIGUSR1, and after SIGTERM if Slurm preempts it.

    Slurm does not requeue a preempted job that ends by itself before Slurm kills it.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or signum == signal.SIGUSR1:
        return job is not None
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["scontrol", "show", "job", "--oneliner", job]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
        return signum == signal.SIGTERM and re.search(r"\bPreemptTime=(?!None|N/A|Unknown)\S", said) is not None
    return False


def requeue(*, starts: int, progress: bool) -> None:
    """Requeue this Slurm job, and print the result.

    Args:
        starts: how many starts of this run did at least one step.
        progress: whether this start did. A job whose time limit is too short for one step is not requeued for ever.
    """
    job = os.environ["SLURM_JOB_ID"]
    if not progress and int(os.environ.get("SLURM_RESTART_COUNT", "0")) - starts >= FRUITLESS_RESTARTS:
        sys.stderr.write(
            f"warning: job {job} is not requeued: its time limit is too short for one step (sbatch --time)\n"
        )
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
        error = " ".join(done.stderr.split()) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as failure:
        error = str(failure)
    if error:
        sys.stderr.write(f"warning: Slurm did not requeue job {job}: {error} (sbatch --requeue allows it)\n")
    else:
        sys.stderr.write(f"job {job} was requeued\n")


class Beacon:
    """Memory that rank 0 of a training shares with the process that started it (launch/restarts.py), also when it dies.

    It holds numbers and a text: the step that this start began from, the last finished step, the exit code of the rank
    that died, the process that may outlive rank 0, whether the rank hung and was killed by labtrain, and how it died.
    """

    NUMBERS = struct.Struct("<5q")
    SIZE_BYTES = 4096
    VARIABLE = "LABTRAIN_BEACON"  # the number of its file descriptor

    def __init__(self, memory: mmap.mmap, descriptor: int | None = None, *, is_read: bool = False) -> None:
        self.memory = memory
        self.descriptor = descriptor  # to pass it on
        self.is_read = is_read  # by a process that starts the training again

    @classmethod
    def make(cls) -> tuple["Beacon", int]:
        """Return a new one, and a file descriptor for the training's process."""
        descriptor = os.memfd_create("labtrain-beacon")
        os.ftruncate(descriptor, cls.SIZE_BYTES)
        beacon = cls(mmap.mmap(descriptor, cls.SIZE_BYTES))
        beacon._put(-1, -1, 0, 0, 0)
        return beacon, descriptor

    @classmethod
    def find(cls) -> "Beacon":
        """Return the one that the starting process made, once; else a new one, which other processes may share."""
        try:
            descriptor = int(os.environ.pop(cls.VARIABLE, ""))
            memory = mmap.mmap(descriptor, cls.SIZE_BYTES)
        except (OSError, ValueError):  # this process was not started by the one that made it
            beacon, descriptor = cls.make()
            beacon.descriptor = descriptor
            return beacon
        os.set_inheritable(descriptor, False)
        return cls(memory, descriptor, is_read=True)

    def begin(self, step: int, *, heir: int) -> None:
        """Tell the step that this start begins from, and the process that outlives rank 0 to save its copy; 0: none."""
        self._put(step, step, 0, heir, 0)

    def advance(self, step: int) -> None:
        """Tell the last finished step."""
        struct.pack_into("<q", self.memory, 8, step)

    def fail(self, why: str, code: int, *, hung: bool = False) -> None:
        """Tell how a rank died, so that the training may be started again. The first that tells it knows best."""
        if self.why:
            return
        self._put(self.begun, self.step, code, self.heir, hung)
        text = why.encode()[: self.SIZE_BYTES - self.NUMBERS.size - 1]
        self.memory[self.NUMBERS.size : self.NUMBERS.size + len(text) + 1] = text + b"\0"

    @property
    def begun(self) -> int:
        """The step that this start began from; -1 before the training begins."""
        return self._number(0)

    @property
    def step(self) -> int:
        """The last finished step; -1 before the training begins."""
        return self._number(1)

    @property
    def code(self) -> int:
        """The exit code of the rank that died."""
        return self._number(2)

    @property
    def heir(self) -> int:
        """The process that outlives rank 0 to save its copy; 0: none."""
        return self._number(3)

    @property
    def hung(self) -> bool:
        """Whether the rank that died did not go on, and was killed for that."""
        return bool(self._number(4))

    @property
    def why(self) -> str:
        """How a rank died; empty if the training has not told it."""
        return self.memory[self.NUMBERS.size :].split(b"\0")[0].decode(errors="replace")

    def _number(self, index: int) -> int:
        return int(self.NUMBERS.unpack_from(self.memory)[index])

    def _put(self, *numbers: int) -> None:
        self.NUMBERS.pack_into(self.memory, 0, *numbers)
