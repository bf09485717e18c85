"""Sums of sparse gradients, such as those of `nn.Embedding(sparse=True)`: added dense, and sparse again afterwards.

An optimizer such as SparseAdam changes only the rows that the gradient has. So the sum has the rows that any shard has,
even those that add up to zero.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ABSENT, DENSE, SPARSE = 0.0, 1.0, 2.0  # a shard's gradient of a parameter


class SparseRows:
    """The rows of sparse gradients in one step, by the number of the parameter."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}
        self._of_shard: set[int] = set()

    def dense(self, number: int, gradient: Tensor) -> Tensor:
        """Return a shard's gradient as a dense tensor, and note the rows of a sparse one."""
        if gradient.layout == torch.strided:
            return gradient
        gradient = gradient.coalesce()
        self._of_shard.add(number)
        if number not in self._rows:
            self._rows[number] = torch.zeros(len(gradient), dtype=torch.int32, device=gradient.device)
        self._rows[number][gradient.indices()[0]] = 1
        return gradient.to_dense()

    def kind(self, number: int) -> float:
        """Return whether the shard's gradient, made dense, was sparse."""
        return SPARSE if number in self._of_shard else DENSE

    def end_shard(self) -> None:
        """Begin to take the gradients of another shard."""
        self._of_shard.clear()

    def __bool__(self) -> bool:
        return bool(self._rows)

    def of_all(
        self, kinds_SP: Sequence[Sequence[float]], parameters: Sequence[Tensor], world: int
    ) -> dict[int, Tensor]:
        """Return the rows that any shard of any rank has; every rank calls it, with the same kinds.

        Args:
            kinds_SP: of each shard's gradients; a gradient that some shard has dense is dense.
            parameters: in the order of their numbers.
            world: the number of processes.
        """
        found: dict[int, Tensor] = {}
        for number, column in enumerate(zip(*kinds_SP, strict=True)):
            if SPARSE not in column or DENSE in column:
                continue
            rows = self._rows.get(number)
            if rows is None:
                like = parameters[number]
                rows = torch.zeros(len(like), dtype=torch.int32, device=like.device)
            if world > 1:
                dist.all_reduce(rows, dist.ReduceOp.MAX)
            found[number] = rows
        return found


def sparse(gradient: Tensor, rows: Tensor) -> Tensor:
    """Return the given rows of a dense gradient as a sparse one."""
    indices = rows.nonzero().T
    return torch.sparse_coo_tensor(indices, gradient[indices[0]], gradient.shape, is_coalesced=True)
