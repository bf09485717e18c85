"""How the processes of a training come together: what a launcher said (ranks.py) as Lightning's cluster environment.

What cannot come together is refused here, in seconds: torch would wait for it until its timeout of half an hour. Where
the others are lost in the middle, the launcher knows why and is left to act: a rank that failed is to take the job down
with its own traceback, but a node that failed is to have the job started again.
"""

import os
import re
import socket

import psutil
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from labtrain.base.errors import DeviceError, LostError
from labtrain.base.signals import Stopped, Wishes
from labtrain.record.ranks import Ranks

ELSEWHERE = "192.0.2.1"  # an address of nobody (RFC 5737): the way to it is the way out of this machine
# What gloo, TCPStore and NCCL say of a peer that is gone.
BROKEN = re.compile(
    r"[Cc]onnection|Read error|Write error|Broken pipe|remote (process|error)|ncclRemoteError|recv|socket"
)


class Launched(ClusterEnvironment):
    """Processes that srun or torchrun started: all is said, nothing is set."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.ranks.address

    @property
    def main_port(self) -> int:
        return self.ranks.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.ranks.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.ranks.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.ranks.local_rank

    def node_rank(self) -> int:
        return self.ranks.node


def make_environment(ranks: Ranks | None, *, accelerator: str) -> ClusterEnvironment:
    """Return the cluster environment of a training; where nothing launched it, Lightning's own, which starts processes.

    Raises:
        DeviceError: the processes cannot come together.
    """
    if ranks is None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # by itself gloo looks up the host's name, and may hang
        return LightningEnvironment()
    address = resolve(ranks)
    if ranks.nodes > 1 and address.startswith("127.") and address != "127.0.0.1":
        address = ELSEWHERE  # Debian's own name is 127.0.1.1 to itself, which the others cannot reach
    if interface := interface_to(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if dist.is_initialized():  # by an earlier training of this process
        return Launched(ranks)
    if ranks.rank == 0 and ranks.launcher == "srun":  # torchrun itself listens there
        refuse_port_in_use(ranks.port)
    if ranks.launcher == "torchrun" and ranks.nodes == 1:
        begin_round(ranks, backend="nccl" if accelerator == "gpu" else "gloo")
    return Launched(ranks)


def begin_round(ranks: Ranks, *, backend: str) -> None:
    """Bring the processes together where torchrun started them anew, after one of them failed.

    torchrun keeps its store (torch 2.9: elastic/rendezvous/dynamic_rendezvous.py), with the addresses of those that are
    gone: each round is to have names of its own there. Its number is not the same on all of several nodes.
    """
    if (number := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        store, rank, world = next(rendezvous("env://", ranks.rank, ranks.world))
        store = PrefixStore(f"round-{number}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def resolve(ranks: Ranks) -> str:
    """Return the IP address where the ranks meet.

    Raises:
        DeviceError: its name is not known on this machine.
    """
    try:
        return str(socket.getaddrinfo(ranks.address, ranks.port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise DeviceError(
            f"{os.uname().nodename} cannot resolve the node {ranks.address}, where all {ranks.world} processes must"
            f" meet: {error.strerror}",
            hint=f"getent hosts {ranks.address}; or set MASTER_ADDR=ADDRESS before {ranks.launcher}",
        ) from error


def refuse_port_in_use(port: int) -> None:
    """Refuse a port on which another process of this machine listens."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DeviceError(
                f"port {port} of {os.uname().nodename}, where all processes must meet, is not available:"
                f" {error.strerror}",
                hint=f"MASTER_PORT={port + 1}, before srun; ss -ltnp 'sport = :{port}' shows which process uses it",
            ) from error


def interface_to(address: str) -> str | None:
    """Return the network interface of this machine from which an address is reached."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the kernel looks up the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = [name for name, addresses in psutil.net_if_addrs().items() for each in addresses if each.address == own]
    return names[0] if names else None


def explain_loss(error: BaseException, wishes: Wishes) -> BaseException:
    """Return what an error of the exchange with other processes comes to; any other error as it is.

    Before the first step it may be one of this machine, and is left as it is. Where this process was asked to stop, so
    were the others, who were faster.
    """
    exchange = isinstance(error, dist.DistNetworkError | dist.DistBackendError) or "gloo" in str(error)
    if not exchange or not isinstance(error, RuntimeError) or not BROKEN.search(str(error)):
        return error
    if wishes.signum:
        return Stopped(wishes.signum, saved=False)
    if not wishes.begun:
        return error
    last = str(error).strip().splitlines()[-1]
    return LostError(
        f"lost contact with the other ranks: {last}",
        hint="the error of another rank says why; the same command resumes",
    )
