"""Group commit: while one transaction of a process is in flight the next collects, and goes when that one is back.

There is no timer, and a lone call goes the way that it would go without all this. Each call is told its own answer and
decides itself about an error; what may go together is in `_core.batching`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from stepclaim._core.batching import claim_of
from stepclaim._etcd.queue import Queue, Turn, WaitingTask, WaitingThread, lost, outcomes, question, settled, txn
from stepclaim._etcd.retry import Failed
from stepclaim._etcd.wire import txn_reply, txn_request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from stepclaim._core.batching import Batch, Pending
    from stepclaim._core.ops import Range, RangeReply, Txn, TxnReply
    from stepclaim._etcd.aio_client import AsyncClient
    from stepclaim._etcd.client import Client

Sent: TypeAlias = "tuple[list[Pending | None], list[tuple[Batch, Callable[[], Any]]]]"
"""One caller's transactions on their way, and what gives the answer to each pack of them."""

_FLIGHTS = 2
"""Shared transactions of a loop that are under way at once: while etcd commits one, the client makes another."""

_OVERLAPPING = 4.0
"""A second one is worth it while one takes no longer than so many times what the client does about its answer. Where
etcd or the machine is the slower by more, because other processes want it too, few large ones cost them less."""

_ENOUGH = 32
"""So many have to wait before a further one goes: many small ones would cost more than they save."""


class Committer:
    """Shares transactions among threads: one of those who wait carries the others' along."""

    def __init__(self, client: Client, attempt_timeout: float) -> None:
        self._client = client
        self._queue = Queue(WaitingThread, attempt_timeout)
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

    def read(self, op: Range, deadline: float) -> RangeReply | None:
        """Have a read go along with what is sent next; None: it is to go by itself."""
        entry = self._queue.reading(op, deadline) if self._busy.locked() else None
        if entry is None:
            return None
        try:
            self._await(entry, self._queue.attempt_timeout)
        except Failed:  # nobody said what became of it
            return None
        reply: RangeReply | None = entry.reply
        return reply

    def send(self, ops: Sequence[Txn], deadline: float) -> Sent:
        """Send one caller's transactions once each, packed together, without waiting."""
        entries, batches = self._queue.packed(ops)
        timeout = self._queue.timeout(deadline)
        return entries, [(batch, self._client.begin(*question(batch), timeout)) for batch in batches]

    def answers(self, sent: Sent) -> list[TxnReply | Exception | None]:
        """Wait for what became of them; None for each that still has to go, alone."""
        entries, calls = sent
        for batch, answer in calls:
            try:
                settled(batch, answer())
            except Failed as error:
                self._queue.failed(batch, error)
        return outcomes(entries)

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
                if batch.members:
                    ready += self._queue.answered(batch, self._client.attempt(*question(batch), timeout))
            except BaseException as error:
                ready += self._queue.failed(batch, error)
                if not isinstance(error, Failed):
                    raise
        finally:
            self._busy.release()
            self._pass_on()
            turn = Turn()
            for each in ready:
                each.done = True
                if each is not entry:
                    turn.add(each)
            turn.wake()

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
            if not entry.gate.acquire(timeout=self._queue.patience):
                if entry.take():  # nobody has sent it: it goes alone
                    entry.done = True
                    return False
                if not entry.gate.acquire(timeout=timeout + 1.0) and not entry.done:
                    raise lost()  # noqa: TRY301
        except BaseException:
            while not entry.take():  # somebody carries it; it may come back to wait again, and must not be made to lead
                if entry.gate.acquire(timeout=timeout + 1.0):
                    if entry.leads:
                        self._busy.release()
                        self._pass_on()
                    elif entry.turn is not None:
                        entry.turn.wake()
                    break
            raise
        if entry.turn is not None:
            entry.turn.wake()
        leads, entry.leads = entry.leads, False
        return leads


class AsyncCommitter:
    """Shares transactions among tasks: a lone call goes by itself, and what gathers meanwhile is sent by a task."""

    def __init__(self, client: AsyncClient, attempt_timeout: float) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._queue = Queue(WaitingTask, attempt_timeout)
        self.flights = _FLIGHTS
        self._overlaps = True
        """Whether it was worth it, lately, to have more than one under way."""
        self._took = self._back = 0.0
        """How long the last one was under way, and when it was back by this thread's own time."""
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

    def read(self, op: Range, deadline: float) -> Awaitable[RangeReply | None] | None:
        """Have a read go along with what is sent next; None, at once or later: it is to go by itself."""
        if not self._aloft:
            return None
        entry = self._queue.reading(op, deadline)
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
                settled(batch, await self._client.attempt(*question(batch), timeout))
            except Failed as error:
                self._queue.failed(batch, error)
        return outcomes(entries)

    def _call(self) -> None:
        """Have a departure follow what is to be run before it."""
        if not self._called:
            self._called = True
            self._loop.call_soon(self._depart)

    def _depart(self) -> None:
        """Send what waits, in as many flights as are worth it."""
        self._called = False
        if self._landed:
            self._judge()
        queue, flights = self._queue, self.flights if self._overlaps else 1
        while queue.waiting and self._aloft < flights:
            waiting = len(queue.waiting)
            if self._aloft and waiting < _ENOUGH:
                return
            batch, ready = queue.batch(most=max(_ENOUGH, waiting // (flights - self._aloft)))
            _wake(ready)
            if not batch.members:
                return
            self._aloft += 1
            flight = self._loop.create_task(self._fly(batch))
            self._tasks.add(flight)
            flight.add_done_callback(self._tasks.discard)

    def _judge(self) -> None:
        """Take those that are back off the number, and judge by the last of them whether to send several at once."""
        self._aloft -= self._landed
        self._landed = 0
        self._overlaps = self._took < _OVERLAPPING * (time.thread_time() - self._back)

    async def _fly(self, batch: Batch) -> None:
        queue, began = self._queue, time.monotonic()
        try:
            answer = await self._client.attempt(*question(batch), queue.attempt_timeout)
            self._took, self._back = time.monotonic() - began, time.thread_time()
            ready = queue.answered(batch, answer)
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
        gate = each.gate
        if gate.done():
            continue
        if each.error is None:
            gate.set_result(each.reply)
        else:
            gate.set_exception(each.error)
