"""`trainer.strategy=fsdp`: weights, gradients and moments spread over the ranks, by torch's FSDP2.

Lightning's ModelParallelStrategy trains, and expects a `configure_model`. If the model has none, labtrain shards each
block of a list of blocks (nn.ModuleList, nn.Sequential) by itself, then the rest. So the ranks gather the weights of
one block at a time. labtrain does not change a model's own `configure_model`, which calls `fully_shard`. Results depend
on the number of devices, but not on kills and resumes.

https://docs.pytorch.org/docs/2.9/distributed.fsdp.fully_shard.html; Lightning 2.6: strategies/model_parallel.py.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from labtrain.base.contracts import State
from labtrain.base.errors import ConfigError
from labtrain.checkpoints.format import in_parts, is_spread, load_folder

BLOCK_PARAMETERS = 1_000_000  # smaller blocks are not worth a separate exchange
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FullySharded(ModelParallelStrategy):
    """FSDP2; each rank saves and loads its part.

    Args:
        world: number of processes over all nodes.
    """

    def __init__(self, world: int) -> None:
        super().__init__(data_parallel_size=world, tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        super().setup_environment()
        module = cast(pl.LightningModule, self.lightning_module)
        if not is_overridden("configure_model", module):
            configure = partial(shard, module, self.device_mesh["data_parallel"])
            module.configure_model = configure  # type: ignore[method-assign]

    def lightning_module_state_dict(self) -> State:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(self._sharded)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> State:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(self._sharded, _plain(optimizer))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, object]:
        folder = Path(checkpoint_path)
        if not folder.is_dir() or not in_parts(folder):
            raise ConfigError(
                f"{folder} holds a whole state: trainer.strategy=fsdp resumes only from its own checkpoints",
                hint="trainer.strategy=auto; or labtrain.load_weights in the model, and resume=never",
            )
        like = {
            "state_dict": self.lightning_module_state_dict(),
            "optimizer_states": [self.optimizer_state(optimizer) for optimizer in self.optimizers],
        }
        return load_folder(folder, like)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        weights = checkpoint["state_dict"]
        options = StateDictOptions(
            strict=strict, full_state_dict=not is_spread(weights)
        )  # initial.py has whole weights
        set_model_state_dict(self._sharded, weights, options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self._sharded, _plain(optimizer), state)

    @property
    def _sharded(self) -> nn.Module:
        assert self.model is not None
        return self.model


def shard(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Shard a model over the ranks of a mesh: each larger block by itself, then the rest.

    Raises:
        ConfigError: a parameter has no dimension that could be cut.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return  # already sharded for the fit, which precedes the test
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"{name} is a scalar: trainer.strategy=fsdp cuts each parameter along its first dimension",
                hint=f"give {name} the shape (1,)",
            )
    for block in reversed(large_blocks(module)):  # inner blocks first
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for step in STEPS:  # Lightning calls these, not `forward`
        register_fsdp_forward_method(module, step)


def large_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the elements of a model's lists that are sharded by themselves, outer ones first.

    Skips a block that shares a parameter with the rest of the model: sharding would untie them.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    blocks = []
    for name, block in module.named_modules():
        parent = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(parent, nn.ModuleList | nn.Sequential) or isinstance(block, nn.ModuleList | nn.ModuleDict):
            continue  # torch does not shard containers; their elements follow
        size = sum(parameter.numel() for parameter in block.parameters())
        own = all(place.startswith(f"{name}.") for parameter in block.parameters() for place in places[id(parameter)])
        if size >= BLOCK_PARAMETERS and own:
            blocks.append(block)
    return blocks


def _plain(optimizer: object) -> torch.optim.Optimizer:
    return cast(torch.optim.Optimizer, optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)
