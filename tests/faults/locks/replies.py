"""One life of a lock (connect, acquire, write, release, close) for each of its replies, with that reply dropped."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Literal

from faults.locks.actor import Actor, Answer
from faults.locks.environments import CannotRunError
from faults.locks.peers import PATIENCE, TTL, Peer
from faults.locks.wire import OrderedProxy
from proxy import EtcdProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from faults.locks.backends import Backend

HANG = 12.0
"""Seconds after which a call counts as hung."""
WATCHED = TTL + 4.0
"""Seconds for which a lock that nobody knows of is watched."""
_TICKING = frozenset({"LeaseKeepAlive", "Watch"})  # when they come is time's business: they are no part of a life

How = Literal["cut", "silence", "silence, as shipped"]


@dataclass(frozen=True)
class Reply:
    """A call of a life whose reply can be dropped: the nth of its method."""

    phase: str
    method: str
    nth: int


@dataclass
class Life:
    """What the caller was told, what the server held, and what a second caller was told; None: it did not come to it.

    `held`, `kept`: who stood in the lock's queue after the first answer to acquiring, and after the release.
    `held_for`, `kept_for`: seconds until nobody did, as long as that was watched; None: nobody was there, or all along.
    """

    peer: str
    how: How | None
    reply: Reply | None
    met: bool = True
    connect: Answer | None = None
    acquire: Answer | None = None
    held: list[str] = field(default_factory=list)
    second: Answer | None = None
    again: Answer | None = None
    queue: list[str] = field(default_factory=list)
    """Who stood there after the caller tried again."""
    held_for: float | None = None
    write: Answer | None = None
    value: str | None = None
    had: list[str] = field(default_factory=list)
    """Who stood there before the release."""
    release: Answer | None = None
    kept: list[str] = field(default_factory=list)
    kept_for: float | None = None
    leases_left: int = 0
    """New ones, without the second caller's, when the caller had closed."""

    @property
    def answers(self) -> list[Answer]:
        """All that the caller was told."""
        told = (self.connect, self.acquire, self.again, self.write, self.release)
        return [answer for answer in told if answer is not None]

    @property
    def taken(self) -> float:
        """How long the answer took whose reply was dropped."""
        answer = getattr(self, self.reply.phase, None) if self.reply is not None else None
        return answer.seconds if isinstance(answer, Answer) else 0.0

    @property
    def believes(self) -> bool:
        """Whether the caller was told, in the end, that the lock was its own."""
        last = self.again or self.acquire
        return last is not None and last.yes


class Replies:
    """A peer on its server, and a second caller that has no proxy before it. Close it."""

    def __init__(self, peer: Peer, backend: Backend, python: Path, log: IO[bytes]) -> None:
        """Start the second caller."""
        self._peer, self._backend, self._python, self._log = peer, backend, python, log
        self._number = 0
        self._second = Actor(python, peer.driver, log)
        told = self._second.ask("connect", host="127.0.0.1", port=backend.port, ttl=TTL, timeout=PATIENCE)
        if not told.yes:
            self.close()
            raise CannotRunError(f"its client can't connect: {told.error} {told.message}")

    def close(self) -> None:
        """End the second caller."""
        with self._second:
            pass

    def all(self) -> Iterator[Life]:
        """Live once without a fault, then once for each reply and each way to drop it."""
        self._live(None, None, [])  # the first one alone loads scripts and makes parents
        replies: list[Reply] = []
        yield self._live(None, None, replies)
        for reply in replies:
            yield self._live(reply, "cut", [])
            yield self._live(reply, "silence", [])
        last = {reply.phase: reply for reply in replies if reply.phase in {"acquire", "write", "release"}}
        for reply in last.values() if self._peer.shipped else ():  # one a phase: what hangs takes its time
            yield self._live(reply, "silence, as shipped", [])

    def _live(self, reply: Reply | None, how: How | None, seen: list[Reply]) -> Life:
        self._number += 1
        name = f"{self._peer.name}-{self._number}"
        life = Life(self._peer.name, how, reply)
        assert self._second.ask("prepare", name=name).yes
        upstream = f"127.0.0.1:{self._backend.port}"
        wire = self._peer.wire
        with (
            EtcdProxy(upstream) if wire is None else OrderedProxy(upstream, wire) as proxy,
            Actor(self._python, self._peer.driver, self._log) as caller,
        ):
            fault = None
            if reply is not None:
                fault = proxy.drop_reply(reply.method, reply.nth, "cut" if how == "cut" else "silence")
            port = int(proxy.endpoint.rpartition(":")[2])
            careful = None if how == "silence, as shipped" else PATIENCE
            self._phases(life, _Caller(caller, proxy, seen), name, {"port": port, "timeout": careful})
            life.met = fault is None or fault.happened.is_set()
        return life

    def _phases(self, life: Life, caller: _Caller, name: str, connection: dict[str, object]) -> None:
        look, before, answered = self._backend, self._backend.leases(), time.monotonic()
        life.connect = caller.ask("connect", host="127.0.0.1", ttl=TTL, **connection)
        if life.connect.yes:
            life.acquire = caller.ask("acquire", name=name)
            answered = time.monotonic()
            life.held = look.holders(name)
            before |= self._try_the_second(life, name)
            if not life.acquire.yes and not life.acquire.hung:
                life.again = caller.ask("acquire", name=name)
            life.queue = look.holders(name)
        if life.believes:
            self._write_and_release(life, caller, name)
            answered = time.monotonic()
            life.kept = look.holders(name)
        if life.kept or (life.held and not life.believes):  # the caller lives on while its lock is watched
            life.leases_left = len(look.leases() - before)
            free_after = _until(lambda: not look.holders(name), answered)
            life.kept_for, life.held_for = (free_after, None) if life.kept else (None, free_after)
            caller.ask("close")
        else:
            caller.ask("close")
            life.leases_left = len(look.leases() - before)

    def _try_the_second(self, life: Life, name: str) -> set[str]:
        """Let the second caller try once, and give the leases that it left."""
        before = self._backend.leases()
        life.second = self._second.ask("acquire", name=name)
        if life.second.yes:
            self._second.ask("release")
        return self._backend.leases() - before

    def _write_and_release(self, life: Life, caller: _Caller, name: str) -> None:
        life.write = caller.ask("write", name=name, value="mine")
        life.value = self._backend.value(name)
        if self._peer.write_releases:
            life.had, life.release = life.queue, life.write
        else:
            life.had = self._backend.holders(name)
            if not life.write.hung:
                life.release = caller.ask("release")


@dataclass
class _Caller:
    """The caller behind the proxy; notes which replies belong to which phase."""

    actor: Actor
    proxy: EtcdProxy
    seen: list[Reply]
    counted: Counter[str] = field(default_factory=Counter)
    done: int = 0

    def ask(self, do: str, **arguments: object) -> Answer:
        answer = self.actor.ask(do, HANG, **arguments)
        calls = list(self.proxy.calls)
        for call in calls[self.done :]:
            self.counted[call.method] += 1
            if call.method not in _TICKING:
                self.seen.append(Reply(do, call.method, self.counted[call.method]))
        self.done = len(calls)
        return answer


def _until(so: Callable[[], bool], since: float) -> float | None:
    """Say how long after `since` it was so; None if it was not in the time that is watched."""
    while (passed := time.monotonic() - since) < WATCHED:
        if so():
            return round(passed, 1)
        time.sleep(0.05)
    return None
