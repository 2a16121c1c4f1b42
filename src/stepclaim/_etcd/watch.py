"""Watch streams: each lives for a limited time and is opened again behind what it gave, so that none goes silent."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
from etcd3 import etcdrpc

from stepclaim._core.ops import Batch, Compacted, Event, KeyValue
from stepclaim._etcd.status import timed_out
from stepclaim.errors import DeadlineExceededError, PermissionDeniedError, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Generator

    from stepclaim._etcd.aio_client import AsyncClient
    from stepclaim._etcd.channel import Member
    from stepclaim._etcd.client import Client

LIFETIME = 8.0
"""Seconds after which a stream is opened anew: a half-open connection or a hung member costs no more than that."""
PAUSE = 0.1
TOO_LITTLE = 0.05
"""Seconds before a wait's end in which nothing is sent any more: a claim whose answer can't come would be in doubt."""


def request(key: bytes, range_end: bytes, start: int) -> Any:
    """Make the message that watches a range from a revision on."""
    return etcdrpc.WatchRequest(
        create_request=etcdrpc.WatchCreateRequest(key=key, range_end=range_end, start_revision=start)
    )


def read(response: Any) -> Batch | None:
    """Read one answer: events, or None where it only opens the stream or ends it for a passing reason."""
    if response.canceled:
        if response.compact_revision:
            raise Compacted
        if "permission denied" in response.cancel_reason.lower():
            raise PermissionDeniedError(
                f"etcd refuses to watch these keys: {response.cancel_reason}; grant the user's role read on the prefix",
                code="PERMISSION_DENIED",
                definite=True,
            )
        return None
    if not response.events:
        return None
    return Batch([_event(each) for each in response.events])


def _range(member: Member) -> Any:
    return member.range


def _any(key: bytes) -> Any:
    return etcdrpc.RangeRequest(key=key, keys_only=True)


def _event(each: Any) -> Event:
    kv = each.kv
    if each.type == each.DELETE:
        return Event(kv.key, None, kv.mod_revision)
    return Event(kv.key, KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.lease), kv.mod_revision)


def lifetime(deadline: float | None) -> float:
    """Give one stream's time, within the caller's."""
    if deadline is None:
        return LIFETIME
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("the call's deadline has passed", code="DEADLINE_EXCEEDED", definite=True)
    return min(LIFETIME, left)


def stream(
    client: Client, key: bytes, range_end: bytes, start: int, deadline: float | None
) -> Generator[Batch, None, None]:
    """Give what one stream gives until its time is over or it breaks; raise only what another can't mend."""
    if client.closing:
        raise StoreClosedError("the store is closed: open another one")
    if client.members.needs_login:
        client.call(_range, _any(key), time.monotonic() + lifetime(deadline))  # logs in on its way
    members = client.members
    member = members.current
    call = member.watch.Watch(
        iter((request(key, range_end, start),)), timeout=lifetime(deadline), metadata=members.metadata
    )
    client.streams.add(call)
    if client.closing:  # since it was asked above: what ended all streams may not have seen this one
        call.cancel()
    heard = False
    try:
        for response in call:
            heard = True
            batch = read(response)
            if batch is not None:
                yield batch
            elif response.canceled:
                members.stream_ended(response.cancel_reason)
                time.sleep(PAUSE)
                return
    except grpc.RpcError as error:
        if timed_out(error) and heard:
            return  # its time is over, nothing is wrong
        failure = members.failed(error, member)
        if client.closing or failure.transient:
            time.sleep(PAUSE)
            return
        raise failure.error from error
    finally:
        client.streams.discard(call)
        call.cancel()


async def stream_async(
    client: AsyncClient, key: bytes, range_end: bytes, start: int, deadline: float | None
) -> AsyncGenerator[Batch]:
    """Give what one stream gives until its time is over or it breaks; raise only what another can't mend."""
    if client.members.needs_login:
        await client.call(_range, _any(key), time.monotonic() + lifetime(deadline))

    async def ask() -> AsyncIterator[Any]:
        yield request(key, range_end, start)

    if client.closing:
        raise StoreClosedError("the store is closed: open another one")
    members = client.members
    member = members.current
    call = member.watch.Watch(ask(), timeout=lifetime(deadline), metadata=members.metadata)
    client.streams.add(call)
    heard = False
    try:
        async for response in call:
            heard = True
            batch = read(response)
            if batch is not None:
                yield batch
            elif response.canceled:
                members.stream_ended(response.cancel_reason)
                await asyncio.sleep(PAUSE)
                return
    except grpc.RpcError as error:
        if timed_out(error) and heard:
            return
        failure = members.failed(error, member)
        if client.closing or failure.transient:
            await asyncio.sleep(PAUSE)
            return
        raise failure.error from error
    except asyncio.CancelledError as error:
        if client.closed_beneath(error):
            return
        raise
    finally:
        client.streams.discard(call)
        call.cancel()


def _still_worth_it(deadline: float) -> None:
    if deadline - time.monotonic() < TOO_LITTLE:
        raise DeadlineExceededError("the call's deadline has passed", code="DEADLINE_EXCEEDED", definite=True)


def until_changed(client: Client, key: bytes, revision: int, deadline: float) -> None:
    """Wait for one stream's first events, or for its end."""
    events = stream(client, key, b"", revision + 1, deadline)
    try:
        for _ in events:
            return
        _still_worth_it(deadline)
    except Compacted:
        return  # so there was a change
    finally:
        events.close()


async def until_changed_async(client: AsyncClient, key: bytes, revision: int, deadline: float) -> None:
    """Wait for one stream's first events, or for its end."""
    events = stream_async(client, key, b"", revision + 1, deadline)
    try:
        async for _ in events:
            return
        _still_worth_it(deadline)
    except Compacted:
        return
    finally:
        await events.aclose()
