"""What each switch of `speed` does to the bits: promise 3 in real trainings, by digest; and what is refused."""

import copy
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from labtrain.base.errors import ConfigError
from labtrain.record import receipt
from labtrain.record.config import check
from labtrain.record.digests import digest
from labtrain.review.replay import _config_of
from labtrain.training.speed import called, put_channels_last, recompute_blocks
from tests.conftest import QUICK, Experiment
from tests.support.exact import Runner, configure, outcome, tell
from tests.support.exact_worker import CNN, GPT
from tests.support.speed_models import Counting, Drawn, Normed, Stack

pytest_plugins = ["tests.support.compiled"]


def bits(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a training came to, without its name."""
    return {key: value for key, value in found.items() if key != "run_id"}


# -------------------------------------------------------------------------------------------------------------- compile


def test_metrics_and_lists_are_not_compiled_and_their_elements_are() -> None:
    parts = list(called(GPT()))
    assert sorted(type(part).__name__ for part in parts) == [
        "Embedding", "Embedding", "GPT", "Linear", "TransformerEncoderLayer", "TransformerEncoderLayer",
    ]  # fmt: skip


def test_without_a_compiler_nothing_begins(experiment: Experiment) -> None:
    run = experiment.train("speed.compile=true", "paths.runs=runs", *QUICK, env={"CXX": "no-such-compiler"}, code=2)
    assert "speed.compile needs a compiler: no-such-compiler was not found" in run.err
    assert "hint: apt-get install g++" in run.err
    assert not Path("runs").exists()


# ----------------------------------------------------------------------------------------------- recomputed activations


def test_recomputed_activations_change_no_bit(runner: Runner, other: Runner) -> None:
    """Nor do processes and a kill: attention with dropout; and the checkpoint is one of the same names."""
    reference = bits(outcome(runner.run(configure("gpt"))))
    config = configure("gpt", speed={"checkpoint_activations": True})
    assert bits(outcome(runner.run(config))) == reference
    assert bits(tell(other, config, world=2, story="killed", seed=1)) == reference


def seeded(module: nn.Module, inputs: torch.Tensor) -> str:
    """Return the digest of the gradients of a step."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    module.zero_grad()
    module(inputs).square().sum().backward()
    return digest({name: parameter.grad for name, parameter in module.named_parameters()})


def test_a_recomputation_draws_the_same_from_all_three_generators() -> None:
    module, inputs = Stack(Drawn(), Drawn()), torch.ones(3, 4)
    reference, after = seeded(module, inputs), (random.random(), np.random.rand(), torch.rand(()).item())
    names = list(module.state_dict())
    recompute_blocks(module, print)
    assert seeded(module, inputs) == reference
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == after
    assert list(module.state_dict()) == names
    assert [block.calls for block in module.blocks] == [3, 3]
    copied = copy.deepcopy(module)  # as a callback that averages weights does
    with torch.no_grad():
        copied.blocks[0].layer.weight.zero_()
    assert seeded(copied, inputs) != reference
    module.eval()
    seeded(module, inputs)
    assert [block.calls for block in module.blocks] == [4, 4]


def test_blocks_with_batchnorm_are_left_alone_and_said() -> None:
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module, said = Stack(normed, Drawn()), []
    recompute_blocks(module, said.append)
    assert said == ["speed.checkpoint_activations: blocks.0 not recomputed: BatchNorm would be updated twice"]
    seeded(module, torch.rand(3, 4))
    assert normed[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Normed(), "the model has none"),  # its list holds single layers
        (Stack(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), "each has BatchNorm"),
    ],
)
def test_a_model_without_a_block_to_recompute_is_refused(module: nn.Module, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recompute_blocks(module, print)


def test_a_block_that_changes_a_buffer_is_refused() -> None:
    module = Stack(Counting())
    recompute_blocks(module, print)
    with pytest.raises(ConfigError, match=r"blocks\.0 changes a buffer in each call"):
        module(torch.ones(3, 4))


# ----------------------------------------------------------------------------------------------------- fused optimizers


def test_a_fused_optimizer_that_lightning_would_not_clip_is_refused(runner: Runner) -> None:
    """Before the first step; where nothing is mixed, it clips."""
    config = configure("cnn", "clipped", "bf16-mixed")
    config["model"] = {"_target_": "tests.support.speed_models.Fused", "optimizer": "AdamW"}
    runner.run(config, code=2)
    assert "bf16-mixed: Lightning cannot clip for a fused AdamW" in runner.said()
    assert not list(runner.folder.glob("runs/*/*"))
    config["trainer"]["precision"] = "32-true"
    assert outcome(runner.run(config))["trail"]


# ------------------------------------------------------------------------------------------------- channels_last, TF32


def test_channels_last_is_exact(runner: Runner, other: Runner) -> None:
    """Other bits than without, perhaps; the same however it ran: moments are laid out as before a kill."""
    config = configure("cnn", speed={"channels_last": True})
    reference = outcome(runner.run(config))
    assert tell(other, config, world=2, story="killed twice", seed=2) == reference


def test_a_digest_is_of_what_weights_are_not_of_how_they_lie() -> None:
    module = CNN().eval()
    before, images = digest(module), torch.rand(2, 1, 6, 6)
    assert not module.net[:5](images).is_contiguous(memory_format=torch.channels_last)
    put_channels_last(module)
    assert digest(module) == before
    assert module.net[:5](images).is_contiguous(memory_format=torch.channels_last)  # images follow the weights
    with pytest.raises(ConfigError, match="no 4-D weight"):
        put_channels_last(GPT())


def test_tf32_is_said_to_be_nothing_to_a_cpu(runner: Runner) -> None:
    plain, with_it = (
        runner.run(configure("mlp", speed={"tf32": on}, trainer={"max_epochs": 1})) for on in (False, True)
    )
    assert plain != with_it
    found = [receipt.read(run_dir) for run_dir in (plain, with_it)]
    assert [each["determinism"]["float32_matmul_precision"] for each in found] == ["highest", "highest"]
    assert [each["determinism"]["notes"] for each in found] == [[], ["speed.tf32 has no effect on a CPU"]]
    assert found[0]["results"] == found[1]["results"]
    assert "warning: speed.tf32 has no effect on a CPU" in runner.said()


def test_the_flags_are_set_and_read_without_a_warning_of_torchs() -> None:
    """And are those of each training, not of the one before it in the same process; afterwards as they were."""
    code = (
        "import torch\n"
        "from labtrain.exact import determinism as d\n"
        "for tf32 in (True, False, True):\n"
        "    with d.run(seed=0, mode='strict', accelerator='gpu', threads=1, tf32=tf32):\n"
        "        print(d.flags()['float32_matmul_precision'])\n"
        "print(torch.get_float32_matmul_precision())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["high", "highest", "high", "highest"]


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"speed": {"compiler": True}}, "unknown key speed.compiler.*similar keys: speed.compile"),
        ({"speed": {"compile": "fastest"}}, "speed.compile=fastest: must be true, false or one of default, reduce-overhead"),
        ({"speed": {"compile": 1}}, "speed.compile=1: must be true, false or"),
        ({"speed": {"tf32": "high"}}, "speed.tf32=high: must be true or false"),
        ({"gpu_stats": 10}, "gpu_stats=10: must be true or false"),
        ({"speed": {"compile": True}, "determinism": {"mode": "portable"}}, "compiles for this CPU.*speed.compile=false"),
        ({"speed": {"compile": "max-autotune-no-cudagraphs"}}, "by timing.*speed.compile=true, or determinism.mode=warn"),
        ({"speed": {"compile": "reduce-overhead"}}, "CUDA graphs.*determinism.shards=1"),
        ({"speed": {"channels_last": True}, "trainer": {"strategy": "fsdp"}}, "FSDP2 needs contiguous weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_torch_is_there(more: dict[str, Any], says: str) -> None:
    config = configure("mlp", **more)
    with pytest.raises(ConfigError) as error:
        check(config)
    assert re.search(says, str(error.value), re.DOTALL), error.value


def test_a_run_of_before_there_were_these_keys_can_be_trained_again(tmp_path: Path) -> None:
    old = configure("mlp")
    recorded = {"config": {key: value for key, value in old.items() if key not in ("speed", "gpu_stats")},
                "determinism": {"any_number_of_devices": True}}  # fmt: skip
    recorded["config"]["logger"] = {"wandb": {"settings": {"mode": "online", "base_url": "http://127.0.0.1:1"}}}
    config, _ = _config_of(recorded, tmp_path, {}, keep_trail=True, sandboxed=False)
    assert config["logger"] == {"wandb": {"mode": "offline"}}, "no service is told of a replay"
    check(config)
    assert config["speed"] == old["speed"]
