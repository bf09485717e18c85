"""The structure of a training's state: labtrain checks a checkpoint against it before a training resumes.

A form describes a value:

=================== ===================================================================================
a type, a union     an instance
a function          a value for which it returns true
[form]              a list of values of that form
{"a": form}         a mapping with this key; with "a?" it may be missing; other keys are not checked
{str: form}         a mapping from texts to values of that form; {object: form} from anything
=================== ===================================================================================

Facts that only the model knows, such as the number of optimizers, are checked during the restore (rebuild.py).
"""

from typing import Any

from torch import Tensor

from labtrain.base.untrusted import is_count, is_number
from labtrain.record.digests import PLACE

Form = dict[object, object]

SCALAR = bool | int | float | complex | str | bytes | None


def _is_limit(value: object) -> bool:
    return value is None or is_number(value)


def _is_rate(value: object) -> bool:
    return isinstance(value, Tensor) or is_number(value)


def _is_kind(value: object) -> bool:
    return value in ("sum", "mean", "count", "other", "unknown")  # counters.py


LOGGED: Form = {
    "key": str,
    "meta": {str: SCALAR, "fx": str, "name": str, "on_step": bool, "on_epoch": bool, "reduce_fx": str},
    "sync": [bool],
    "is_tensor": bool,
    "value": Tensor | None,
    "weight": Tensor | None,
    "cache": Tensor | None,
    "updates": is_count,
    "has_reset": bool,
    "as_loss?": Tensor,
}
RANK: Form = {  # what one of the ranks held: epoch_loop.py, and extra_state.py
    "logged": [LOGGED],
    "metrics": {str: {str: object}},
    "exhausted?": bool,
    "outputs?": [list | tuple],
    "buffers?": {str: Tensor},
    "trainable?": {str: bool},
    "modes?": {str: bool},
    "hidden_buffers?": {str: Tensor | None},
    "hidden_weights?": {str: Tensor},
    "attributes?": {str: {str: object}},
    "began?": {str: str},
    "gradients?": {str: Tensor},
}
LIMITS = dict.fromkeys(("max_epochs?", "min_epochs?", "max_steps?", "min_steps?"), _is_limit)
INITIAL: Form = {  # options.py
    "callbacks?": {object: dict},
    "optimizers": [{"class": str, "groups": [dict]}],
    "inner?": {str: [dict]},
    "schedulers": [
        {"class": str, "interval": str, "frequency": is_count, "optimizer": is_count, "state": dict, "probes": list}
    ],
}
MADE: Form = {  # rebuild.py
    "parameters": {str: [is_count]},
    "buffers": {str: [is_count]},
    "optimizers": [{"class": str, "groups": [[str]]}],
}
STATE: Form = {
    "epoch": is_count,
    "global_step": is_count,
    "pytorch-lightning_version": str,
    "callbacks": dict,
    "optimizer_states": [{"state?": dict, "param_groups?": [dict]}],
    "lr_schedulers": [
        {"last_epoch?": is_number, "_step_count?": is_number, "base_lrs?": [_is_rate], "_last_lr?": [_is_rate]}
    ],
    PLACE: {
        "epoch": is_count,
        "batch": is_count,
        "batches": is_count,
        "is_last_batch": bool,
        "global_step": is_count,
        "scheduler_steps": is_count,
        "batches_that_stepped": is_count,
        "callback_metrics": {str: Tensor},
        "exact": bool,
        "ranks": [RANK],
        "outside?": {
            str: {str: object},
            "trainer?": {str: SCALAR, **LIMITS},
            "optimizers?": {str: {"state": dict, "param_groups": [dict]}},
        },
        "counters?": {str: {str: {str: _is_kind}}},
        "lost?": [str],
        "initial?": INITIAL,
        "made?": MADE,
    },
}


def check(value: Any, form: object = STATE, at: str = "") -> None:
    """Refuse a value with another form.

    Args:
        value: the state of a training, or a part of it.
        form: the form that it must have.
        at: the name of the part.

    Raises:
        ValueError: with the cause and the part.
    """
    if isinstance(form, dict):
        _check_kind(value, dict, at)
        for key, inner in form.items():
            if isinstance(key, type):
                for name, each in value.items():
                    _check_kind(name, key, f"{at}: a key")
                    check(each, inner, f"{at}.{name}")
            elif (name := key.removesuffix("?")) in value:
                check(value[name], inner, f"{at}.{name}" if at else name)
            elif name == key:
                raise ValueError(f"{at or 'it'} has no {name}")
    elif isinstance(form, list):
        _check_kind(value, list, at)
        for index, each in enumerate(value):
            check(each, form[0], f"{at}[{index}]")
    elif isinstance(form, type) or not callable(form):
        _check_kind(value, form, at)
    elif not form(value):
        raise _unlike(value, at)


def _check_kind(value: object, kind: Any, at: str) -> None:
    if not isinstance(value, kind):
        raise _unlike(value, at)


def _unlike(value: object, at: str) -> ValueError:
    what = f"{value!r:.50}" if isinstance(value, SCALAR) else f"of type {type(value).__name__}"
    return ValueError(f"its {at} cannot be {what}")


def first_of_another_kind(saved: object, made: object, at: str = "") -> str | None:
    """Return the name of the first part of a saved state whose type differs from that of a new state.

    None fits every type; a number and a tensor count as one type.
    """
    if saved is None or made is None:
        return None
    if isinstance(saved, dict) and isinstance(made, dict):
        pairs = [(f"{at}.{key}" if at else str(key), saved[key], made[key]) for key in saved if key in made]
    elif isinstance(saved, list | tuple) and isinstance(made, list | tuple):
        pairs = [(f"{at}[{index}]", *both) for index, both in enumerate(zip(saved, made, strict=False))]
    else:
        return None if _kind(saved) == _kind(made) else at
    found = (first_of_another_kind(one, other, name) for name, one, other in pairs)
    return next((name for name in found if name is not None), None)


def _kind(value: object) -> type[object]:
    if isinstance(value, str):  # also Lightning's enumerations
        return str
    return float if isinstance(value, int | float | Tensor) else type(value)
