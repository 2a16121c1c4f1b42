"""Performs programs' operations on etcd, for threads and for asyncio, alike line by line."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from msgspec.structs import replace

from stepclaim._core.driving import drive
from stepclaim._core.ops import (
    Begin,
    Fence,
    Finish,
    Get,
    Later,
    Many,
    Op,
    OpenSession,
    Program,
    Range,
    SessionView,
    Txn,
    TxnReply,
    UntilChanged,
)
from stepclaim._etcd.channel import first_timeout, too_late
from stepclaim._etcd.queue import ranged, txn
from stepclaim._etcd.retry import Failed
from stepclaim._etcd.watch import until_changed, until_changed_async
from stepclaim._etcd.wire import fence_request, range_reply, range_request, txn_reply, txn_request
from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from stepclaim._core.ops import KeyValue, RangeReply
    from stepclaim._etcd.aio_client import AsyncClient
    from stepclaim._etcd.client import Client

R = TypeVar("R")


class SessionSource(Protocol):
    """What the drivers ask of the keeper of the session."""

    def view(self) -> SessionView | None:
        """Give the live session at once, or None."""

    def wait_view(self, deadline: float) -> SessionView:
        """Wait for the live session."""

    def barrier(self, key: bytes, found: KeyValue | None, revision: int | None = None) -> None:
        """Take note of the barrier."""

    def passed(self, session: SessionView) -> bool:
        """Tell whether the barrier has moved on from where it was, so that nothing sent behind it can happen."""

    def later(self, later: Later) -> None:
        """Run a program in the background."""


def writes(op: Txn) -> bool:
    """Whether a transaction can change anything: else it is a read, and is never in doubt."""
    return op.fence is not None or any(not isinstance(each, Get) for each in op.success)


def _told(op: Txn, reply: TxnReply, source: SessionSource | None) -> TxnReply:
    """Take note of the barrier, where a transaction did not hold and showed it."""
    if reply.barrier and op.fence is not None and source is not None:
        source.barrier(op.fence.key, reply.barrier[0])
    return reply


def _rewritten(op: Fence, reply: TxnReply, source: SessionSource | None) -> TxnReply:
    if source is not None:
        source.barrier(op.session.key, None, reply.revision if reply.succeeded else None)
    return reply


def _alone(get: Get) -> Range:
    return Range(key=get.key, range_end=b"")


def _found(pages: list[RangeReply]) -> TxnReply:
    """Tell what was read key by key as a transaction's reads; each is as new as the last."""
    found = tuple(page.kvs[0] if page.kvs else None for page in pages)
    return TxnReply(False, min((page.revision for page in pages), default=0), found)


def _local(op: Op[Any], source: SessionSource | None) -> Any:
    if isinstance(op, OpenSession):
        raise ConfigurationError("this store was opened with session=False: it can look and release, but not claim")
    if isinstance(op, Later):
        if source is None:  # a store without a session: the caller was told, and tries again or not
            return None
        return source.later(op)
    raise TypeError(f"unknown operation {op!r}")


class Performer:
    """Performs operations for threads."""

    def __init__(self, client: Client, source: SessionSource | None, attempts: int = 0) -> None:
        self._client = client
        self._source = source
        self._attempts = attempts
        """How often a read is tried at most; 0 is until the deadline."""
        self._fencing = threading.Lock()

    def perform(self, op: Op[Any], deadline: float) -> Any:
        """Perform one operation; gives its reply."""
        client, source = self._client, self._source
        if isinstance(op, Txn):
            if writes(op):
                return self._write(op, deadline)
            return txn_reply(client.call(txn, txn_request(op), deadline))
        if isinstance(op, OpenSession) and source is not None:
            return source.wait_view(deadline)
        if isinstance(op, Range):
            shared = client.committer.read(op, deadline) if op.shared else None
            if shared is not None:
                return shared
            return range_reply(client.call(ranged, range_request(op), deadline, attempts=self._attempts), lazy=op.lazy)
        if isinstance(op, Begin):
            return self._begin(op.op, deadline)
        if isinstance(op, Finish):
            return op.begun()
        if isinstance(op, UntilChanged):
            return until_changed(client, op.key, op.revision, deadline)
        if isinstance(op, Fence):
            return self._fence(op, deadline)
        return _local(op, source)

    def _fence(self, op: Fence, deadline: float) -> TxnReply:
        """Fence once for all who have the same barrier; those who come after the first only read."""
        client, source = self._client, self._source
        if not self._fencing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise too_late()
        try:
            if source is None or not source.passed(op.session):
                return _rewritten(op, txn_reply(client.call(txn, fence_request(op), deadline)), source)
        finally:
            self._fencing.release()
        pages = [range_reply(client.call(ranged, range_request(each), deadline)) for each in map(_alone, op.gets)]
        return _found(pages)

    def _begin(self, op: Many | Range, deadline: float) -> Callable[[], Any]:
        """Send it; what is given back waits for the reply."""
        client = self._client
        if isinstance(op, Range):
            request = range_request(op)
            timeout = max(0.0, min(deadline - time.monotonic(), client.settings.attempt_timeout))
            answer = client.begin(ranged, request, timeout)
            return lambda: range_reply(client.call(ranged, request, deadline, begun=answer), lazy=op.lazy)
        sent = client.committer.send(op.txns, deadline)
        return lambda: [
            self._one(each, first, deadline)
            for each, first in zip(op.txns, client.committer.answers(sent), strict=True)
        ]

    def _one(self, op: Txn, first: TxnReply | Exception | None, deadline: float) -> TxnReply | Exception:
        try:
            if isinstance(first, TxnReply):
                return _told(op, first, self._source)
            return self._write(op, deadline, first)
        except Exception as error:  # noqa: BLE001 - the program that asked for this one decides
            return error

    def _write(self, op: Txn, deadline: float, first: Exception | None = None) -> TxnReply:
        """Send a write until it is answered; the first attempt may have been made."""
        client, fenced = self._client, op.fence is not None
        try:
            if first is not None:
                raise first
            reply = client.committer.commit(op, first_timeout(client.settings, deadline, fenced=fenced), deadline)
        except Failed as failed:

            def again(timeout: float) -> TxnReply:
                return client.committer.commit(op, timeout, deadline)

            reply, in_doubt = client.persist(again, deadline, failed=failed, write=True, fenced=fenced)
            if in_doubt:
                reply = replace(reply, in_doubt=True)  # a reply may be another caller's, too
        return _told(op, reply, self._source) if reply.barrier else reply


def run_program(
    client: Client, source: SessionSource | None, program: Program[R], deadline: float, *, attempts: int = 0
) -> R:
    """Run a program for a thread."""
    performer = Performer(client, source, attempts)
    return drive(program, performer.perform, deadline)


class AsyncPerformer:
    """Performs operations for asyncio."""

    def __init__(
        self,
        client: AsyncClient,
        source: SessionSource | None,
        changed: asyncio.Event,
        attempts: int = 0,
    ) -> None:
        self._client = client
        self._source = source
        self._changed = changed
        """Set when there is another session."""
        self._attempts = attempts
        """How often a read is tried at most; 0 is until the deadline."""
        self._fencing = asyncio.Lock()

    def perform(self, op: Op[Any], deadline: float) -> Awaitable[Any]:
        """Perform one operation; gives its reply."""
        if isinstance(op, Txn) and writes(op):
            return self._write(op, deadline)
        return self._perform(op, deadline)

    async def _perform(self, op: Op[Any], deadline: float) -> Any:
        client, source = self._client, self._source
        if isinstance(op, Txn):
            return txn_reply(await client.call(txn, txn_request(op), deadline))
        if isinstance(op, OpenSession) and source is not None:
            return await self._wait_view(source, deadline)
        if isinstance(op, Range):
            sharing = client.committer.read(op, deadline) if op.shared else None
            shared = await sharing if sharing is not None else None
            if shared is not None:
                return shared
            answer = await client.call(ranged, range_request(op), deadline, attempts=self._attempts)
            return range_reply(answer, lazy=op.lazy)
        if isinstance(op, Many):
            return await self._many(op.txns, deadline)
        if isinstance(op, Begin):
            return _under_way(self._perform(op.op, deadline))
        if isinstance(op, Finish):
            return await op.begun
        if isinstance(op, UntilChanged):
            return await until_changed_async(client, op.key, op.revision, deadline)
        if isinstance(op, Fence):
            return await self._fence(op, deadline)
        return _local(op, source)

    async def _fence(self, op: Fence, deadline: float) -> TxnReply:
        """Fence once for all who have the same barrier; those who come after the first only read."""
        client, source = self._client, self._source
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._fencing.acquire()
        except TimeoutError:
            raise too_late() from None
        try:
            if source is None or not source.passed(op.session):
                return _rewritten(op, txn_reply(await client.call(txn, fence_request(op), deadline)), source)
        finally:
            self._fencing.release()
        pages = [range_reply(await client.call(ranged, range_request(each), deadline)) for each in map(_alone, op.gets)]
        return _found(pages)

    async def _wait_view(self, source: SessionSource, deadline: float) -> SessionView:
        while (view := source.view()) is None:
            self._changed.clear()
            left = deadline - time.monotonic()
            if left <= 0:
                return source.wait_view(deadline)  # which tells that there is none
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, 0.5))
        return view

    async def _many(self, ops: Sequence[Txn], deadline: float) -> list[TxnReply | Exception]:
        replies: dict[int, TxnReply | Exception] = {}

        async def one(at: int, op: Txn, first: Exception | None) -> None:
            try:
                replies[at] = await self._write(op, deadline, first)
            except Exception as error:  # noqa: BLE001 - the program that asked for this one decides
                replies[at] = error

        more = []
        for at, (op, first) in enumerate(
            zip(ops, await self._client.committer.commit_many(ops, deadline), strict=True)
        ):
            if isinstance(first, TxnReply):
                replies[at] = _told(op, first, self._source)
            else:
                more.append(one(at, op, first))
        if more:
            await asyncio.gather(*more)
        return [replies[at] for at in range(len(ops))]

    async def _write(self, op: Txn, deadline: float, first: Exception | None = None) -> TxnReply:
        """Send a write until it is answered; the first attempt may have been made."""
        client, fenced = self._client, op.fence is not None
        try:
            if first is not None:
                raise first
            timeout = first_timeout(client.settings, deadline, fenced=fenced)
            shared = await client.committer.commit(op, timeout, deadline)
            reply = await client.committer.alone(op, timeout) if shared is None else shared
        except Failed as failed:

            async def again(timeout: float) -> TxnReply:
                shared = await client.committer.commit(op, timeout, deadline)
                return await client.committer.alone(op, timeout) if shared is None else shared

            reply, in_doubt = await client.persist(again, deadline, failed=failed, write=True, fenced=fenced)
            if in_doubt:
                reply = replace(reply, in_doubt=True)  # a reply may be another caller's, too
        return _told(op, reply, self._source) if reply.barrier else reply


def _under_way(call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
    """Run a call beside its program. Its error is the program's affair; if nobody asks for it any more, nobody's."""
    task = asyncio.ensure_future(call)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
