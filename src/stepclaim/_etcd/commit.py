"""Group commit: while one transaction of a process is in flight the next collects, and goes when that one is back.

There is no timer, and a lone call goes the way that it would go without all this. Each call is told its own answer and
decides itself about an error; what may go together is in `_core.batching`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from stepclaim._core.batching import MOST_OPERATIONS, Batch, Pending, pending
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
    from collections.abc import Callable, Sequence

    from stepclaim._core.ops import Txn, TxnReply
    from stepclaim._etcd.aio_client import AsyncClient
    from stepclaim._etcd.channel import Member
    from stepclaim._etcd.client import Client

_ATTEMPTS_LEFT = 3.0
"""Who has less time than for so many attempts goes alone: for the wait in the queue, the flight, and one of its own."""

_PACKS_AT_ONCE = 3


def txn(member: Member) -> Any:
    """Name the method that carries out transactions."""
    return member.txn


def ranged(member: Member) -> Any:
    """Name the method that reads."""
    return member.range


class _Queue:
    """Who waits, which claims were just seen to stand, and how much this etcd takes at once."""

    def __init__(self, attempt_timeout: float) -> None:
        self.waiting: deque[Pending] = deque()
        self._standing: frozenset[bytes] = frozenset()
        self._most = MOST_OPERATIONS
        self.attempt_timeout = attempt_timeout

    def entry(self, op: Txn, timeout: float, deadline: float) -> Pending | None:
        """Give a transaction a place; None if it goes alone: for what it does, or because its call is in trouble."""
        now = time.monotonic()
        if timeout != self.attempt_timeout or deadline - now < _ATTEMPTS_LEFT * timeout:
            return None
        entry = pending(op, now)
        return entry if entry is not None and entry.weight < self._most else None

    def lone(self, op: Txn, reply: TxnReply) -> TxnReply:
        """Take note of a claim that went alone, for those who have come to wait meanwhile; gives the reply back."""
        stands = op.fence is not None and (reply.succeeded or any(reply.found[:1]))
        self._standing = frozenset((op.compares[0].key,)) if stands else frozenset()
        return reply

    def wait(self, entry: Pending) -> None:
        """Have a transaction wait for the next flight."""
        self.waiting.append(entry)

    def batch(self, first: Pending | None = None) -> tuple[Batch, list[Pending]]:
        """Take together what waits; also gives those who have waited too long, and go alone now."""
        batch = Batch(self._most)
        kept: list[Pending] = []
        late: list[Pending] = []
        if first is not None and not self._take(batch, first):
            late.append(first)  # too much for a shared one: this etcd takes less than was thought
        oldest = time.monotonic() - self.attempt_timeout
        for _ in range(len(self.waiting)):
            if batch.full:
                break
            entry = self.waiting.popleft()
            if not entry.take():
                continue
            if entry.since < oldest:
                late.append(entry)
            elif not self._take(batch, entry):
                if batch.members:
                    entry.reopen()
                    kept.append(entry)
                else:  # too much for a shared one: this etcd takes less than was thought
                    late.append(entry)
        self.waiting.extendleft(reversed(kept))
        return batch, late

    def _take(self, batch: Batch, entry: Pending) -> bool:
        entry.look = not entry.looked and entry.claim in self._standing
        return batch.take(entry)

    def timeout(self, deadline: float) -> float:
        """Give the time of one attempt that leaves some for what may have to follow."""
        return max(0.0, min(self.attempt_timeout, (deadline - time.monotonic()) / 2))

    def packed(self, ops: Sequence[Txn]) -> tuple[list[Pending | None], list[Batch]]:
        """Put one caller's transactions together; None for each that goes alone."""
        now = time.monotonic()
        entries = [pending(op, now) for op in ops]
        batches = [Batch(self._most)]
        for entry in entries:
            if entry is not None and not batches[-1].take(entry):
                batches.append(Batch(self._most))
                batches[-1].take(entry)
        return entries, [batch for batch in batches if batch.members]

    def answered(self, batch: Batch, answer: Any) -> list[Pending]:
        """Tell all members what became of them; gives those who are done. The others wait again."""
        done, again = _settled(batch, answer)
        self._standing = batch.standing
        for entry in again:
            entry.reopen()
        self.waiting.extendleft(reversed(again))
        return done

    def failed(self, batch: Batch, error: BaseException) -> list[Pending]:
        """Tell all members what a failure means for each; a batch that was refused goes call by call."""
        self._standing = frozenset()
        if not isinstance(error, Exception):  # who carried the others' calls along was interrupted
            error = _lost()
        if isinstance(error, Failed):
            failure = error.failure
            if failure.definite and not failure.transient and len(batch.members) > 1:
                if "too many operations" in str(failure.error):
                    self._most = max(2, self._most // 2)
                return batch.everyone
        for entry in batch.members:
            entry.error = _own(error, definite=entry.look)
            for other in entry.followers:
                other.error = _own(error, definite=True)
        return batch.everyone


def _question(batch: Batch) -> tuple[Callable[[Member], Any], Any]:
    """Say what is asked for a batch, by which method: one member goes as it would go without all this."""
    if len(batch.members) > 1:
        return txn, batch_request(batch)
    only = batch.members[0]
    return (ranged, look_request(only.op)) if only.look else (txn, txn_request(only.op))


def _settled(batch: Batch, answer: Any) -> tuple[list[Pending], list[Pending]]:
    if len(batch.members) > 1:
        return batch.settle(batch_replies(batch, answer))
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
        self._queue = _Queue(attempt_timeout)
        self._busy = threading.Lock()

    def commit(self, op: Txn, timeout: float, deadline: float) -> TxnReply:
        """Attempt a transaction once, alone or with others; raises `Failed`."""
        queue = self._queue
        if timeout == queue.attempt_timeout and not queue.waiting and self._busy.acquire(blocking=False):
            try:
                return queue.lone(op, self._alone(op, timeout))
            finally:
                self._busy.release()
                self._pass_on()
        entry = queue.entry(op, timeout, deadline)
        if entry is None:
            return self._alone(op, timeout)
        entry.gate = threading.Lock()
        entry.gate.acquire()
        queue.wait(entry)
        self._pass_on()  # who led may have gone just before
        while not entry.done and self._wait(entry, timeout):
            self._lead(entry, timeout)
        if entry.error is not None:
            raise entry.error
        return self._alone(op, timeout) if entry.reply is None else entry.reply

    def commit_many(self, ops: Sequence[Txn], deadline: float) -> list[TxnReply | Exception | None]:
        """Attempt one caller's transactions once each, packed together, several packs at a time."""
        entries, batches = self._queue.packed(ops)
        timeout = self._queue.timeout(deadline)

        def carry(batch: Batch) -> None:
            try:
                _settled(batch, self._client.attempt(*_question(batch), timeout))
            except Failed as error:
                self._queue.failed(batch, error)

        if len(batches) > 1:
            with ThreadPoolExecutor(_PACKS_AT_ONCE, "stepclaim-packs") as pool:
                list(pool.map(carry, batches))
        elif batches:
            carry(batches[0])
        return _outcomes(entries)

    def _alone(self, op: Txn, timeout: float) -> TxnReply:
        answer = self._client.attempt(txn, txn_request(op), timeout)
        return txn_reply(answer, fenced=op.fence is not None)

    def _lead(self, entry: Pending, timeout: float) -> None:
        """Send what waits, with this thread's own first, and hand the lead on before those who wait are woken."""
        ready = [entry]
        try:
            batch, ready = self._queue.batch(entry)
            try:
                if batch.members:
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

    def _wait(self, entry: Pending, timeout: float) -> bool:
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
        self._queue = _Queue(attempt_timeout)
        self._busy = False
        self._flights: asyncio.Task[None] | None = None

    async def commit(self, op: Txn, timeout: float, deadline: float) -> TxnReply:
        """Attempt a transaction once, alone or with others; raises `Failed`."""
        queue = self._queue
        if timeout == queue.attempt_timeout and not self._busy:
            self._busy = True
            try:
                return queue.lone(op, await self._alone(op, timeout))
            finally:
                self._busy = False
                self._go_on(timeout)
        entry = queue.entry(op, timeout, deadline)
        if entry is None:
            return await self._alone(op, timeout)
        entry.gate = asyncio.get_running_loop().create_future()
        queue.wait(entry)
        self._go_on(timeout)
        try:
            await entry.gate
        except asyncio.CancelledError:
            entry.take()
            raise
        if entry.error is not None:
            raise entry.error
        return await self._alone(op, timeout) if entry.reply is None else entry.reply

    async def commit_many(self, ops: Sequence[Txn], deadline: float) -> list[TxnReply | Exception | None]:
        """Attempt one caller's transactions once each, packed together, several packs at a time."""
        entries, batches = self._queue.packed(ops)
        timeout = self._queue.timeout(deadline)
        left = iter(batches)

        async def carry() -> None:
            for batch in left:
                try:
                    _settled(batch, await self._client.attempt(*_question(batch), timeout))
                except Failed as error:
                    self._queue.failed(batch, error)

        await asyncio.gather(*(carry() for _ in batches[:_PACKS_AT_ONCE]))
        return _outcomes(entries)

    async def _alone(self, op: Txn, timeout: float) -> TxnReply:
        answer = await self._client.attempt(txn, txn_request(op), timeout)
        return txn_reply(answer, fenced=op.fence is not None)

    def _go_on(self, timeout: float) -> None:
        """See that somebody sends what waits."""
        if self._queue.waiting and not self._busy:
            self._busy = True
            self._flights = asyncio.get_running_loop().create_task(self._fly_on(timeout))

    async def _fly_on(self, timeout: float) -> None:
        waiting = self._queue.waiting
        try:
            while waiting:
                await self._fly(timeout)
                await asyncio.sleep(0)  # those who were answered come back first, and go together
        finally:
            self._busy = False
            while waiting:  # this task was cancelled from outside: they go alone
                entry = waiting.popleft()
                if not entry.gate.done():
                    entry.gate.set_result(None)

    async def _fly(self, timeout: float) -> None:
        batch, ready = self._queue.batch()
        try:
            if batch.members:
                ready += self._queue.answered(batch, await self._client.attempt(*_question(batch), timeout))
        except BaseException as error:
            ready += self._queue.failed(batch, error)
            if not isinstance(error, Exception):
                raise
        finally:
            for each in ready:
                if not each.gate.done():
                    each.gate.set_result(None)
