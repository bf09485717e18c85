"""Counts the floating-point operations of a step, forward and backward: matrix products, convolutions and attention.

These are the operations of the model, as in model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix
B): what activation checkpointing computes again does not count.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from labtrain.base.contracts import Options

ATEN = torch.ops.aten
TORCHS_OWN = frozenset({"aten", "prim", "prims", "profiler"})  # namespaces of operations
# Operations of torch without a formula, which can be most of a model: torch counts 0 for them.
WITHOUT_FORMULA = (
    "_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer", "_grouped_mm", "_scaled_grouped_mm", "_sparse_mm",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip


class UncountedError(Exception):
    """An operation has no formula, so that the sum would be too small."""


class FlopCount:
    """Counts in a block, in eager mode.

    Attributes:
        is_backward: whether the backward has begun; the block sets it.
        total: what was counted.

    Raises:
        UncountedError: in the block, at an operation without a formula: one of WITHOUT_FORMULA, or of another library.
            torch.utils.flop_counter.register_flop_formula gives it one.
    """

    def __init__(self) -> None:
        self.is_backward = False
        self._counter, self._stack = FlopCounterMode(display=False), ExitStack()
        self._counter.mod_tracker = _OneModule()  # type: ignore[assignment]
        formulas = {**self._counter.flop_registry, **_ATTENTION}
        self._counter.flop_registry = {each: self._once(formula) for each, formula in formulas.items()}
        for name in WITHOUT_FORMULA:
            if (each := getattr(ATEN, name, None)) is not None:
                self._counter.flop_registry.setdefault(each, _refuse)

    @property
    def total(self) -> int:
        return self._counter.get_total_flops()

    def __enter__(self) -> "FlopCount":
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # code that compiles: compiled code has no operations to count
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._counter)
            stack.enter_context(_RefuseUnknown())  # type: ignore[no-untyped-call]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _once(self, formula: Callable[..., int]) -> Callable[..., int]:
        """Return a formula that is 0 for what is computed again: in the backward, with gradients enabled."""

        def count(*arguments: object, **options: object) -> int:
            return 0 if self.is_backward and torch.is_grad_enabled() else formula(*arguments, **options)

        return count


class _OneModule:
    """Counts all modules as one, in place of torch's tracker, which adds hooks to each module of the process."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _RefuseUnknown(TorchDispatchMode):
    """Raises at operations of other libraries that have no formula."""

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[object] = (), kwargs: Options | None = None
    ) -> object:
        if func.namespace not in TORCHS_OWN and func.overloadpacket not in flop_registry:
            raise UncountedError(f"{func} has no formula")
        return func(*args, **(kwargs or {}))


def _refuse(*_: object, **__: object) -> int:
    raise UncountedError("torch has no formula for an operation")


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> int:
    """Count two products. There may be fewer heads of keys than of queries, which torch's formula refuses."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    _: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: object, **___: object
) -> int:
    """Count four products. Torch's formula has a fifth: the kernel computes the scores again."""
    return 2 * _attention(query, key, value)


def _four_of_five(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *arguments, **options: formula(*arguments, **options) * 4 // 5


_ATTENTION: dict[object, Callable[..., int]] = {
    ATEN._scaled_dot_product_efficient_attention: _attention,
    ATEN._scaled_dot_product_flash_attention: _attention,
    ATEN._scaled_dot_product_cudnn_attention: _attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN._scaled_dot_product_efficient_attention_backward: _attention_backward,
    ATEN._scaled_dot_product_flash_attention_backward: _attention_backward,
    ATEN._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    # of sequences of several lengths
    ATEN._flash_attention_backward: _four_of_five(flop_registry[ATEN._flash_attention_backward]),
    ATEN._efficient_attention_backward: _four_of_five(flop_registry[ATEN._efficient_attention_backward]),
}
