"""Optimizers that hold an optimizer, as people write them, and models that step them: by hand, and automatically."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, https://arxiv.org/abs/2010.01412: its base optimizer shares its groups."""

    def __init__(self, parameters: Any, base: Callable[..., Any], rho: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.ascents = 0

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * group["rho"] / (norm + 1e-12) / (1 + 0.01 * self.ascents))
        self.ascents += 1
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
        return loss


class Lookahead(torch.optim.Optimizer):
    """Every k steps it goes half of the way from slow weights, https://arxiv.org/abs/1907.08610."""

    def __init__(self, optimizer: Any, k: int = 3) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.k, self.steps = optimizer, k, 0
        self.param_groups, self.fast_state = optimizer.param_groups, optimizer.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.steps % self.k == 0:
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)
        return loss


class Centralised(torch.optim.Optimizer):
    """Subtracts each gradient's mean, https://arxiv.org/abs/2004.01461, and lets another optimizer step."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    p.grad.sub_(p.grad.mean(1, keepdim=True))
        self.inner.step()
        return loss


def made(kind: str, parameters: Any, lr: float = 0.01) -> Any:
    """Return an optimizer of a kind."""
    if kind == "sam":
        return SAM(parameters, torch.optim.SGD, lr=0.05, momentum=0.9)
    if kind == "sam, adamw":
        return SAM(parameters, torch.optim.AdamW, lr=0.01)
    if kind == "lookahead":
        return Lookahead(torch.optim.AdamW(parameters, lr=0.01))
    if kind == "lookahead of sam":
        return Lookahead(made("sam", parameters))
    if kind == "centralised":
        return Centralised(torch.optim.RMSprop(parameters, lr=1e-3))
    if kind == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)
    return torch.optim.Adam(parameters, lr=lr)


class Automatic(pl.LightningModule):
    """Lets Lightning step such an optimizer, and a scheduler of its groups."""

    def __init__(self, kind: str, dtype: str = "float32", dropout: float = 0.1) -> None:
        super().__init__()
        self.kind = kind
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Dropout(dropout), nn.Linear(24, 3))
        self.net.to(getattr(torch, dtype))

    def loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0].to(self.net[1].weight.dtype)), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = made(self.kind, self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class ByHand(Automatic):
    """Steps it in one of these ways: step, closure, methods (of SAM), inner, own (an attribute)."""

    def __init__(self, kind: str, way: str = "step", lr: float = 0.01, **options: Any) -> None:
        super().__init__(kind, **options)
        self.automatic_optimization = False
        self.way = way
        if way == "own":
            self.own: Any = {"body": made(kind, self.net[1].parameters(), lr)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.log("loss", loss)
            return loss

        if self.way == "closure":
            return optimizer.step(closure)
        loss = closure()
        if self.way == "methods":
            optimizer.first_step(zero_grad=True)
            self.manual_backward(self.loss(batch))
            optimizer.second_step(zero_grad=True)
        elif self.way == "inner":
            optimizer.inner.step()
        else:
            optimizer.step()
        if self.way == "own":
            self.own["body"].step()
        return loss

    def on_train_epoch_end(self) -> None:
        scheduler: Any = self.lr_schedulers()
        scheduler.step()

    def configure_optimizers(self) -> Any:
        if self.way == "own":
            optimizer: Any = torch.optim.SGD(self.net[4].parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        return super().configure_optimizers()


class Counting(ByHand):
    """Counts in a hook that runs once for all shards, in the middle of their step; the loss depends on it."""

    def __init__(self) -> None:
        super().__init__("adam", "step", dropout=0.0)
        self.steps, self.norms = 0, torch.zeros(2)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) / (1 + self.steps + self.norms.sum())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps += 1
        self.norms[self.steps % 2] = self.net[1].weight.grad.norm()  # type: ignore[index,union-attr]


class Faulty(ByHand):
    """What cannot run once for all shards, a fault at a time."""

    def __init__(self, fault: str) -> None:
        super().__init__("sam", "methods")
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        if self.fault == "backward":
            hook = self.net[4].weight.register_post_accumulate_grad_hook(lambda _: optimizer.base_optimizer.step())
            self.manual_backward(self.loss(batch))
            hook.remove()
        elif self.fault == "differs":
            optimizer.zero_grad(bool(batch[1][0]))
            optimizer.first_step(f"{batch[0][0].sum()}")
        elif self.fault == "writes":
            self.manual_backward(self.loss(batch))
            optimizer.base_optimizer.state[self.net[4].bias]["momentum_buffer"] = self.net[4].bias.grad * 2
            optimizer.base_optimizer.step()
        else:
            self.automatic_optimization = False
            optimizer.step(lambda: batch[0])
