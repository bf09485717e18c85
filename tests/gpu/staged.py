"""An exchange through the host, so that two processes can share one GPU. For the tests alone.

NCCL refuses two ranks on one card, and gloo sends no CUDA tensors point to point. So gloo sends copies in the host's
memory. The processes are two nodes of one device each, since Lightning refuses `devices=[0, 0]`. On a CPU the same code
copies, too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ddp
from torch import Tensor

from labtrain.training import lightning

COLLECTIVES = ("broadcast", "all_reduce", "all_gather", "all_gather_into_tensor")  # the first argument is the result
exchanges = 0  # of this process, through the host


def begin(rank: int, world: int, port: int) -> None:
    """Connect the processes, and let what labtrain and Lightning exchange from now on pass through the host."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for name in COLLECTIVES:
        setattr(dist, name, _collective(getattr(dist, name)))
    dist.batch_isend_irecv = _point_to_point(dist.batch_isend_irecv)
    lightning._sync_module_states = ddp._sync_module_states = _sync_module_states


def _host(value: Any) -> Any:
    """Return copies in the host's memory."""
    if isinstance(value, list | tuple):
        return [_host(each) for each in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _back(copies: Any, originals: Any) -> None:
    if isinstance(originals, Tensor):
        with torch.no_grad():
            originals.copy_(copies)
        return
    for copy, original in zip(copies, originals, strict=True):
        _back(copy, original)


def _collective(usual: Callable[..., object]) -> Callable[..., object]:
    def staged(result: Any, *arguments: Any, async_op: bool = False, **options: Any) -> None:
        global exchanges
        exchanges += 1
        assert not async_op
        copies = _host(result)
        usual(copies, *map(_host, arguments), **options)
        _back(copies, result)

    return staged


class _Works:
    """The exchange of a batch; the result is back on the device after `wait`."""

    def __init__(self, works: list[dist.Work], copies: list[tuple[Tensor, Tensor]], sent: list[Tensor]) -> None:
        self.works, self.copies, self.sent = works, copies, sent

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for copy, original in self.copies:
            original.copy_(copy)


def _point_to_point(usual: Callable[[list[dist.P2POp]], list[dist.Work]]) -> Callable[[list[dist.P2POp]], list[_Works]]:
    def staged(operations: list[dist.P2POp]) -> list[_Works]:
        global exchanges
        exchanges += 1
        made, copies, sent = [], [], []
        for each in operations:
            copy = _host(each.tensor)
            made.append(dist.P2POp(each.op, copy, each.peer))
            if each.op is dist.irecv:
                copies.append((copy, each.tensor))
            else:
                sent.append(copy)
        return [_Works(usual(made), copies, sent)]

    return staged


def _sync_module_states(module: torch.nn.Module) -> None:
    left_out = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in left_out:
            dist.broadcast(tensor, src=0)
