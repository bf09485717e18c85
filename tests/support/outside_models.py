"""Code that changes what is no part of the model while it trains: for test_trainer_state.py, a kind a class."""

from typing import Any

import numpy as np
import torch

from tests.support import exact_worker
from tests.support.resume_models import Average, Small

LATE = 3  # the step after which the change comes


class Sets(Small):
    """Changes a setting of the Trainer, which an argument names, as `name=value`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == LATE:
            for name, value in self.settings.items():
                setattr(self.trainer.fit_loop if name == "max_epochs" else self.trainer, name, value)


class Pulls(Small):
    """Trains by what its data module has counted."""

    def on_train_batch_end(self, *_: Any) -> None:
        data: Any = self.trainer.datamodule
        data.steps += 1
        data.seen.append(self.head.bias.detach().norm())
        data.average.update(self.head)
        self.factor = 1 / (1 + data.steps + sum(data.seen).item() + data.average.shadow[0].norm().item())
        if self.global_step == LATE:
            data.large = data.large + 1
            data.noise.random()


class Counting(exact_worker.Data):
    """Keeps numbers, tensors and an object; and what is too large for a checkpoint, or cannot be in one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.steps, self.seen = 0, []
        self.average = Average(torch.nn.Linear(8, 3))
        self.large, self.noise = torch.zeros(2**19), np.random.default_rng(0)


class Lookahead(torch.optim.SGD):
    """Every k-th step goes half of the way from slow weights that it keeps in a list; k grows."""

    def __init__(self, parameters: Any, lr: float) -> None:
        parameters = list(parameters)
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.k, self.steps = 2, 0
        self.slow = [parameter.detach().clone() for parameter in parameters]
        self.views = [parameter.detach() for parameter in parameters]  # the weights themselves

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            self.k += 1
            for slow, view in zip(self.slow, self.views, strict=True):
                slow.lerp_(view, 0.5)
                view.copy_(slow)
        return loss


class Wraps(torch.optim.Optimizer):
    """Has an optimizer of its own, whose momentum its state_dict does not hold."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base.step(closure)


class Optimized(Small):
    """Is trained by one of these."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return globals()[self.optimizer](self.parameters(), lr=0.05)


class Grows(torch.utils.data.Dataset):
    """Noise that hooks make harder; counts its loads."""

    def __init__(self, size: int) -> None:
        self.images, self.level, self.blur, self.loads = exact_worker.Images(size), 0, "none", 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        image, label = self.images[index]
        return image * 0.5**self.level, label


class Curriculum(exact_worker.Data):
    """Its training data are of the kind above."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.train = Grows(len(self.train))


class Teaches(Small):
    """Makes the data harder after each epoch; or after each batch."""

    def __init__(self, each: str) -> None:
        super().__init__()
        self.each = each

    def on_train_epoch_end(self) -> None:
        if self.each == "epoch":
            self._harder()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.each == "batch":
            self._harder()

    def _harder(self) -> None:
        data: Any = self.trainer.datamodule
        data.train.level += 1
        data.train.blur = f"{data.train.level} pixels"


class Rollouts(exact_worker.Data):
    """Its training data are tensors, which a hook writes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.train = torch.utils.data.TensorDataset(self.train.images, self.train.labels)


class Plays(Small):
    """Makes the data of each epoch with its weights, as an agent plays episodes."""

    def on_train_epoch_start(self) -> None:
        data: Any = self.trainer.datamodule
        images, _ = data.train.tensors
        images.copy_(torch.randn_like(images) + next(self.parameters()).detach().mean())


class Scales(Small):
    """Has a hook of its optimizer keep a factor of the learning rate in it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        optimizer.register_step_pre_hook(self.scale)
        return optimizer

    def scale(self, optimizer: Any, *_: Any) -> None:
        optimizer.scale = getattr(optimizer, "scale", 1.0) * 0.97
        optimizer.param_groups[0]["lr"] = 0.1 * optimizer.scale
