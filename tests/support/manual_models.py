"""Models with manual optimization, as people write them: GANs, actor and critic, accumulation by hand."""

from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional


class GAN(pl.LightningModule):
    """The GAN of Lightning's documentation, on small images: two optimizers that are toggled, an attribute, BatchNorm."""

    def __init__(self, critics: int = 1, penalty: float = 0.0, clip: float | None = None, toggle: bool = True,
                 clamp: float | None = None) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.critics, self.penalty, self.clip, self.toggle = critics, penalty, clip, toggle
        self.clamp = clamp
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 36))
        self.discriminator = nn.Sequential(nn.Linear(36, 16), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(16, 1))
        self.accuracy = torchmetrics.Accuracy("binary")

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.real = images = batch[0].flatten(1)
        first, second = self.optimizers()  # type: ignore[misc]
        z = torch.randn(len(images), 4).type_as(images)
        for _ in range(self.critics):
            if self.toggle:
                self.toggle_optimizer(second)
            self.generated = self(z)
            real, fake = self.discriminator(images), self.discriminator(self.generated.detach())
            loss = self._adversarial(real, 1) + self._adversarial(fake, 0)
            if self.penalty:
                loss = loss + self.penalty * self._penalty(images, self.generated.detach())
            second.zero_grad()
            self.manual_backward(loss)
            if self.clip:
                self.clip_gradients(second, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            second.step()
            if self.clamp:
                for parameter in self.discriminator.parameters():
                    parameter.data.clamp_(-self.clamp, self.clamp)
            if self.toggle:
                self.untoggle_optimizer(second)
            self.log("d_loss", loss, on_step=True, on_epoch=True)
        self.accuracy(fake.detach().sigmoid().flatten(), torch.zeros(len(images), dtype=torch.int64))
        self.log("d_accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.toggle:
            self.toggle_optimizer(first)
        made = self(z)
        loss = self._adversarial(self.discriminator(made), 1) + (made.mean(0) - self.real.mean(0)).square().sum()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        if self.toggle:
            self.untoggle_optimizer(first)
        self.log("g_loss", loss, on_step=True, on_epoch=True)

    def _adversarial(self, scores: Tensor, truth: int) -> Tensor:
        return functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, truth))

    def _penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        mixed = (real + torch.rand(len(real), 1).type_as(real) * (fake - real)).requires_grad_()
        (gradient,) = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)
        return (gradient.norm(2, 1) - 1).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norm = sum(p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        self.log("norm", norm, on_step=True, on_epoch=False)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/real", self.discriminator(batch[0].flatten(1)).mean())

    def configure_optimizers(self) -> Any:
        kinds = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), 2e-3, betas=(0.5, 0.999)) for part in kinds], []


class ByHand(pl.LightningModule):
    """Accumulates over batches by hand, clips with torch's function, steps a scheduler; returns its loss."""

    def __init__(self, every: int = 2, closure: bool = False, dtype: str = "float32") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every, self.closure = every, closure
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 3)).to(getattr(torch, dtype))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = functional.cross_entropy(self.net(batch[0].to(self.net[1].weight.dtype)), batch[1])
            self.manual_backward(loss / self.every)
            self.log("loss", loss)
            return loss

        if self.closure:
            optimizer.zero_grad()
            return {"loss": optimizer.step(closure=closure)}
        loss = closure()
        if (batch_idx + 1) % self.every == 0:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", functional.cross_entropy(self.net(batch[0].to(self.net[1].weight.dtype)), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]


class Uncounted(ByHand):
    """Steps the optimizer itself, not what Lightning makes of it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.optimizer.step()


class ActorCritic(pl.LightningModule):
    """Two losses that are propagated together by torch's own backward; a plateau that a loss of the step decides."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.actor, self.critic = nn.Linear(36, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, hidden = self.optimizers(), self.body(batch[0].flatten(1)).tanh()
        policy = torch.distributions.Categorical(logits=self.actor(hidden))
        action = policy.sample()
        reward, value = (action == batch[1]).float(), self.critic(hidden).flatten()
        losses = [-(policy.log_prob(action) * (reward - value.detach())).mean(), (value - reward).square().mean()]
        optimizer.zero_grad()  # type: ignore[union-attr]
        torch.autograd.backward(losses)
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step(losses[1])  # type: ignore[union-attr,call-arg]
        self.log("reward", reward.mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.RMSprop(self.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)]


class Refused(GAN):
    """What shards cannot do together, a fault at a time."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def training_step(self, batch: Any, batch_idx: int) -> None:
        _first, second = self.optimizers()  # type: ignore[misc]
        images = batch[0].flatten(1)
        loss = self.discriminator(images).square().mean()
        second.zero_grad()
        self.manual_backward(loss)
        if self.fault == "noise":
            for parameter in self.discriminator.parameters():
                parameter.grad.add_(torch.randn_like(parameter))  # type: ignore[union-attr]
        if self.fault != "places" or batch[1][0] > 0:
            second.step()
        if self.fault == "clamp":
            for parameter in self.discriminator.parameters():
                parameter.data.clamp_(-float(images[0, 0].abs()), 0.01)
        if self.fault == "raises" and batch_idx == 1:
            raise ZeroDivisionError("in a shard's step")
