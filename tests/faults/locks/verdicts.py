"""What a record means: derived from what the caller was told and what the server held, and from nothing else."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from faults.locks.replies import Life
    from faults.locks.stopping import Late


class Finding(StrEnum):
    """What can be said of a life in which a reply was lost; the worst first."""

    TWO_HOLDERS = "two holders at once"
    NO_LOCK = "told yes, and nothing is held"
    WRITE_LOST = "told written, and it is not there"
    LEFT_UNTOLD = "told released, and it is held"
    TWICE = "the caller stands in the queue twice"
    ORPHAN = "not told of its own lock"
    LEFT = "not released"
    HUNG = "hung"
    FALSE_ALARM = "released, and told that it was not"
    UNTOLD = "written, and told that it was not"
    EXPIRED = "expired before the release, and told so"
    NOT_WRITTEN = "not written, and told so"
    FAILED = "not acquired, and told so"
    LEASE_LEFT = "a lease is left behind"
    CLEAN = "unharmed"


def judge(life: Life) -> list[Finding]:
    """Say all that is to be said of a life, the worst first; `CLEAN` alone if nothing went wrong."""
    found = set[Finding]()
    if any(answer.hung for answer in life.answers):
        found.add(Finding.HUNG)
    if life.acquire is None or not life.acquire.yes:
        found.add(Finding.ORPHAN if life.held else Finding.FAILED)
    if life.believes:
        if life.second is not None and life.second.yes and life.acquire is not None and life.acquire.yes:
            found.add(Finding.TWO_HOLDERS)
        elif not life.queue:
            found.add(Finding.NO_LOCK)
    if len(life.queue) > 1:
        found.add(Finding.TWICE)
    found |= _writing(life) | _releasing(life)
    if life.leases_left:
        found.add(Finding.LEASE_LEFT)
    return [each for each in Finding if each in found] or [Finding.CLEAN]


def _writing(life: Life) -> set[Finding]:
    if life.write is None:
        return set()
    there = life.value == "mine"
    if life.write.yes:
        return set() if there else {Finding.WRITE_LOST}
    return {Finding.UNTOLD if there else Finding.NOT_WRITTEN}


def _releasing(life: Life) -> set[Finding]:
    if life.release is None:
        return {Finding.LEFT} if life.kept else set()
    if life.kept:
        return {Finding.LEFT_UNTOLD if life.release.yes else Finding.LEFT}
    if life.release.yes:
        return set()
    return {Finding.FALSE_ALARM if life.had else Finding.EXPIRED}


def describe(life: Life) -> str:
    """Say in a few words what a caller lived through, by its worst finding."""
    found = judge(life)
    match found[0]:
        case Finding.ORPHAN | Finding.FAILED:
            told = f"{life.acquire or life.connect}, {_held(life)}"
            return told if life.again is None else f"{told}; again: {life.again}"
        case Finding.HUNG:
            return f"hung > {max(answer.seconds for answer in life.answers if answer.hung):g} s"
        case Finding.LEFT:
            told = f"{life.write}, but written" if Finding.UNTOLD in found else f"{life.release}"
            return f"{told}; lock held {_long(life.kept_for)}, release: {life.release}"
        case Finding.FALSE_ALARM:
            return f"{life.release}, but released"
        case Finding.UNTOLD:
            return f"{life.write}, but written"
        case Finding.EXPIRED:
            return f"{life.release}: expired"
        case Finding.LEASE_LEFT:
            return Finding.CLEAN
        case worst:
            return worst


def _held(life: Life) -> str:
    return f"but held {_long(life.held_for)}" if life.held else "nothing held"


def _long(seconds: float | None) -> str:
    return "for long" if seconds is None else f"{seconds:.1f} s"


class Outcome(StrEnum):
    """What became of the second holder's value once the first woke up."""

    NOT_SO_FAR = "not seen: nobody else got in"
    OVERWROTE = "overwritten"
    SWALLOWED = "told written, and it was not"
    REFUSED = "refused"
    KEPT = "kept"
    LAPSED = "lapsed"


def judge_late(late: Late) -> Outcome:
    """Say what the first holder's late write did; of one that was not stopped, whether it kept its lock."""
    if late.way == "not stopped":
        return Outcome.KEPT if late.second_after is None else Outcome.LAPSED
    if late.second_after is None or late.second_write is None or not late.second_write.yes:
        return Outcome.NOT_SO_FAR
    if late.value == "first":
        return Outcome.OVERWROTE
    if late.value != "second" or late.write is None:
        return Outcome.NOT_SO_FAR
    return Outcome.SWALLOWED if late.write.yes else Outcome.REFUSED


def describe_late(late: Late) -> str:
    """Say it with what the first was told."""
    outcome = judge_late(late)
    if outcome is Outcome.REFUSED and late.write is not None:
        return f"refused: {late.write}"
    if outcome is Outcome.LAPSED:
        return f"lapsed after {late.second_after:g} s"
    return outcome


def told_at_release(late: Late) -> str:
    """Say what the first was told when it released what was no longer its own, and whether that hurt the second."""
    hurt = ", and took the other's" if late.queue and late.queue_after != late.queue else ""
    return f"{late.release}{hurt}"
