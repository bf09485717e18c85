"""Lightning's cluster environment of a training, from what the launcher set (ranks.py).

Processes that cannot meet are refused here, within seconds. torch would wait for its timeout of half an hour. If ranks
are lost during the training, the launcher knows why and acts. A rank that fails ends the job with its own traceback. A
node that fails makes the launcher start the job again.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import psutil
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from labtrain.base.errors import EXIT_LOST, DeviceError, LostError
from labtrain.base.signals import Stopped, Wishes
from labtrain.record.ranks import Ranks

ELSEWHERE = "192.0.2.1"  # an unused address (RFC 5737); the route to it shows this machine's outgoing interface
POLL_S = 0.05
# What gloo, TCPStore and NCCL report when a peer is gone.
BROKEN = re.compile(
    r"[Cc]onnection|Read error|Write error|Broken pipe|remote (process|error)|ncclRemoteError|recv|socket"
)


class Launched(ClusterEnvironment):
    """Processes that srun or torchrun started: labtrain reads the launcher's variables and sets none."""

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
    """Return the cluster environment of a training. Without a launcher it is Lightning's own, which starts processes.

    Raises:
        DeviceError: the processes cannot meet.
    """
    if ranks is None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the default looks up the host's name, and may hang
        return LightningEnvironment()
    address = resolve(ranks)
    if ranks.nodes > 1 and address.startswith("127.") and address != "127.0.0.1":
        address = ELSEWHERE  # Debian resolves its own name to 127.0.1.1, which other machines cannot reach
    if interface := interface_to(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if dist.is_initialized():  # an earlier training in this process did that
        return Launched(ranks)
    if ranks.rank == 0 and ranks.launcher == "srun":  # torchrun itself listens on this port
        refuse_port_in_use(ranks.port)
    if ranks.launcher == "torchrun" and ranks.nodes == 1:
        begin_round(ranks, backend="nccl" if accelerator == "gpu" else "gloo")
    return Launched(ranks)


def begin_round(ranks: Ranks, *, backend: str) -> None:
    """Connect the processes after torchrun restarted them, because one of them failed.

    torchrun keeps its store (torch 2.9: elastic/rendezvous/dynamic_rendezvous.py), with the addresses of processes that
    are gone. So each round uses its own names there. The number of the round may differ between nodes.
    """
    if (number := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        store, rank, world = next(rendezvous("env://", ranks.rank, ranks.world))
        store = PrefixStore(f"round-{number}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def resolve(ranks: Ranks) -> str:
    """Return the IP address where the ranks meet.

    Raises:
        DeviceError: this machine cannot resolve its name.
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
    """Return the network interface of this machine that reaches an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the kernel looks up the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    names = [name for name, addresses in psutil.net_if_addrs().items() for each in addresses if each.address == own]
    return names[0] if names else None


def is_loss(error: BaseException) -> bool:
    """Return whether an error says that the connection to another rank broke."""
    exchange = isinstance(error, dist.DistNetworkError | dist.DistBackendError) or "gloo" in str(error)
    return exchange and isinstance(error, RuntimeError) and BROKEN.search(str(error)) is not None


def ended_rank(launcher: object, *, seconds: float) -> tuple[int, int] | None:
    """Return a rank that failed, and its exit code, of those that Lightning's launcher started in this process.

    A rank that has only lost contact with another one does not count.

    Args:
        launcher: of the strategy.
        seconds: how long to wait for one; a rank closes its connections before it ends.
    """
    started: list[subprocess.Popen[bytes]] = getattr(launcher, "procs", [])
    deadline_s = time.monotonic() + seconds
    while (failed := _failed(started)) is None and started and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return failed


def _failed(started: list[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    codes = enumerate((process.poll() for process in started), 1)
    return next(((rank, code) for rank, code in codes if code not in (None, 0, EXIT_LOST)), None)


def observe(
    started: list[subprocess.Popen[bytes]], *, patience_s: Callable[[], float], tell: Callable[[int, int], object]
) -> None:
    """End this process if a rank failed that it started and that it still waits for after some time.

    Args:
        started: the other ranks.
        patience_s: how long this process may take to notice, and to save.
        tell: called with the error before the end.
    """
    while (failed := _failed(started)) is None:
        if all(process.poll() == 0 for process in started):
            return
        time.sleep(1)
    time.sleep(patience_s())
    tell(*failed)
    os.kill(os.getpid(), signal.SIGKILL)


def lost_rank(rank: int, code: int) -> LostError:
    """Return the error for a rank that ended before the training."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lost = LostError(f"rank {rank} {how}", hint="the same command resumes")
    lost.exit_code = 1
    return lost


def explain_loss(error: BaseException, wishes: Wishes) -> BaseException:
    """Replace an error of the exchange with other ranks by one for people; return any other error unchanged.

    An error before the first step may come from this machine, and is returned unchanged. If this process was asked to
    stop, the other ranks were asked too, and stopped first.
    """
    if not is_loss(error):
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
