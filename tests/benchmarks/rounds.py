"""Rounds: every participant has a slice in each, and those that are compared have theirs next to each other."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.driver import Driver
    from benchmarks.figures import Sample, Table

Measure: TypeAlias = "Callable[[], Sample]"
Group: TypeAlias = "Sequence[tuple[str, Measure]]"

_BETWEEN = 0.1
"""Seconds for a server to put away what the slice before has left."""


@dataclass(frozen=True)
class Lengths:
    """How long things are measured."""

    rounds: int = 5
    """After one of warm-up."""
    slice_seconds: float = 1.0
    warm_up_seconds: float = 0.25
    """At the beginning of each slice, not measured."""
    lone_calls: int = 1000
    """Lone calls of each participant a round."""


class DroppedOutError(Exception):
    """A peer failed: it is left out, and the others go on."""


def play(table: Table, groups: Sequence[Group], rounds: int, tell: Callable[[str], None]) -> None:
    """Play one round of warm-up and those that count.

    A group's participants stand side by side; who is first, of the groups and within each, changes with each round.
    """
    gone: set[str] = set()
    for number in range(rounds + 1):
        turn = number % len(groups)
        for group in [*groups[turn:], *groups[:turn]]:
            for name, measure in reversed(group) if number % 2 else group:
                if name in gone:
                    continue
                try:
                    sample = measure()
                except DroppedOutError:
                    gone.add(name)
                    table.samples.pop(name, None)
                    continue
                if number:
                    table.add(name, sample)
                time.sleep(_BETWEEN)
        tell(f"{table.title}: {f'round {number} of {rounds}' if number else 'warm-up'}")


def fresh() -> str:
    """Name a run that nobody has used."""
    return uuid.uuid4().hex


def slices(driver: Driver, callers: int, lengths: Lengths, server_pids: Sequence[int]) -> Measure:
    """Make what has a driver do one slice with so many callers."""

    def measure() -> Sample:
        sample: Sample = driver.ask(
            "slice",
            run=fresh(),
            callers=callers,
            seconds=lengths.slice_seconds,
            warm_up=lengths.warm_up_seconds,
            server_pids=list(server_pids),
        )
        return sample

    return measure
