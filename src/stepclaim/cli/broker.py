"""At-least-once delivery between processes: one pipe a worker, each message sent to two workers, sent again on a death.

One pipe a worker and no shared queue: a worker that is killed with a queue's lock in its hand would stop them all.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeAlias

from stepclaim.cli.engine import Handled

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ASK_AGAIN = 0.25
"""Seconds after which a message that was refused, its step held and not final, is delivered once more."""


# --- what goes through the pipes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """To a worker: handle this step. With `hold` the body waits for `GoOn`, as a long one would."""

    number: int
    run_id: str
    step_key: str
    hold: bool = False


@dataclass(frozen=True)
class GoOn:
    """To a worker: let the held body end."""


@dataclass(frozen=True)
class Ready:
    """From a worker: its store is open."""

    owner: str


@dataclass(frozen=True)
class Publish:
    """From a worker: this step is dispatched."""

    run_id: str
    step_key: str
    delay: float = 0.0


@dataclass(frozen=True)
class InBody:
    """From a worker: the body of an order runs, under a claim with this token."""

    number: int
    token: int


@dataclass(frozen=True)
class Finished:
    """From a worker: what became of an order; `error` where it could not be handled, and must come again."""

    number: int
    handled: Handled | None
    error: str | None = None
    rpcs: int = 0


# --- what the broker knows -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Topic:
    """A step of a run, as the broker sees it."""

    run_id: str
    step_key: str
    tried: set[Peer] = field(default_factory=set)
    over: bool = False


@dataclass(eq=False)
class Copy:
    """One of a topic's messages; `again` once it was delivered in vain."""

    topic: Topic
    due: float = 0.0
    again: bool = False


@dataclass(eq=False)
class Delivery:
    """A copy in a worker's hands."""

    number: int
    copy: Copy
    hold: bool
    token: int | None = None


@dataclass(eq=False)
class Peer:
    """A worker, at the other end of its pipe. `suspended`: it is known not to answer for now."""

    name: str
    connection: Connection[Any, Any]
    owner: str = ""
    delivery: Delivery | None = None
    suspended: bool = False
    gone: bool = False


@dataclass(frozen=True)
class Gone:
    """The worker's end of the pipe is closed: it ended, or was killed."""


Event: TypeAlias = "tuple[Peer, Ready | Publish | InBody | Finished | Gone]"


class Broker:
    """Hands messages to workers, one at a time each, and takes back what they say. Runs in one thread."""

    def __init__(self, copies: int = 2) -> None:
        """Begin without workers: add them to `peers`."""
        self.peers: list[Peer] = []
        self.counts: Counter[str] = Counter()
        self.finished: set[tuple[str, str]] = set()
        """The runs' steps that some worker said to be over."""
        self.hold_wanted = False
        """Set to have the next body held; unset once one is."""
        self._copies = copies
        self._topics: dict[tuple[str, str], Topic] = {}
        self._queue: deque[Copy] = deque()
        self._idle: deque[Peer] = deque()
        self._number = 0

    @property
    def live(self) -> list[Peer]:
        """The workers that can be expected to answer."""
        return [peer for peer in self.peers if not peer.gone and not peer.suspended]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued and nothing is in a worker's hands."""
        return not self._queue and not any(peer.delivery for peer in self.peers)

    def publish(self, run_id: str, step_key: str, delay: float = 0.0) -> None:
        """Take a message in, to be delivered to as many different workers as there are copies."""
        topic = self._topics[run_id, step_key] = Topic(run_id, step_key)
        self._queue.extend(Copy(topic, time.monotonic() + delay) for _ in range(self._copies))
        self.counts["messages"] += 1

    def send(self, peer: Peer, message: Order | GoOn) -> None:
        """Send to one worker; one that is gone is noticed by `pump`."""
        try:
            peer.connection.send(message)
        except OSError:
            self.counts["unsendable"] += 1

    def suspend(self, peer: Peer) -> None:
        """Stop expecting answers from a worker; what it has in hand is delivered to others too, as after a timeout."""
        peer.suspended = True
        if peer.delivery is not None:
            self._again(peer.delivery.copy.topic)

    def resume(self, peer: Peer) -> None:
        """Expect answers again."""
        peer.suspended = False

    def pump(self, timeout: float) -> list[Event]:
        """Hand out what is due, wait up to `timeout` seconds for word from any worker, and give what was said."""
        self._hand_out()
        events: list[Event] = []
        by_connection: dict[Any, Peer] = {peer.connection: peer for peer in self.peers if not peer.gone}
        for connection in wait(list(by_connection), timeout):
            peer = by_connection[connection]
            try:
                message = peer.connection.recv()
            except (EOFError, OSError):
                message = Gone()
            self._take(peer, message)
            events.append((peer, message))
        self._hand_out()
        return events

    def _take(self, peer: Peer, message: Ready | Publish | InBody | Finished | Gone) -> None:
        match message:
            case Ready(owner):
                peer.owner = owner
                self._idle.append(peer)
            case Publish(run_id, step_key, delay):
                self.publish(run_id, step_key, delay)
            case InBody(_, token) if peer.delivery is not None:
                self.counts["bodies"] += 1
                peer.delivery.token = token
                if peer.delivery.hold:
                    self.hold_wanted = False
            case Finished() if peer.delivery is not None:
                delivery, peer.delivery = peer.delivery, None
                self._idle.append(peer)
                self._settle(delivery, message)
            case Gone():
                peer.gone = True
                peer.connection.close()
                if peer in self._idle:
                    self._idle.remove(peer)
                lost, peer.delivery = peer.delivery, None
                if lost is not None and not peer.suspended:
                    self._again(lost.copy.topic)

    def _settle(self, delivery: Delivery, finished: Finished) -> None:
        """Acknowledge a delivery, or keep the message for another."""
        copy, handled = delivery.copy, finished.handled
        self.counts["rpcs"] += finished.rpcs
        self.counts[f"{'again' if copy.again else 'first'}: {handled or 'error'}"] += 1
        if handled in (Handled.RAN, Handled.STOPPED, Handled.REFUSED_FINAL):
            copy.topic.over = True
            self.finished.add((copy.topic.run_id, copy.topic.step_key))
        elif handled is Handled.REFUSED_HELD or handled is None:
            self._again(copy.topic, ASK_AGAIN)

    def _again(self, topic: Topic, delay: float = 0.0) -> None:
        self._queue.append(Copy(topic, time.monotonic() + delay, again=True))

    def _hand_out(self) -> None:
        now = time.monotonic()
        for _ in range(len(self._queue)):
            if not self._idle:
                return
            copy = self._queue.popleft()
            if copy.again and copy.topic.over:
                continue
            if copy.due <= now and copy.again and self._in_hand(copy.topic):
                copy.due = now + ASK_AGAIN
            peer = self._choose(copy) if copy.due <= now else None
            if peer is None:
                self._queue.append(copy)
                continue
            self._idle.remove(peer)
            self._number += 1
            hold = self.hold_wanted and not any(each.delivery and each.delivery.hold for each in self.live)
            peer.delivery = Delivery(self._number, copy, hold)
            copy.topic.tried.add(peer)
            self.counts["deliveries"] += 1
            self.send(peer, Order(self._number, copy.topic.run_id, copy.topic.step_key, hold))

    def _in_hand(self, topic: Topic) -> bool:
        """Whether a worker that answers has the topic in its body: then there is nothing to ask for yet."""
        return any(
            peer.delivery is not None and peer.delivery.copy.topic is topic and peer.delivery.token is not None
            for peer in self.live
        )

    def _choose(self, copy: Copy) -> Peer | None:
        """Choose who has been idle for longest; a first delivery goes to one that has not had the message."""
        candidates = [peer for peer in self._idle if not peer.suspended]
        fresh = [peer for peer in candidates if peer not in copy.topic.tried]
        if copy.again or not set(self.live) - copy.topic.tried:
            fresh = fresh or candidates
        return fresh[0] if fresh else None
