"""Group commit: while one transaction of a process is in flight the next collects, and goes when that one is back.

There is no timer, and a lone call goes the way that it would go without all this. Each call is told its own answer and
decides itself about an error; what may go together is in `_core.batching`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from copy import copy
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from msgspec import field
from msgspec.structs import replace

from stepclaim._core.batching import MOST_OPERATIONS, Batch, Pending, claim_of, pending, reading
from stepclaim._etcd.retry import Failed
from stepclaim._etcd.status import Failure
from stepclaim._etcd.wire import (
    batch_replies,
    batch_request,
    look_reply,
    look_request,
    txn_reply,
    txn_request,
)
from stepclaim.errors import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from stepclaim._core.ops import Range, RangeReply, Txn, TxnReply
    from stepclaim._etcd.aio_client import AsyncClient
    from stepclaim._etcd.channel import Member
    from stepclaim._etcd.client import Client

_ATTEMPTS_LEFT = 3.0
"""Who has less time than for so many attempts goes alone: for the wait in the queue, the flight, and one of its own."""

Sent: TypeAlias = "tuple[list[Pending | None], list[tuple[Batch, Callable[[], Any]]]]"
"""One caller's transactions on their way, and what gives the answer to each pack of them."""

_FLIGHTS = 2
"""Shared transactions of a loop that are under way at once: while etcd commits one, the client makes another."""

_ENOUGH = 32
"""So many have to wait before a further one goes: many small ones would cost more than they save."""


txn: Callable[[Member], Any] = attrgetter("txn")
"""Name the method that carries out transactions."""

ranged: Callable[[Member], Any] = attrgetter("range")
"""Name the method that reads."""


class WaitingThread(Pending, eq=False):
    """A thread's transaction that waits."""

    gate: Any = None
    """What the thread waits at."""
    done: bool = False
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

    def wake(self) -> None:
        """Tell the caller what became of it."""
        if not self.gate.done():
            if self.error is None:
                self.gate.set_result(self.reply)
            else:
                self.gate.set_exception(self.error)


W = TypeVar("W", WaitingThread, WaitingTask)


class _Queue(Generic[W]):
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
        self.attempt_timeout = attempt_timeout

    def entry(self, op: Txn, timeout: float, deadline: float) -> W | None:
        """Give a transaction a place; None if it goes alone: for what it does, or because its call is in trouble."""
        now = time.monotonic()
        if timeout != self.attempt_timeout or deadline - now < _ATTEMPTS_LEFT * timeout:
            return None
        entry = pending(op, now, self._kind)
        return None if entry is None or entry.weight >= self._most else entry

    def reading(self, op: Range, timeout: float, deadline: float) -> W | None:
        """Give a read a place; None if its call is in trouble."""
        now = time.monotonic()
        if timeout != self.attempt_timeout or deadline - now < _ATTEMPTS_LEFT * timeout:
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
        members = batch.members
        aloft = self._aloft if self.lone is None else {*self._aloft, self.lone}
        if first is not None and not self._take(batch, first):
            late.append(first)  # too much for a shared one: this etcd takes less than was thought
        oldest = time.monotonic() - self.attempt_timeout
        for _ in range(len(self.waiting)):
            if batch.full or len(members) >= most:
                break
            entry = self.waiting.popleft()
            if not entry.take():
                continue
            if entry.since < oldest:
                late.append(entry)
            elif entry.claim not in aloft and self._take(batch, entry):
                continue
            elif members or entry.claim in aloft:
                entry.reopen()
                kept.append(entry)
            else:  # too much for a shared one: this etcd takes less than was thought
                late.append(entry)
        self.waiting.extendleft(reversed(kept))
        self._aloft.update(batch.claims)
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
        done, again = _settled(batch, answer)
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
            error = _lost()
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


def _question(batch: Batch) -> tuple[Callable[[Member], Any], Any]:
    """Say what is asked for a batch, by which method: one member goes as it would go without all this."""
    if len(batch.members) > 1 or batch.reads:
        return txn, batch_request(batch)
    only = batch.members[0]
    return (ranged, look_request(only.op)) if only.look else (txn, txn_request(only.op))


def _settled(batch: Batch, answer: Any) -> tuple[list[Any], list[Any]]:
    if len(batch.members) > 1 or batch.reads:
        done, again = batch.settle(batch_replies(batch, answer))
        return [*batch.reads, *done], again
    only = batch.members[0]
    return batch.settle([look_reply(answer) if only.look else txn_reply(answer, fenced=only.op.fence is not None)])


def _outcomes(entries: Sequence[Pending | None]) -> list[TxnReply | Exception | None]:
    """Give what each was told at its first attempt; None for one that still has to go, alone."""
    return [None if each is None else each.error or each.reply for each in entries]


def _lost() -> Failed:
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


class Committer:
    """Shares transactions among threads: one of those who wait carries the others' along."""

    def __init__(self, client: Client, attempt_timeout: float) -> None:
        self._client = client
        self._queue = _Queue(WaitingThread, attempt_timeout)
        self._busy = threading.Lock()

    def commit(self, op: Txn, timeout: float, deadline: float) -> TxnReply:
        """Attempt a transaction once, alone or with others; raises `Failed`."""
        queue = self._queue
        if timeout == queue.attempt_timeout and not queue.waiting and self._busy.acquire(blocking=False):
            queue.lone, reply = claim_of(op), None
            try:
                answer = self._client.attempt(txn, txn_request(op), timeout)
                reply = txn_reply(answer, fenced=op.fence is not None)
                return reply
            finally:
                queue.landed(reply)
                self._busy.release()
                if queue.waiting:
                    self._pass_on()
        entry = queue.entry(op, timeout, deadline)
        if entry is None:
            return self._alone(op, timeout)
        self._await(entry, timeout)
        if entry.error is not None:
            raise entry.error
        return self._alone(op, timeout) if entry.reply is None else entry.reply

    def read(self, op: Range, timeout: float, deadline: float) -> RangeReply | None:
        """Have a read go along with what is sent next; None: it is to go by itself."""
        entry = self._queue.reading(op, timeout, deadline) if self._busy.locked() else None
        if entry is None:
            return None
        self._await(entry, timeout)
        reply: RangeReply | None = entry.reply
        return reply

    def send(self, ops: Sequence[Txn], deadline: float) -> Sent:
        """Send one caller's transactions once each, packed together, without waiting."""
        entries, batches = self._queue.packed(ops)
        timeout = self._queue.timeout(deadline)
        return entries, [(batch, self._client.begin(*_question(batch), timeout)) for batch in batches]

    def answers(self, sent: Sent) -> list[TxnReply | Exception | None]:
        """Wait for what became of them; None for each that still has to go, alone."""
        entries, calls = sent
        for batch, answer in calls:
            try:
                _settled(batch, answer())
            except Failed as error:
                self._queue.failed(batch, error)
        return _outcomes(entries)

    def _await(self, entry: WaitingThread, timeout: float) -> None:
        """Wait until it is done, by this thread if need be."""
        entry.gate = threading.Lock()
        entry.gate.acquire()
        self._queue.waiting.append(entry)
        self._pass_on()  # who led may have gone just before
        while not entry.done and self._wait(entry, timeout):
            self._lead(entry, timeout)

    def _alone(self, op: Txn, timeout: float) -> TxnReply:
        answer = self._client.attempt(txn, txn_request(op), timeout)
        return txn_reply(answer, fenced=op.fence is not None)

    def _lead(self, entry: WaitingThread, timeout: float) -> None:
        """Send what waits, with this thread's own first, and hand the lead on before those who wait are woken."""
        ready = [entry]
        try:
            batch, ready = self._queue.batch(entry)
            try:
                if not batch.members:
                    ready += batch.reads  # nobody takes them along
                else:
                    ready += self._queue.answered(batch, self._client.attempt(*_question(batch), timeout))
            except BaseException as error:
                ready += self._queue.failed(batch, error)
                if not isinstance(error, Failed):
                    raise
        finally:
            self._busy.release()
            self._pass_on()
            for each in ready:
                each.done = True
                each.gate.release()

    def _pass_on(self) -> None:
        """Have somebody lead while somebody waits."""
        waiting = self._queue.waiting
        while waiting and self._busy.acquire(blocking=False):
            try:
                while not (entry := waiting.popleft()).take():
                    pass
            except IndexError:
                self._busy.release()
                continue
            entry.leads = True
            entry.gate.release()
            return

    def _wait(self, entry: WaitingThread, timeout: float) -> bool:
        """Wait until this thread leads; False if there is nothing more to wait for."""
        try:
            if not entry.gate.acquire(timeout=timeout):
                if entry.take():  # nobody has sent it: it goes alone
                    entry.done = True
                    return False
                if not entry.gate.acquire(timeout=timeout + 1.0):
                    raise _lost()  # noqa: TRY301
        except BaseException:
            if not entry.take() and entry.gate.acquire(timeout=timeout + 1.0) and entry.leads:
                self._busy.release()
                self._pass_on()
            raise
        leads, entry.leads = entry.leads, False
        return leads


class AsyncCommitter:
    """Shares transactions among tasks: a lone call goes by itself, and what gathers meanwhile is sent by a task."""

    def __init__(self, client: AsyncClient, attempt_timeout: float) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._queue = _Queue(WaitingTask, attempt_timeout)
        self.flights = _FLIGHTS
        self._aloft = self._landed = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._called = False

    def commit(self, op: Txn, timeout: float, deadline: float) -> Awaitable[TxnReply | None]:
        """Attempt a transaction once, with others or, if nobody is on the way, alone; raises `Failed`.

        Gives None for one that could not share after all: it is to go alone.
        """
        queue = self._queue
        if not self._aloft and not queue.waiting and timeout == queue.attempt_timeout:
            return self._first(op, timeout)
        entry = queue.entry(op, timeout, deadline)
        if entry is None:
            return self.alone(op, timeout)
        gate = entry.gate = self._loop.create_future()
        queue.waiting.append(entry)
        if not self._called:
            self._call()
        return gate

    def read(self, op: Range, timeout: float, deadline: float) -> Awaitable[RangeReply | None] | None:
        """Have a read go along with what is sent next; None, at once or later: it is to go by itself."""
        if not self._aloft:
            return None
        entry = self._queue.reading(op, timeout, deadline)
        if entry is None:
            return None
        gate = entry.gate = self._loop.create_future()
        self._queue.waiting.append(entry)
        self._call()
        return gate

    async def alone(self, op: Txn, timeout: float) -> TxnReply:
        """Attempt a transaction once, by itself."""
        answer = await self._client.attempt(txn, txn_request(op), timeout)
        return txn_reply(answer, fenced=op.fence is not None)

    async def _first(self, op: Txn, timeout: float) -> TxnReply:
        """Go alone, ahead of those who come meanwhile."""
        self._aloft = 1
        self._queue.lone, reply = claim_of(op), None
        try:
            answer = await self._client.attempt(txn, txn_request(op), timeout)
            reply = txn_reply(answer, fenced=op.fence is not None)
            return reply
        finally:
            self._queue.landed(reply)
            self._aloft -= 1
            if self._queue.waiting:
                self._call()

    async def commit_many(self, ops: Sequence[Txn], deadline: float) -> list[TxnReply | Exception | None]:
        """Attempt one caller's transactions once each, packed together; None for each that has to go alone."""
        entries, batches = self._queue.packed(ops)
        timeout = self._queue.timeout(deadline)
        for batch in batches:
            try:
                _settled(batch, await self._client.attempt(*_question(batch), timeout))
            except Failed as error:
                self._queue.failed(batch, error)
        return _outcomes(entries)

    def _call(self) -> None:
        """Have a departure follow what is to be run before it."""
        if not self._called:
            self._called = True
            self._loop.call_soon(self._depart)

    def _depart(self) -> None:
        """Send what waits, in as many flights as are worth it."""
        self._called = False
        self._aloft -= self._landed
        self._landed = 0
        queue = self._queue
        while queue.waiting and self._aloft < self.flights:
            waiting = len(queue.waiting)
            if self._aloft and waiting < _ENOUGH:
                return
            batch, ready = queue.batch(most=max(_ENOUGH, waiting // (self.flights - self._aloft)))
            _wake(ready)
            if not batch.members:
                _wake(batch.reads)  # nobody takes them along
                return
            self._aloft += 1
            flight = self._loop.create_task(self._fly(batch))
            self._tasks.add(flight)
            flight.add_done_callback(self._tasks.discard)

    async def _fly(self, batch: Batch) -> None:
        queue = self._queue
        try:
            ready = queue.answered(batch, await self._client.attempt(*_question(batch), queue.attempt_timeout))
        except BaseException as error:
            ready = queue.failed(batch, error)
            if not isinstance(error, Exception):
                raise
        finally:
            _wake(ready)
            self._landed += 1  # not yet free for a lone call: those who were just answered come back first
            self._call()


def _wake(ready: Iterable[WaitingTask]) -> None:
    for each in ready:
        each.wake()
