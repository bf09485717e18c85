"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warned", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        group: environment, NVIDIA, machine or libraries.
        name: of the check, unique.
        status: ok, warned, failed or skipped.
        found: the actual state.
        wanted: the expected state.
        hint: what to type or install; empty if nothing is wrong.
    """

    group: str
    name: str
    status: Status
    found: str
    wanted: str
    hint: str = ""


def judged(group: str, name: str, good: bool, found: str, wanted: str, hint: str) -> Check:
    """Return a check that is ok or failed; only a failed check keeps the hint."""
    return Check(
        group=group, name=name, status="ok" if good else "failed", found=found, wanted=wanted, hint="" if good else hint
    )


def warned(group: str, name: str, found: str, wanted: str, hint: str) -> Check:
    """Return a check of what works, but not as well as it could, or not for long."""
    return Check(group=group, name=name, status="warned", found=found, wanted=wanted, hint=hint)


def skipped(group: str, name: str, found: str, wanted: str) -> Check:
    """Return a check that does not apply here."""
    return Check(group=group, name=name, status="skipped", found=found, wanted=wanted)
