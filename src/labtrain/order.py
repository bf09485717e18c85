"""The order of samples: epoch e's is a function of (seed, e) and nothing else."""

import torch

from labtrain.determinism import derive_seed


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> torch.Tensor:
    """Return a permutation of 0..num_samples-1, shape (num_samples,), int64.

    `torch.randperm` on a generator of its own: the same on every platform, and O(num_samples) in memory.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)
