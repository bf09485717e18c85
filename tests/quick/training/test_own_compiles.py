"""torch.compile in the experiment's code: exact in strict mode, or refused by file and line before the first step."""

from typing import Any

import pytest
import torch

from labtrain.base.errors import ConfigError
from labtrain.exact.determinism import run, set_run
from labtrain.training.guard import compiled
from labtrain.training.speed import COMPILED, own_compiles
from tests.support.exact import Runner, configure


def config(form: str, options: dict[str, Any], **more: Any) -> Any:
    found = configure("mlp", "even", **more)
    found["model"] = {"_target_": "tests.support.own_compile_models.Compiled", "form": form, "options": options}
    return found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "max-autotune"}, "torch.compile(mode='max-autotune')"),
        ({"mode": "reduce-overhead"}, "torch.compile(mode='reduce-overhead')"),
        ({"dynamic": True}, "torch.compile(dynamic=True)"),
        ({"backend": "cudagraphs"}, "torch.compile(backend='cudagraphs')"),
        ({"options": {"max_autotune": True}}, "torch.compile(options={'max_autotune': True})"),
        ({"options": {"triton.cudagraphs": True}}, "torch.compile(options={'triton.cudagraphs': True})"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_its_line(options: dict[str, Any], says: str, runner: Runner) -> None:
    runner.run(config("assigned", options), code=2)
    assert f"error: {says} in " in runner.said()
    assert "own_compile_models.py:" in runner.said()
    assert "hint: leave out " in runner.said()
    assert "Traceback" not in runner.said()
    assert not list(runner.folder.glob("runs/*/*"))


def test_portable_refuses_to_compile_for_a_cpu() -> None:
    set_run(seed=0, mode="portable", accelerator="cpu")
    try:
        with own_compiles("portable"), pytest.raises(ConfigError, match=r"torch.compile\(backend='inductor'\) in "):
            torch.compile(abs)
    finally:
        set_run(seed=0, mode="off", accelerator="cpu")


def test_a_module_that_was_compiled_before_is_found() -> None:
    """By torch's own function: in a notebook, or in mode warn; each form of one that is exact is not."""
    for compile_it in (lambda part: torch.compile(part, backend="eager"), in_place):
        model = torch.nn.ModuleDict({"net": compile_it(torch.nn.Linear(2, 2))})
        [(what, _)] = compiled(model)
        assert what.startswith("net was compiled by torch.compile before the training started, or in mode warn")
        with own_compiles("strict"):
            model = torch.nn.ModuleDict({"net": compile_it(torch.nn.Linear(2, 2))})
        assert list(compiled(model)) == []


def in_place(part: torch.nn.Module) -> torch.nn.Module:
    part.compile(backend="eager")
    return part


def test_torch_has_its_own_function_back_and_a_decorator_takes_arguments() -> None:
    before = torch.compile
    with run(seed=0, mode="strict", accelerator="cpu", threads=1, tf32=False), own_compiles("strict"):
        made = torch.compile(backend="eager")(abs)
        assert made in COMPILED
        assert torch.compile(abs, backend="eager") in COMPILED
        assert torch.compile(abs, disable=True) not in COMPILED
        with pytest.raises(ConfigError, match=r"test_own_compiles\.py:"):
            torch.compile(abs, dynamic=True)
    assert torch.compile is before
    with own_compiles("warn"):
        assert torch.compile is before
