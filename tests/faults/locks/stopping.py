"""A holder is stopped past its lock's TTL, a second gets the lock and writes, and then the first wakes and writes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Literal

from faults.locks.actor import Actor, Answer
from faults.locks.peers import PATIENCE, TTL, Peer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from faults.locks.backends import Backend

MARGIN = 1.0
"""Seconds past the TTL for which a holder is stopped at least."""
_PATIENT = TTL + 10.0
_LIMIT = 20.0

Way = Literal["plain", "look first", "guarded", "not stopped"]
WAYS: dict[Way, int] = {"plain": 1, "look first": 3, "guarded": 1, "not stopped": 1}
"""A write by itself; after a look at the lock; in one step with a check of it; and a holder that only works long.

How often each is played: what a look tells can be a race with the client's own threads.
"""


@dataclass
class Late:
    """What both holders were told, and what the server held in the end; the first writes "first"."""

    peer: str
    way: Way
    acquire: Answer = field(default_factory=Answer)
    stopped_for: float = 0.0
    second_after: float | None = None
    """Seconds after the stop at which the second had the lock; None if it did not get it."""
    second_write: Answer | None = None
    queue: list[str] = field(default_factory=list)
    """Who stood in the lock's queue before the first woke."""
    write: Answer | None = None
    look: Answer | None = None
    release: Answer | None = None
    value: str | None = None
    queue_after: list[str] = field(default_factory=list)
    """Who did when the first had ended."""


def all_ways(peer: Peer, backend: Backend, python: Path, log: IO[bytes]) -> Iterator[Late]:
    """Play each way so often, each time on a lock of its own."""
    for number, way in enumerate(way for way, times in WAYS.items() for _ in range(times)):
        with Actor(python, peer.driver, log) as first, Actor(python, peer.driver, log) as second:
            for each in (first, second):
                told = each.ask("connect", host="127.0.0.1", port=backend.port, ttl=TTL, timeout=PATIENCE)
                assert told.yes, told
            name = f"{peer.name}-late-{number}"
            assert second.ask("prepare", name=name).yes
            yield _play(peer, Late(peer.name, way), name, backend, first, second)


def _play(peer: Peer, late: Late, name: str, backend: Backend, first: Actor, second: Actor) -> Late:
    late.acquire = first.ask("acquire", name=name)
    began = time.monotonic()
    if late.way != "not stopped":
        first.stop()
    try:
        late.second_after = _take(second, name, began, TTL + MARGIN if late.way == "not stopped" else _PATIENT)
        if late.second_after is not None and late.way != "not stopped":
            late.second_write = second.ask(_verb(late.way), _LIMIT, name=name, value="second")
        late.queue = backend.holders(name)
        if late.way == "not stopped":
            late.look = first.ask("look")
            return late
        time.sleep(max(0.0, began + TTL + MARGIN - time.monotonic()))  # the case itself, not a wait for something
        first.send(_verb(late.way), name=name, value="first")
    finally:
        late.stopped_for = round(time.monotonic() - began, 1)
        first.wake()
    late.write = first.hear(_LIMIT)
    if not late.write.hung:
        late.look = first.ask("look", _LIMIT)
        late.release = late.write if peer.write_releases else first.ask("release", _LIMIT)
    late.value, late.queue_after = backend.value(name), backend.holders(name)
    return late


def _verb(way: Way) -> str:
    return {"plain": "write", "look first": "look_then_write"}.get(way, "guarded")


def _take(caller: Actor, name: str, began: float, patience: float) -> float | None:
    """Try until the lock is the caller's."""
    while time.monotonic() < began + patience:
        if caller.ask("acquire", name=name).yes:
            return round(time.monotonic() - began, 1)
        time.sleep(0.1)
    return None
