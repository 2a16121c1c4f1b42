"""Who waits to share a transaction, how a batch of them is asked for, and what each is told of the answer."""

from __future__ import annotations

import time
from collections import deque
from copy import copy
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import field
from msgspec.structs import replace

from stepclaim._core.batching import MOST_OPERATIONS, Batch, Pending, pending, reading
from stepclaim._core.ops import TxnReply
from stepclaim._etcd.retry import Failed
from stepclaim._etcd.status import Failure
from stepclaim._etcd.wire import batch_replies, batch_request, look_reply, look_request, txn_reply, txn_request
from stepclaim.errors import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stepclaim._core.ops import Range, Txn
    from stepclaim._etcd.channel import Member

_ATTEMPTS_LEFT = 4.25
"""Who has less time than for so many attempts goes alone: for the wait in the queue, the flight, another wait if that
one did nothing, and an attempt of its own."""

_CLEAN = 4
"""After so many transactions in which everyone got what they asked for the next is asked as one, all or nothing."""

_PATIENCE = 1.25
"""Who has waited in the queue for so many attempts goes alone. More than one: by then a member that was silent to those
before is given up, and who set out earlier would wait for it once more."""

_SLOW = 0.003
"""Seconds: the interpreter takes 5 ms to go from a thread that computes to another one."""

txn: Callable[[Member], Any] = attrgetter("txn")
"""Name the method that carries out transactions."""

ranged: Callable[[Member], Any] = attrgetter("range")
"""Name the method that reads."""


class Turn:
    """Threads that were answered together, and wake each other one after the other.

    All at once they would fight for the interpreter, of which one at a time gets hold: that costs more than the rest of
    a call. Where it is slow, because other threads compute, the rest are woken at once. Who was refused is woken before
    all others: it may have to ask again, and then those should come together.
    """

    __slots__ = ("_left", "_since")

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._left: deque[WaitingThread] = deque()

    def add(self, entry: WaitingThread) -> None:
        """Have a thread be woken."""
        reply = entry.reply
        if reply is None or (isinstance(reply, TxnReply) and not reply.succeeded):
            entry.gate.release()
        else:
            entry.turn = self
            self._left.append(entry)

    def wake(self) -> None:
        """Wake the next one."""
        left, before = self._left, self._since
        now = self._since = time.monotonic()
        try:
            left.popleft().gate.release()
            while left and now - before > _SLOW:
                left.popleft().gate.release()
        except IndexError:  # there is nobody left
            return


class WaitingThread(Pending, eq=False):
    """A thread's transaction that waits."""

    gate: Any = None
    """What the thread waits at."""
    done: bool = False
    turn: Turn | None = None
    """Who are answered with it, and woken after it."""
    leads: bool = False
    """It is to send what waits."""
    open: list[bool] = field(default_factory=lambda: [True])

    def take(self) -> bool:
        """Decide for one party what happens to it: it is sent, or its caller takes it back."""
        try:
            return self.open.pop()
        except IndexError:
            return False

    def reopen(self) -> None:
        """Have it wait again."""
        self.open.append(True)


class WaitingTask(Pending, eq=False):
    """A task's transaction that waits."""

    gate: Any = None
    """The future that its caller waits for: of a reply, an error, or None if it is to go alone."""

    def take(self) -> bool:
        """Tell whether its caller still waits."""
        return not self.gate.done()

    def reopen(self) -> None:
        """Have it wait again, which it never ceased to."""


W = TypeVar("W", WaitingThread, WaitingTask)


class Queue(Generic[W]):
    """Who waits, which claims were just seen to stand, and how much this etcd takes at once."""

    def __init__(self, kind: type[W], attempt_timeout: float) -> None:
        self._kind: type[W] = kind
        self.waiting: deque[W] = deque()
        self._standing = self._last = frozenset[bytes]()
        """Claims that the last two flights, and the last of them, saw stand."""
        self._aloft: set[bytes] = set()
        """Claims on their way: the same ones wait until these have landed, and look."""
        self.lone: bytes | None = None
        """The claim of one that goes alone."""
        self._most = MOST_OPERATIONS
        self._clean = _CLEAN
        """Transactions since the last in which somebody was refused."""
        self.attempt_timeout = attempt_timeout
        self.patience = _PATIENCE * attempt_timeout
        """Seconds that one waits here at most."""

    def entry(self, op: Txn, timeout: float, deadline: float) -> W | None:
        """Give a transaction a place; None if it goes alone: for what it does, or because its call is in trouble."""
        now = time.monotonic()
        if timeout != self.attempt_timeout or deadline - now < _ATTEMPTS_LEFT * timeout:
            return None
        entry = pending(op, now, self._kind)
        return None if entry is None or entry.weight >= self._most else entry

    def reading(self, op: Range, deadline: float) -> W | None:
        """Give a read a place; None if its call has little time left."""
        now = time.monotonic()
        if deadline - now < _ATTEMPTS_LEFT * self.attempt_timeout:
            return None
        return reading(op, now, self._kind)

    def landed(self, reply: TxnReply | None) -> None:
        """Take note of what became of the one that went alone, for those who came meanwhile."""
        lone, self.lone = self.lone, None
        if self.waiting:
            stands = lone is not None and reply is not None and (reply.succeeded or any(reply.found[:1]))
            self._saw(frozenset((lone,)) if stands and lone is not None else frozenset())

    def _saw(self, standing: frozenset[bytes]) -> None:
        self._standing, self._last = standing | self._last, standing

    def batch(self, first: W | None = None, most: int = MOST_OPERATIONS) -> tuple[Batch, list[Any]]:
        """Take together what waits, so many members at most; also gives those who waited too long, and go alone."""
        batch = Batch(self._most)
        kept: list[W] = []
        late: list[W] = []
        members, waiting = batch.members, self.waiting
        aloft = self._aloft if self.lone is None else {*self._aloft, self.lone}
        if first is not None and not self._take(batch, first):
            late.append(first)  # too much for a shared one: this etcd takes less than was thought
        oldest = time.monotonic() - self.patience
        for _ in range(len(waiting)):
            if batch.room < 1 or len(members) >= most:
                break
            entry = waiting.popleft()
            if not entry.take():
                continue
            claim = entry.claim
            if entry.since < oldest:
                late.append(entry)
            elif claim in aloft:
                entry.reopen()
                kept.append(entry)
            elif self._take(batch, entry):
                continue
            elif members:
                entry.reopen()
                kept.append(entry)
            else:  # too much for a shared one: this etcd takes less than was thought
                late.append(entry)
        self.waiting.extendleft(reversed(kept))
        self._aloft.update(batch.claims)
        late += batch.without_writers()
        if self._clean >= _CLEAN:
            batch.as_one()
        return batch, late

    def _take(self, batch: Batch, entry: W) -> bool:
        entry.look = entry.claim in self._standing and not entry.looked
        return batch.take(entry)

    def timeout(self, deadline: float) -> float:
        """Give the time of one attempt that leaves some for what may have to follow."""
        return max(0.0, min(self.attempt_timeout, (deadline - time.monotonic()) / 2))

    def packed(self, ops: Sequence[Txn]) -> tuple[list[Pending | None], list[Batch]]:
        """Put one caller's transactions together; None for each that goes alone."""
        now = time.monotonic()
        entries = [pending(op, now, Pending) for op in ops]
        batches = [Batch(self._most)]
        for entry in entries:
            if entry is not None and not batches[-1].take(entry):
                batches.append(Batch(self._most))
                batches[-1].take(entry)
        return entries, [batch for batch in batches if batch.members]

    def answered(self, batch: Batch, answer: Any) -> list[Any]:
        """Tell all members what became of them; gives those who are done. The others wait again."""
        done, again = settled(batch, answer)
        self._clean = self._clean + 1 if batch.clean else 0
        self._saw(batch.standing)
        self._aloft.difference_update(batch.claims)
        for entry in again:
            entry.reopen()
        self.waiting.extendleft(reversed(again))
        return done

    def failed(self, batch: Batch, error: BaseException) -> list[Any]:
        """Tell all members what a failure means for each; a batch that was refused goes call by call."""
        self._saw(frozenset())
        self._aloft.difference_update(batch.claims)
        if not isinstance(error, Exception):  # who carried the others' calls along was interrupted
            error = lost()
        if isinstance(error, Failed):
            failure = error.failure
            if failure.definite and not failure.transient and len(batch.members) + len(batch.reads) > 1:
                if "too many operations" in str(failure.error):
                    self._most = max(2, self._most // 2)
                return batch.everyone
        for entry in batch.members:
            entry.error = _own(error, definite=entry.look)
            for other in entry.followers or ():
                other.error = _own(error, definite=True)
        return batch.everyone


def question(batch: Batch) -> tuple[Callable[[Member], Any], Any]:
    """Say what is asked for a batch, by which method: one member goes as it would go without all this."""
    if len(batch.members) > 1 or batch.reads:
        return txn, batch_request(batch)
    only = batch.members[0]
    return (ranged, look_request(only.op)) if only.look else (txn, txn_request(only.op))


def settled(batch: Batch, answer: Any) -> tuple[list[Any], list[Any]]:
    if len(batch.members) > 1 or batch.reads:
        done, again = batch.settle(batch_replies(batch, answer))
        return [*batch.reads, *done], again
    only = batch.members[0]
    return batch.settle([look_reply(answer) if only.look else txn_reply(answer, fenced=only.op.fence is not None)])


def outcomes(entries: Sequence[Pending | None]) -> list[TxnReply | Exception | None]:
    """Give what each was told at its first attempt; None for one that still has to go, alone."""
    return [None if each is None else each.error or each.reply for each in entries]


def lost() -> Failed:
    lost = DeadlineExceededError("the call was interrupted on its way")
    return Failed(Failure(lost, transient=True, definite=False))


def _own(error: Exception, *, definite: bool) -> Exception:
    """Make one caller's own error of all their error; who wrote nothing is in no doubt."""
    if not isinstance(error, Failed):
        return error
    failure = error.failure
    failed = Failed(replace(failure, error=copy(failure.error), definite=definite or failure.definite))
    failed.__cause__ = error.__cause__
    return failed
