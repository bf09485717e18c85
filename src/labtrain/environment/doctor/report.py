"""What a check says."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        group: environment, NVIDIA, machine or libraries.
        name: of the check, unique.
        status: ok, failed or skipped.
        found: what is there.
        wanted: what should be.
        hint: what to type or install; empty where nothing is wrong.
    """

    group: str
    name: str
    status: Status
    found: str
    wanted: str
    hint: str = ""


def judged(group: str, name: str, good: bool, found: str, wanted: str, hint: str) -> Check:
    """Return a check that is ok or failed; the hint is for the failed one."""
    return Check(
        group=group, name=name, status="ok" if good else "failed", found=found, wanted=wanted, hint="" if good else hint
    )


def skipped(group: str, name: str, found: str, wanted: str) -> Check:
    """Return a check that does not apply here."""
    return Check(group=group, name=name, status="skipped", found=found, wanted=wanted)


def few(names: list[str], most: int = 8) -> str:
    """Return names in a line; of many, the first and how many more."""
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")
