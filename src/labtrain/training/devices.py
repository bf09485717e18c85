"""The devices of a training, and the strategy that trains on them."""

import os

import torch
from lightning.pytorch.strategies import Strategy

from labtrain.base.errors import ConfigError, DeviceError
from labtrain.base.signals import Wishes
from labtrain.record.config import too_many_devices
from labtrain.record.identity import EXACT_STRATEGIES, SHARDED_STRATEGY, Config, shards_in_use, world_size
from labtrain.record.ranks import RESTARTED
from labtrain.training.sharded.fsdp import FullySharded
from labtrain.training.sharded.strategy import ExactDDP, ExactSingleDevice


def choose_accelerator(config: Config) -> tuple[str, int | list[int] | str]:
    """Return `gpu`, `cpu` or a name that only Lightning knows; and the devices of a node: a number, or GPU numbers.

    Raises:
        DeviceError: the machine has too few devices, or they lack the precision.
        ConfigError: more devices than shards or samples.
    """
    asked = config["trainer"]
    wanted, devices, precision = asked["accelerator"], asked["devices"], asked["precision"]
    gpus = torch.cuda.device_count()
    # Lightning makes torch query the driver (safe in forks). Without a driver each optimizer step would query it.
    if not gpus:
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    accelerator = ("gpu" if gpus else "cpu") if wanted == "auto" else {"cuda": "gpu"}.get(wanted, wanted)
    if devices == "auto":
        devices = gpus if accelerator == "gpu" else 1 if accelerator == "cpu" else devices
    if accelerator == "gpu":
        if config["failures"]["elastic"] and RESTARTED in os.environ:
            devices = _left(devices, gpus)
        _check_gpus(devices, gpus, asked=asked["devices"])
    elif accelerator == "cpu":
        _check_cpu(devices, precision)
    shards, batch_size, world = shards_in_use(config), config["data"]["batch_size"], world_size(config, devices)
    if shards is not None and world > shards:
        raise too_many_devices(world, shards)
    if batch_size < world:
        raise ConfigError(
            f"data.batch_size={batch_size} is less than one sample for each of {world} devices",
            hint=f"data.batch_size={world} or more",
        )
    return str(accelerator), devices


def _left(devices: int | list[int] | str, gpus: int) -> int | list[int] | str:
    """Return those of a node's devices that are left; the same if none is, for the error."""
    if isinstance(devices, list):
        return [number for number in devices if number < gpus] or devices
    return min(devices, gpus) or devices if isinstance(devices, int) else devices


def _check_gpus(devices: int | list[int] | str, gpus: int, *, asked: object) -> None:
    numbers = devices if isinstance(devices, list) else range(devices if isinstance(devices, int) else 1)
    missing = [number for number in numbers if number >= gpus]
    if not missing:
        return
    if gpus == 1 and "SLURM_STEP_ID" in os.environ:  # a task sees its own alone
        hint = "sbatch --gpus-per-node=N, without --gpus-per-task: each process picks its GPU from those of the node"
    elif gpus:
        hint = f"trainer.devices={gpus}, or trainer.accelerator=cpu"
    else:
        hint = "trainer.accelerator=cpu; labtrain doctor shows why no GPU is found"
    found = f"this machine has {gpus} GPU{'s' if gpus != 1 else ''}"
    raise DeviceError(f"trainer.devices={asked} asks for GPU {missing[0]}, but {found}", hint=hint)


def _check_cpu(devices: int | list[int] | str, precision: object) -> None:
    if isinstance(devices, list):
        raise DeviceError(
            f"trainer.devices={devices} names GPUs: on a CPU it must be a number of processes",
            hint=f"trainer.devices={len(devices)}",
        )
    if precision in ("16-mixed", "16-true", "16"):
        raise DeviceError(
            f"trainer.precision={precision}: fp16 with loss scaling needs a GPU",
            hint="trainer.precision=bf16-mixed",
        )


def plain_because(config: Config) -> str:
    """Return why the bits of this training depend on the number of devices."""
    if config["determinism"]["shards"] is None:
        why = "determinism.shards=null"
    elif config["trainer"]["strategy"] not in EXACT_STRATEGIES:
        why = f"trainer.strategy={config['trainer']['strategy']}"
    else:
        why = f"trainer.accelerator={config['trainer']['accelerator']}"
    whose = "FSDP2" if config["trainer"]["strategy"] == SHARDED_STRATEGY else "Lightning's own strategy"
    return f"{why}: {whose} trains (results then depend on the number of devices)"


def make_strategy(config: Config, accelerator: str, devices: object, wishes: Wishes) -> Strategy | None:
    """Return labtrain's strategy: exact, on one device or several, or fully sharded. None: Lightning's own."""
    shards, world = shards_in_use(config), world_size(config, devices)
    sync = config["trainer"]["sync_batchnorm"]
    if shards is None:
        return FullySharded(world) if config["trainer"]["strategy"] == SHARDED_STRATEGY else None
    if world > 1:
        return ExactDDP(shards=shards, wishes=wishes, sync_batchnorm=sync)
    number = devices[0] if isinstance(devices, list) else 0
    device = torch.device("cuda", number) if accelerator == "gpu" else torch.device("cpu")
    return ExactSingleDevice(device, shards=shards, wishes=wishes, sync_batchnorm=sync)
