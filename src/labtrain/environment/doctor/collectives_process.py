"""One process of the doctor's check of NCCL: sends known numbers between all GPUs of this machine, and measures it.

It prints JSON lines as kernels_process.py does. With gloo it runs on CPUs.

Run: python -m labtrain.environment.doctor.collectives_process cuda RANK WORLD_SIZE FILE
"""

import datetime
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from labtrain.environment.doctor.kernels_process import run, said, same

SIZE_BYTES, TIMES = {"cuda": 256 << 20, "cpu": 4 << 20}, 5
TIMEOUT_S = 30


def all_reduce(device: torch.device) -> str:
    """Add what all ranks hold."""
    ranks = dist.get_world_size()
    numbers = torch.full((SIZE_BYTES[device.type] // 4,), dist.get_rank() + 1, dtype=torch.int32, device=device)
    dist.all_reduce(numbers)
    same(numbers, torch.full_like(numbers, ranks * (ranks + 1) // 2, device="cpu"), "all-reduce")
    seconds = timed(lambda: dist.all_reduce(numbers), device)
    # As nccl-tests count it: each byte crosses a link 2 (n - 1) / n times.
    return f"{2 * (ranks - 1) / ranks * SIZE_BYTES[device.type] / seconds / 1e9:.1f} GB/s bus bandwidth"


def send_and_receive(device: torch.device) -> str:
    """Send to the next rank and receive from the previous one."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = torch.full((SIZE_BYTES[device.type] // 4,), rank, dtype=torch.int32, device=device)
    theirs = torch.empty_like(mine)

    def exchange() -> None:
        after, before = (rank + 1) % ranks, (rank - 1) % ranks
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, theirs, before)]
        ):
            work.wait()

    exchange()
    same(theirs, torch.full_like(mine, (rank - 1) % ranks, device="cpu"), "message")
    return f"{SIZE_BYTES[device.type] / timed(exchange, device) / 1e9:.1f} GB/s in each direction"


def peer_copies(device: torch.device) -> str:
    """Copy from this GPU to each other one, and say with which it shares memory."""
    count = dist.get_world_size()
    numbers = torch.arange(1 << 20, device=device)
    peers = []
    for other in range(count if device.type == "cuda" else 0):
        if other != device.index:
            same(numbers.to(torch.device("cuda", other)), torch.arange(1 << 20), f"copy to GPU {other}")
            peers += [str(other)] if torch.cuda.can_device_access_peer(device.index, other) else []
    return f"direct to GPU {', '.join(peers)}" if peers else "through the host's memory"


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a piece of work takes, on average."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(TIMES):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / TIMES


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(where: str, rank: int, ranks: int, file: str) -> None:
    """Run all checks with the other ranks."""
    said(begin="start")
    device = torch.device("cuda", rank) if where == "cuda" else torch.device(where)
    if where == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if where == "cuda" else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    said(name="start", status="ok", found="")
    backend = "NCCL" if where == "cuda" else "gloo"
    run(f"{backend} all-reduce", all_reduce, device)
    run(f"{backend} send/recv", send_and_receive, device)
    run("P2P copies", peer_copies, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
