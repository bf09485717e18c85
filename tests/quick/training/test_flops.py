"""FLOP/s of a training: the operations that a step of the model needs, counted once, without an effect on a result."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from labtrain.record.trail import read_history_lines
from labtrain.review.report.data import read_history
from labtrain.training import lightning
from labtrain.training.sharded.flops import FlopCount, UncountedError
from tests.support.exact import Runner, configure, outcome
from tests.support.flop_models import twice

# exact_worker.MLP, of layers 36 x 24 and 24 x 3, for a sample: forward, gradients of both weights, and the gradient of
# the second layer's input. The first layer's input needs none.
OF_MLP = 2 * (36 * 24 + 24 * 3) + 2 * (36 * 24 + 24 * 3) + 2 * 24 * 3
ROWS = 5


def counted(forward: Callable[[], Tensor]) -> int:
    with FlopCount() as found:
        loss = forward().sum()
        found.is_backward = True
        loss.backward()
    return found.total


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(36, 24), nn.GELU(), nn.Linear(24, 3))


def history(folder: Path, *, world: int = 1, target: str = "exact_worker.MLP", **more: Any) -> tuple[Any, list[Any]]:
    """Train; return what must be the same, without the run's name, and the lines that measured a throughput."""
    options, lines = more.pop("options", {}), more.pop("lines", {})
    config = configure("mlp", "uneven", **more)
    config["model"] = {"_target_": f"tests.support.{target}", **options}
    config["callbacks"]["lines"] = {"_target_": "tests.support.flop_models.Lines", **lines}
    folder.mkdir(exist_ok=True)
    run_dir = Runner(folder).run(config, world=world)
    found = outcome(run_dir)
    del found["run_id"]
    assert run_dir is not None
    return found, [line for line in read_history_lines(run_dir) if line["samples_per_s"] is not None]


def assert_flops_per_sample(lines: list[Any], expected: float) -> None:
    """Samples are kept to a tenth a second, and operations to one a second."""
    assert len(lines) > 5
    for line in lines:
        assert abs(line["flops_per_s"] - line["samples_per_s"] * expected) <= 0.05 * expected + 1


def test_a_layer_needs_2mnk_forward_and_for_each_gradient() -> None:
    inputs = torch.randn(ROWS, 36)
    assert counted(lambda: net()(inputs)) == ROWS * OF_MLP
    assert counted(lambda: net()(inputs.requires_grad_())) == ROWS * (OF_MLP + 2 * 36 * 24)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_does_not_count(reentrant: bool) -> None:
    inputs = torch.randn(ROWS, 36, requires_grad=True)
    again = counted(lambda: checkpoint(net(), inputs, use_reentrant=reentrant))
    assert again == counted(lambda: net()(inputs))


def test_a_convolution_counts() -> None:
    found = counted(lambda: nn.Conv2d(3, 4, 3)(torch.randn(2, 3, 8, 8)))
    assert found == 2 * (2 * 2 * 4 * 6 * 6 * 3 * 3 * 3)  # forward, and the weight's gradient


@pytest.mark.parametrize("heads", [3, 1], ids=["as many heads of keys", "fewer"])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_the_same_in_each_kernel(backend: SDPBackend, heads: int) -> None:
    """The flash kernel computes the scores again in its backward, which does not count."""
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, heads, 6, 8, requires_grad=True)
    with sdpa_kernel(backend):
        found = counted(lambda: scaled_dot_product_attention(query, key, key, enable_gqa=heads < 3))
    assert found == 3 * 2 * (2 * 2 * 3 * 5 * 6 * 8)  # two products forward, four backward


def test_a_compiled_model_counts_as_it_is_in_eager_mode() -> None:
    """Without hooks of the counter's own on modules, about which torch would warn."""
    inputs = torch.randn(ROWS, 36)
    compiled = torch.compile(net(), backend="eager")
    warnings.simplefilter("error")
    assert counted(lambda: compiled(inputs)) == ROWS * OF_MLP
    whole = net()
    whole.compile(backend="eager")
    assert counted(lambda: whole(inputs)) == ROWS * OF_MLP


def test_an_operation_without_a_formula_is_an_error() -> None:
    """Torch would count 0 for it, and the sum would be too small."""
    with pytest.raises(UncountedError, match=r"labtrain_tests\.twice"):
        counted(lambda: twice(net()(torch.randn(ROWS, 36))))
    with pytest.raises(UncountedError):
        counted(lambda: nn.LSTM(4, 8)(torch.randn(7, 2, 4))[0])
    assert counted(lambda: net()(torch.randn(ROWS, 36))) == ROWS * OF_MLP  # nothing is left of the failed ones


@pytest.mark.parametrize(
    ("world", "shards", "accumulate", "precision"), [(1, 4, 1, "32-true"), (2, 2, 2, "bf16-mixed")]
)
def test_a_training_tells_the_operations_of_its_samples(
    world: int, shards: int, accumulate: int, precision: str, tmp_path: Path
) -> None:
    """Of all devices, whatever the shards, the accumulated batches and the smaller last batch."""
    trainer = {"accumulate_grad_batches": accumulate, "precision": precision}
    _, lines = history(tmp_path, world=world, determinism={"shards": shards}, trainer=trainer, lines={"peak": 10**9})
    assert_flops_per_sample(lines, OF_MLP)
    assert {line["peak_flops_per_s"] for line in lines} == {10**9 * world}
    (run_dir,) = tmp_path.glob("runs/*/*")
    found = read_history(run_dir)
    assert found.flops.y.tolist() == [line["flops_per_s"] for line in lines]
    assert found.utilisation.y.tolist() == [round(line["flops_per_s"] / 10**7 / world, 4) for line in lines]


def test_no_result_depends_on_the_count(tmp_path: Path) -> None:
    """Weights, state, metrics and trail are the same: counted, not counted, and with a counter that fails."""
    found = [history(tmp_path / fault, lines={"fault": fault}) for fault in ("counted", "none", "broken")]
    assert found[0][0] == found[1][0] == found[2][0]
    assert_flops_per_sample(found[0][1], OF_MLP)
    assert {line["flops_per_s"] for _, lines in found[1:] for line in lines} == {None}


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ("flop_models.Custom", {}),
        ("exact_worker.MLP", {"determinism": {"shards": 1}}),
        ("exact_worker.MLP", {"data": {"loader": "stateful"}}),
    ],
    ids=["an operation without a formula", "no shards", "a stream"],
)
def test_what_cannot_be_counted_is_unknown(target: str, more: dict[str, Any], tmp_path: Path) -> None:
    _, lines = history(tmp_path, target=target, **more)
    assert {(line["flops_per_s"], line["peak_flops_per_s"]) for line in lines} == {(None, None)}


@pytest.mark.parametrize("shards", [4, 1])
def test_flops_per_batch_of_the_model_comes_first(shards: int, tmp_path: Path) -> None:
    """A batch has 8 samples, and the last one 5."""
    options, determinism = {"flops_per_batch": 8e6}, {"shards": shards}
    _, lines = history(tmp_path, target="flop_models.Told", options=options, determinism=determinism)
    assert_flops_per_sample(lines, 1e6)


def test_a_property_that_fails_is_as_none(tmp_path: Path) -> None:
    _, lines = history(tmp_path, target="flop_models.Fails")
    assert_flops_per_sample(lines, OF_MLP)


class _Device:
    type = "cuda"


@pytest.mark.parametrize(
    ("precision", "tf32", "teraflops"),
    [("32-true", False, 19.5), ("32-true", True, 156), ("bf16-mixed", False, 312), ("16-true", False, 312)],
)
def test_the_peak_is_that_of_the_precision(
    precision: Any, tf32: bool, teraflops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an A100; and an unknown GPU has none, without a warning."""
    trainer: Any = lightning.pl.Trainer(logger=False, accelerator="cpu", precision=precision)
    monkeypatch.setattr(type(trainer.strategy), "root_device", _Device())
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._is_ampere_or_later", lambda: True)
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high" if tf32 else "highest")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert lightning.peak_of_device(trainer) == teraflops * 1e12
    for name in ("NVIDIA B1000", "NVIDIA GeForce RTX"):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _, name=name: name)
        assert lightning.peak_of_device(trainer) is None
