"""Promise 3, by digest: every case of the matrix that tests/real leaves out."""

from collections.abc import Callable

from tests.support.exactness import EVERY, Case, cover, each

pytest_plugins = ["tests.support.exactness"]


@each([case for case in EVERY if case not in cover(2)])
def test_however_it_ran(case: Case, is_exact: Callable[[Case], None]) -> None:
    is_exact(case)
