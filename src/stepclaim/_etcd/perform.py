"""Performs programs' operations on etcd, for threads and for asyncio, alike line by line."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from msgspec.structs import replace

from stepclaim._core.driving import drive, drive_async
from stepclaim._core.ops import (
    Fence,
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
from stepclaim._etcd.commit import ranged, txn
from stepclaim._etcd.watch import until_changed, until_changed_async
from stepclaim._etcd.wire import fence_request, range_reply, range_request, txn_reply, txn_request
from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from stepclaim._core.ops import KeyValue
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

    def later(self, later: Later) -> None:
        """Run a program in the background."""


def writes(op: Txn) -> bool:
    """Whether a transaction can change anything: else it is a read, and is never in doubt."""
    return op.fence is not None or any(not isinstance(each, Get) for each in op.success)


def _noted(op: Txn, reply: TxnReply, source: SessionSource | None, *, in_doubt: bool) -> TxnReply:
    if op.fence is not None and reply.barrier and source is not None:
        source.barrier(op.fence.key, reply.barrier[0])
    return replace(reply, in_doubt=True) if in_doubt else reply  # a reply may be another caller's, too


def _rewritten(op: Fence, reply: TxnReply, source: SessionSource | None) -> TxnReply:
    if source is not None:
        source.barrier(op.session.key, None, reply.revision if reply.succeeded else None)
    return reply


def _local(op: Op[Any], source: SessionSource | None) -> Any:
    if isinstance(op, OpenSession):
        raise ConfigurationError("this store was opened with session=False: it can look and release, but not claim")
    if isinstance(op, Later):
        if source is None:  # a store without a session: the caller was told, and tries again or not
            return None
        return source.later(op)
    raise TypeError(f"unknown operation {op!r}")


def _many(
    client: Client, source: SessionSource | None, ops: Sequence[Txn], deadline: float
) -> list[TxnReply | Exception]:
    def one(op: Txn, first: TxnReply | Exception | None) -> TxnReply | Exception:
        if isinstance(first, TxnReply):
            return _noted(op, first, source, in_doubt=False)
        told = [] if first is None else [first]

        def attempt(timeout: float) -> TxnReply:
            if told:
                raise told.pop()
            return client.committer.commit(op, timeout, deadline)

        try:
            reply, in_doubt = client.persist(attempt, deadline, write=True, fenced=op.fence is not None)
        except Exception as error:  # noqa: BLE001 - the program that asked for this one decides
            return error
        return _noted(op, reply, source, in_doubt=in_doubt)

    return [one(op, first) for op, first in zip(ops, client.committer.commit_many(ops, deadline), strict=True)]


async def _many_async(
    client: AsyncClient, source: SessionSource | None, ops: Sequence[Txn], deadline: float
) -> list[TxnReply | Exception]:
    async def one(op: Txn, first: Exception | None) -> TxnReply | Exception:
        told = [] if first is None else [first]

        async def attempt(timeout: float) -> TxnReply:
            if told:
                raise told.pop()
            return await client.committer.commit(op, timeout, deadline)

        try:
            reply, in_doubt = await client.persist(attempt, deadline, write=True, fenced=op.fence is not None)
        except Exception as error:  # noqa: BLE001 - the program that asked for this one decides
            return error
        return _noted(op, reply, source, in_doubt=in_doubt)

    replies: list[TxnReply | Exception | None] = []
    more: list[tuple[int, Any]] = []
    for op, first in zip(ops, await client.committer.commit_many(ops, deadline), strict=True):
        if isinstance(first, TxnReply):
            replies.append(_noted(op, first, source, in_doubt=False))
        else:
            more.append((len(replies), one(op, first)))
            replies.append(None)
    for (at, _), reply in zip(more, await asyncio.gather(*(each for _, each in more)), strict=True):
        replies[at] = reply
    return [each for each in replies if each is not None]


def run_program(
    client: Client, source: SessionSource | None, program: Program[R], deadline: float, *, attempts: int = 0
) -> R:
    """Run a program for a thread."""

    def perform(op: Op[Any]) -> Any:
        if isinstance(op, Txn):
            if not writes(op):
                return txn_reply(client.call(txn, txn_request(op), deadline))
            reply, in_doubt = client.persist(
                lambda timeout: client.committer.commit(op, timeout, deadline),
                deadline,
                write=True,
                fenced=op.fence is not None,
            )
            return _noted(op, reply, source, in_doubt=in_doubt)
        if isinstance(op, Many):
            return _many(client, source, op.txns, deadline)
        if isinstance(op, Range):
            return range_reply(client.call(ranged, range_request(op), deadline, attempts=attempts))
        if isinstance(op, OpenSession) and source is not None:
            return source.view() or source.wait_view(deadline)
        if isinstance(op, UntilChanged):
            return until_changed(client, op.key, op.revision, deadline)
        if isinstance(op, Fence):
            return _rewritten(op, txn_reply(client.call(txn, fence_request(op), deadline)), source)
        return _local(op, source)

    return drive(program, perform)


async def run_program_async(
    client: AsyncClient,
    source: SessionSource | None,
    program: Program[R],
    deadline: float,
    wait_view: Callable[[float], Awaitable[SessionView]],
    *,
    attempts: int = 0,
) -> R:
    """Run a program for a task."""

    async def perform(op: Op[Any]) -> Any:
        if isinstance(op, Txn):
            if not writes(op):
                return txn_reply(await client.call(txn, txn_request(op), deadline))
            reply, in_doubt = await client.persist(
                lambda timeout: client.committer.commit(op, timeout, deadline),
                deadline,
                write=True,
                fenced=op.fence is not None,
            )
            return _noted(op, reply, source, in_doubt=in_doubt)
        if isinstance(op, Many):
            return await _many_async(client, source, op.txns, deadline)
        if isinstance(op, Range):
            return range_reply(await client.call(ranged, range_request(op), deadline, attempts=attempts))
        if isinstance(op, OpenSession) and source is not None:
            return source.view() or await wait_view(deadline)
        if isinstance(op, UntilChanged):
            return await until_changed_async(client, op.key, op.revision, deadline)
        if isinstance(op, Fence):
            return _rewritten(op, txn_reply(await client.call(txn, fence_request(op), deadline)), source)
        return _local(op, source)

    return await drive_async(program, perform)
