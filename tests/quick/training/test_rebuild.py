"""States of optimizers that do not fit the model: one line for people, where torch's own code has failed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from labtrain.base.errors import ConfigError, LabtrainError
from labtrain.training.state.rebuild import Connector, explain_step, fitting

SAYS = "the state of optimizers and schedulers in the checkpoint does not fit the model: "


def stepped(kind: type[torch.optim.Optimizer], change: Callable[[dict[str, Any]], object], **options: Any) -> Any:
    """Return an optimizer that was loaded from the state of one that has made a step, after a change of that."""
    weight = torch.nn.Parameter(torch.ones(3, 5))
    weight.grad = torch.ones(3, 5)
    before, after = kind([weight], **options), kind([weight], **options)  # type: ignore[call-arg]
    before.step()
    state = before.state_dict()
    change(state)
    after.load_state_dict(state)
    return after


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("kind", "options", "key"), [(torch.optim.AdamW, {}, "exp_avg"), (torch.optim.Adagrad, {}, "sum"),
                                                      (torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer")])  # fmt: skip
@pytest.mark.parametrize("value", [torch.ones(5, 3), torch.ones(2, 3, 5), torch.ones(()), "text"], ids=repr)
def test_a_state_of_another_shape_is_one_line(kind: Any, options: Any, key: str, value: Any, foreach: bool) -> None:
    """No optimizer refuses it when it is loaded."""
    optimizer = stepped(kind, lambda state: state["state"][0].update({key: value}), foreach=foreach, **options)
    with pytest.raises(Exception, match=r".") as raised:
        optimizer.step()
    found = explain_step(raised.value)
    assert found is not None
    assert str(found.args[0]).startswith(SAYS)
    assert found.hint.startswith("restore the model; or resume=never")
    assert found.exit_code == 2


def test_what_other_code_raises_keeps_its_traceback() -> None:
    """The model's, in a closure of the optimizer's step too."""

    def closure() -> float:
        return float(torch.nn.Linear(2, 2)(torch.ones(3)).sum())

    optimizer = stepped(torch.optim.SGD, lambda state: None, lr=0.1)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step(closure)
    assert explain_step(raised.value) is None
    assert explain_step(KeyboardInterrupt()) is None


def test_a_state_of_other_groups_is_one_line() -> None:
    with pytest.raises(ConfigError, match=SAYS + "ValueError: loaded state dict contains a parameter group"), fitting():
        stepped(torch.optim.SGD, lambda state: state["param_groups"][0]["params"].append(1), lr=0.1)
    with pytest.raises(ConfigError, match="no step"), fitting():
        raise ConfigError("no step")


def connector(*, optimizers: int = 1, schedulers: int = 1, **loaded: Any) -> Connector:
    """Return that of a trainer with so many optimizers and schedulers, and a checkpoint."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    configs = [SimpleNamespace(scheduler=torch.optim.lr_scheduler.StepLR(sgd, 3)) for _ in range(schedulers)]
    trainer: Any = SimpleNamespace(optimizers=[sgd] * optimizers, lr_scheduler_configs=configs)
    found = Connector(trainer, Path("runs/x/checkpoints/step-0000000002"))
    found._loaded_checkpoint = {"optimizer_states": [{}], "lr_schedulers": [{}], **loaded}
    return found


def test_more_or_fewer_states_than_the_model_has_are_refused() -> None:
    connector().check_states()
    says = "it has {} optimizers and {} schedulers, the model has 1 optimizers and 1 schedulers"
    for loaded, counts in (
        ({"optimizer_states": []}, (0, 1)),
        ({"lr_schedulers": []}, (1, 0)),
        ({"optimizer_states": [{}, {}]}, (2, 1)),
    ):
        with pytest.raises(ConfigError, match=SAYS + says.format(*counts)):
            connector(**loaded).check_states()
    with pytest.raises(ConfigError, match="the model has 0 optimizers and 2 schedulers"):
        connector(optimizers=0, schedulers=2).check_states()


@pytest.mark.parametrize(
    "saved", [{"step_size": "x"}, {"base_lrs": 3}, {"base_lrs": [{}]}, {"_last_lr": {}}, {"last_epoch": [1]}], ids=repr
)
def test_a_scheduler_of_another_kind_is_refused_before_it_is_loaded(saved: dict[str, Any]) -> None:
    """Loading it takes anything, and a later step fails."""
    with pytest.raises(ValueError, match=f"{next(iter(saved))}.* of StepLR has another type"):
        connector(lr_schedulers=[saved]).restore_lr_schedulers()
    connector(lr_schedulers=[{"step_size": 3.0, "base_lrs": (torch.tensor(0.1),), "new": "x"}]).restore_lr_schedulers()


def test_what_cannot_be_put_back_is_one_line_that_names_the_checkpoint() -> None:
    """But for what the experiment's code raises, this file's say, and for errors that are none of the checkpoint's."""

    def failing(load: Callable[..., Any]) -> Connector:
        found = connector()
        found.trainer.strategy = SimpleNamespace(load_checkpoint=load)  # type: ignore[assignment]
        return found

    def raises(error: BaseException) -> Any:
        def load(*_: Any, **__: Any) -> None:
            raise error

        return load

    with pytest.raises(
        LabtrainError, match=r"cannot restore .*step-0000000002: InvalidVersion: .* \(.*\)\n\nhint"
    ) as raised:
        failing(lambda *_, **__: {"pytorch-lightning_version": 3})._restore_modules_and_callbacks("x")
    assert raised.value.hint.startswith("ask who wrote it; ")
    assert raised.value.exit_code == 2
    for error in (KeyError("x"), ConfigError("x"), OSError("x")):
        with pytest.raises(type(error)) as kept:
            failing(raises(error))._restore_modules_and_callbacks("x")
        assert kept.value is error
