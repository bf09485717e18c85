"""Whether a hook's code reads an argument; in doubt it does."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from labtrain.training.sharded.reading import reads


class Base:
    def hook(self, outputs: Any, batch: Any) -> None:
        """Do nothing."""


class Hooks(Base):
    def unread(self, outputs: Any, batch: Any) -> object:
        self.outputs = 0
        return self.outputs, len("batch"), print

    def read(self, outputs: Any, batch: Any) -> object:
        return outputs

    def other_names(self, first: Any, second: Any) -> object:
        return [first for _ in range(3)]

    def replaced(self, outputs: Any, batch: Any) -> object:
        outputs = 3
        del outputs, batch

    def inside(self, outputs: Any, batch: Any) -> Callable[[], object]:
        return lambda: outputs

    def any_number(self, *everything: Any) -> object:
        return everything[0]

    def any_unread(self, *_: Any, **__: Any) -> object:
        return None

    def mixed(self, outputs: Any, *rest: Any) -> object:
        return outputs

    def all_locals(self, outputs: Any, batch: Any) -> object:
        return locals()

    def base(self, outputs: Any, batch: Any) -> None:
        super().hook(outputs, batch=None)

    @staticmethod
    def static(outputs: Any, batch: Any) -> object:
        return batch

    @functools.lru_cache  # noqa: B019
    def cached(self, outputs: Any, batch: Any) -> None: ...


@functools.wraps(Base.hook)
def wrapped(*given: Any, **options: Any) -> None:
    Base.hook(*given, **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hook", (False, False)),
        ("unread", (False, False)),
        ("read", (True, False)),
        ("other_names", (True, False)),
        ("replaced", (False, False)),
        ("inside", (True, False)),
        ("any_number", (True, True)),
        ("any_unread", (False, False)),
        ("mixed", (True, False)),
        ("all_locals", (True, True)),
        ("base", (True, False)),
        ("static", (False, True)),
        ("cached", (True, True)),
    ],
)
def test_arguments_that_a_hook_reads(name: str, expected: tuple[bool, bool]) -> None:
    hook = getattr(Hooks(), name)
    assert (reads(hook, 0), reads(hook, 1)) == expected


def test_functions_without_code_read() -> None:
    """Also a decorator's wrapper, which hands all to the function inside."""
    for hook in (print, functools.partial(Base.hook, None), wrapped, Hooks):
        assert reads(hook, 1)
    assert not reads(lambda outputs, batch: None, 0)
