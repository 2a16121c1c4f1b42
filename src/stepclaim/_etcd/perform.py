"""Performs programs' operations on etcd, for threads and for asyncio, alike line by line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stepclaim._core.driving import drive, drive_async
from stepclaim._core.ops import (
    Fence,
    Get,
    Later,
    Op,
    OpenSession,
    Program,
    Range,
    SessionView,
    Txn,
    TxnReply,
    UntilChanged,
)
from stepclaim._etcd.watch import until_changed, until_changed_async
from stepclaim._etcd.wire import fence_request, range_reply, range_request, split_fence, txn_reply, txn_request
from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stepclaim._core.ops import KeyValue
    from stepclaim._etcd.aio_client import AsyncClient
    from stepclaim._etcd.channel import Member
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
    return any(not isinstance(each, Get) for each in op.success)


def _txn(member: Member) -> Any:
    return member.txn


def _range(member: Member) -> Any:
    return member.range


def _fenced(op: Txn, reply: TxnReply, source: SessionSource | None) -> TxnReply:
    if op.fence is None or reply.succeeded:
        return reply
    reply, barrier = split_fence(reply)
    if source is not None:
        source.barrier(op.fence.key, barrier)
    return reply


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


def run_program(
    client: Client, source: SessionSource | None, program: Program[R], deadline: float, *, attempts: int = 0
) -> R:
    """Run a program for a thread."""

    def perform(op: Op[Any]) -> Any:
        if isinstance(op, Txn):
            answer, in_doubt = client.call(
                _txn, txn_request(op), deadline, write=writes(op), fenced=op.fence is not None
            )
            return _fenced(op, txn_reply(answer, in_doubt=in_doubt), source)
        if isinstance(op, Range):
            answer, _ = client.call(_range, range_request(op), deadline, attempts=attempts)
            return range_reply(answer)
        if isinstance(op, OpenSession) and source is not None:
            return source.view() or source.wait_view(deadline)
        if isinstance(op, UntilChanged):
            return until_changed(client, op.key, op.revision, deadline)
        if isinstance(op, Fence):
            answer, _ = client.call(_txn, fence_request(op), deadline)
            return _rewritten(op, txn_reply(answer), source)
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
            answer, in_doubt = await client.call(
                _txn, txn_request(op), deadline, write=writes(op), fenced=op.fence is not None
            )
            return _fenced(op, txn_reply(answer, in_doubt=in_doubt), source)
        if isinstance(op, Range):
            answer, _ = await client.call(_range, range_request(op), deadline, attempts=attempts)
            return range_reply(answer)
        if isinstance(op, OpenSession) and source is not None:
            return source.view() or await wait_view(deadline)
        if isinstance(op, UntilChanged):
            return await until_changed_async(client, op.key, op.revision, deadline)
        if isinstance(op, Fence):
            answer, _ = await client.call(_txn, fence_request(op), deadline)
            return _rewritten(op, txn_reply(answer), source)
        return _local(op, source)

    return await drive_async(program, perform)
