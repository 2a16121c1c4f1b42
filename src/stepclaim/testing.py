"""Stores in memory with the semantics of the stores on etcd, and pytest fixtures, for your own tests.

The same programs run here against a small key-value store that keeps etcd's rules for transactions, revisions and
leases. In a `conftest.py`, `pytest_plugins = ["stepclaim.testing"]` gives the fixtures `stepclaim_store` (in memory)
and `stepclaim_etcd` (a real etcd for the whole test session).
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core.context import Context
from stepclaim._core.keys import Keyspace
from stepclaim._core.ops import (
    Abandoned,
    Action,
    Batch,
    Compare,
    Delete,
    Event,
    Fence,
    Get,
    KeyValue,
    Later,
    Op,
    OpenSession,
    Program,
    Put,
    PutOnce,
    Range,
    RangeReply,
    SessionView,
    Txn,
    TxnReply,
    UntilChanged,
    prefix_end,
)
from stepclaim.async_run_store import AsyncRunStore
from stepclaim.embedded import EmbeddedEtcd
from stepclaim.errors import DeadlineExceededError, StepClaimError, StoreClosedError
from stepclaim.identity import new_id, utc_now
from stepclaim.run_store import RunStore
from stepclaim.session import Session
from stepclaim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from types import TracebackType
    from typing import Self

    from stepclaim.models import StepClaim

R = TypeVar("R")

_UNBATCHED = 128
"""etcd refuses a transaction with more operations."""


_TIMEOUT = 10.0
_LONGEST_WAIT = 1.0


def _left(deadline: float | None) -> float:
    """Give the time for one wait: not for ever, so that a store that was closed is noticed."""
    if deadline is None:
        return _LONGEST_WAIT
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("the call's deadline has passed", code="DEADLINE_EXCEEDED", definite=True)
    return min(left, _LONGEST_WAIT)


class InMemoryBackend:
    """What several stores in memory share, as several workers share one etcd."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kvs: dict[bytes, KeyValue] = {}
        self._revision = 1
        self._leases = 0
        self._history: list[Event] = []
        self._listeners: list[Callable[[], None]] = []

    def grant(self) -> int:
        """Give a new lease."""
        with self._lock:
            self._leases += 1
            return self._leases

    def revoke(self, lease: int) -> None:
        """End a lease: all its keys go, at one revision."""
        with self._lock:
            gone = sorted(key for key, kv in self._kvs.items() if kv.lease == lease)  # as etcd orders its events
            self._revision += bool(gone)
            for key in gone:
                self._write(key, None)
        self._tell()

    def txn(self, op: Txn) -> TxnReply:
        """Carry out one transaction."""
        with self._lock:
            succeeded = all(self._holds(each) for each in op.compares) and self._unfenced(op.fence)
            before = self._revision
            reply = self._apply(op.success if succeeded else op.failure, succeeded=succeeded)
        if reply.revision != before:
            self._tell()
        return reply

    def fence(self, op: Fence) -> TxnReply:
        """Rewrite a session key while it still is that session's."""
        session = op.session
        with self._lock:
            succeeded = self._holds(Compare(session.key, "create", session.create_revision))
            rewrite = (Put(session.key, session.value, session.lease),) if succeeded else ()
            return self._apply((*rewrite, *op.gets), succeeded=succeeded)

    def range(self, op: Range) -> RangeReply:
        """Read keys in their order."""
        with self._lock:
            state = self._kvs if op.revision in (0, self._revision) else self._as_of(op.revision)
            if op.range_end:
                kvs = [state[key] for key in sorted(state) if op.key <= key < op.range_end]
            else:
                kvs = [state[op.key]] if op.key in state else []
            if op.newest_first:
                kvs.sort(key=lambda kv: kv.create_revision, reverse=True)
                kvs = kvs[: op.limit or None]
            return RangeReply(kvs, self._revision, more=False, count=len(kvs))

    def get(self, key: bytes) -> KeyValue | None:
        """Look at one key."""
        with self._lock:
            return self._kvs.get(key)

    def events(self, key: bytes, range_end: bytes, after: int) -> list[Event]:
        """Give what happened to keys after a revision, in its order."""
        with self._lock:
            first = bisect_right(self._history, after, key=lambda event: event.revision)
            return [
                event
                for event in self._history[first:]
                if event.key == key or (range_end and key <= event.key < range_end)
            ]

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call back after each write, from whoever writes, until the function that is given back is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _writes(self, each: Action) -> bool:
        if isinstance(each, PutOnce):
            return each.key not in self._kvs
        return isinstance(each, Put) or (isinstance(each, Delete) and bool(self._named(each)))

    def _named(self, each: Delete) -> list[bytes]:
        if each.range_end:
            return sorted(key for key in self._kvs if each.key <= key < each.range_end)
        return [each.key] if each.key in self._kvs else []

    def _write(self, key: bytes, kv: KeyValue | None) -> None:
        if kv is None:
            del self._kvs[key]
        else:
            self._kvs[key] = kv
        self._history.append(Event(key, kv, self._revision))

    def _as_of(self, revision: int) -> dict[bytes, KeyValue]:
        state: dict[bytes, KeyValue] = {}
        for event in self._history[: bisect_right(self._history, revision, key=lambda event: event.revision)]:
            if event.kv is None:
                state.pop(event.key, None)
            else:
                state[event.key] = event.kv
        return state

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _holds(self, compare: Compare) -> bool:
        if compare.range_end:
            named = [key for key in self._kvs if compare.key <= key < compare.range_end]
            return all(
                self._holds(Compare(key, compare.target, compare.expected, below=compare.below)) for key in named
            )
        kv = self._kvs.get(compare.key)
        if compare.below:
            return isinstance(compare.expected, int) and (kv.mod_revision if kv else 0) < compare.expected
        if compare.target == "value":
            return kv is not None and kv.value == compare.expected
        if kv is None:
            return compare.expected == 0
        return compare.expected == (kv.create_revision if compare.target == "create" else kv.mod_revision)

    def _unfenced(self, session: SessionView | None) -> bool:
        return session is None or self._holds(Compare(session.key, "mod", session.mod_revision))

    def _apply(self, actions: tuple[Action, ...], *, succeeded: bool) -> TxnReply:
        if len(actions) > _UNBATCHED:
            raise ValueError(f"{len(actions)} operations in one transaction: etcd would refuse them")
        found: list[KeyValue | None] = []
        put = tuple(each.key not in self._kvs for each in actions if isinstance(each, PutOnce))
        self._revision += any(self._writes(each) for each in actions)
        for each in actions:
            old = self._kvs.get(each.key)
            if isinstance(each, Get):
                found.append(old)
            elif isinstance(each, Delete):
                for key in self._named(each):
                    self._write(key, None)
            elif isinstance(each, PutOnce) and old is not None:
                continue
            else:
                created = old.create_revision if old else self._revision
                lease = each.lease if isinstance(each, Put) else 0
                self._write(each.key, KeyValue(each.key, each.value, created, self._revision, lease))
        return TxnReply(succeeded, self._revision, tuple(found), put=put)


class _InMemoryStore:
    """What the two stores in memory share: a session on the backend, and the performing of operations."""

    _closed = False

    def __init__(
        self,
        backend: InMemoryBackend | None = None,
        *,
        owner: str | None = None,
        prefix: str = "/stepclaim",
        lease_ttl: float | None = 30.0,
        value_limit: int = 256 * 1024,
    ) -> None:
        """Open a store on a backend that it may share with others, or on one of its own."""
        said: dict[str, Any] = {} if owner is None else {"owner": owner}
        settings = Settings(prefix=prefix, lease_ttl=lease_ttl, value_limit=value_limit, **said)
        self.backend = backend or InMemoryBackend()
        self._leased = lease_ttl is not None
        self._ctx = Context(
            Keyspace(settings.prefix), settings.owner_name, value_limit=value_limit, now=utc_now, new_id=new_id
        )
        self._callbacks: list[Callable[[Session], Any]] = []
        self._view, self._session = self._open_session()

    def _lost_event(self) -> Any:
        return threading.Event()

    @property
    def session(self) -> Session:
        """The session in use. It lives until the store is closed or `lose_session` ends it."""
        self._check()
        return self._session

    def lose_session(self) -> None:
        """End the session as its lease's end would: its held claims are gone, and the store opens another one."""
        self._check()
        self.backend.revoke(self._view.lease)
        self._session._tell_lost()  # noqa: SLF001 - this store is the session's other half
        self._view, self._session = self._open_session()

    def _open_session(self) -> tuple[SessionView, Session]:
        lease = self.backend.grant()
        name = f"{self._ctx.owner}-{new_id()[:12]}"
        key = self._ctx.keys.session(name)
        reply = self.backend.txn(Txn(compares=(), success=(Put(key, b'{"v":1}', lease),)))
        session = Session(name, self._ctx.owner, lease, None, self._callbacks, lambda tell: tell(), self._lost_event())
        view = SessionView(
            session_id=name,
            owner=self._ctx.owner,
            key=key,
            value=b'{"v":1}',
            lease=lease,
            claim_lease=lease if self._leased else 0,
            create_revision=reply.revision,
            mod_revision=reply.revision,
        )
        return view, session

    def _run_later(self, program: Callable[[], Program[Any]]) -> None:
        self._drive(program(), time.monotonic() + _TIMEOUT)

    def _watch_claim(self, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        key = self._ctx.keys.step(claim.run_id, claim.step_key).claim
        told = False

        def look() -> None:
            nonlocal told
            kv = self.backend.get(key)
            if not told and (kv is None or kv.mod_revision != claim.fencing_token):
                told = True
                self._deliver(lost)

        return self.backend.listen(look)

    def _deliver(self, tell: Callable[[], None]) -> None:
        tell()

    def _check(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed: open another one")

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self.backend.revoke(self._view.lease)

    def _perform(self, op: Op[Any]) -> Any:
        if isinstance(op, Txn):
            return self.backend.txn(op)
        if isinstance(op, Range):
            return self.backend.range(op)
        if isinstance(op, OpenSession):
            return self._view
        if isinstance(op, Fence):
            return self.backend.fence(op)
        assert isinstance(op, Later)
        return self._drive(op.program(), time.monotonic() + _TIMEOUT)

    def _wait(self, key: bytes, range_end: bytes, after: int, deadline: float | None) -> None:
        changed = threading.Event()
        unlisten = self.backend.listen(changed.set)
        try:
            if not self.backend.events(key, range_end, after):
                changed.wait(_left(deadline))
        finally:
            unlisten()

    def _drive(self, program: Program[R], deadline: float) -> R:
        self._check()
        try:
            op = next(program)
            while True:
                try:
                    reply: Any = None
                    if isinstance(op, UntilChanged):
                        self._wait(op.key, b"", op.revision, deadline)
                    else:
                        reply = self._perform(op)
                except StepClaimError as error:
                    op = program.throw(error)
                else:
                    op = program.send(reply)
        except StopIteration as stop:
            result: R = stop.value
            return result


class InMemoryRunStore(_InMemoryStore, RunStore):
    """A store in memory for threads. Give several the same `InMemoryBackend` to have them compete."""

    def _run(self, program: Program[R], timeout: float | None = None) -> R:
        return self._drive(program, time.monotonic() + (timeout or _TIMEOUT))

    def _batches(self, prefix: bytes, start: int, deadline: float | None) -> Iterator[Batch]:
        while deadline is None or time.monotonic() < deadline:
            self._check()
            events = self.backend.events(prefix, prefix_end(prefix), start - 1)
            if events:
                start = events[-1].revision + 1
                yield Batch(events)
            else:
                self._wait(prefix, prefix_end(prefix), start - 1, deadline)

    def close(self) -> None:
        """End the session, and with it, in at-least-once mode, the claims still held."""
        self._close()

    def __enter__(self) -> Self:
        """Give the store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()


class AsyncInMemoryRunStore(_InMemoryStore, AsyncRunStore):
    """A store in memory for asyncio. Give several the same `InMemoryBackend` to have them compete."""

    def _lost_event(self) -> Any:
        self._loop = asyncio.get_running_loop()
        return asyncio.Event()

    def _deliver(self, tell: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(tell)

    async def _run(self, program: Program[R], timeout: float | None = None) -> R:
        self._check()
        deadline = time.monotonic() + (timeout or _TIMEOUT)
        gone: asyncio.CancelledError | None = None
        try:
            op = next(program)
            while True:
                try:
                    await asyncio.sleep(0)  # others get their turn between two operations, as they would on etcd
                    reply: Any = None
                    if isinstance(op, UntilChanged):
                        await self._await(op.key, b"", op.revision, deadline)
                    else:
                        reply = self._perform(op)
                except StepClaimError as error:
                    op = program.throw(error)
                except asyncio.CancelledError as error:
                    gone = error
                    op = program.throw(Abandoned())
                else:
                    op = program.send(reply)
        except StopIteration as stop:
            result: R = stop.value
            return result
        except Abandoned:
            if gone is None:
                raise
            raise gone from None

    async def _await(self, key: bytes, range_end: bytes, after: int, deadline: float | None) -> None:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        left = _left(deadline)
        unlisten = self.backend.listen(wake)
        try:
            if not self.backend.events(key, range_end, after):
                await asyncio.wait_for(changed.wait(), left)
        except TimeoutError:
            return
        finally:
            unlisten()

    async def _batches(self, prefix: bytes, start: int, deadline: float | None) -> AsyncGenerator[Batch]:
        while deadline is None or time.monotonic() < deadline:
            self._check()
            events = self.backend.events(prefix, prefix_end(prefix), start - 1)
            if events:
                start = events[-1].revision + 1
                yield Batch(events)
            else:
                await self._await(prefix, prefix_end(prefix), start - 1, deadline)

    async def close(self) -> None:
        """End the session, and with it, in at-least-once mode, the claims still held."""
        self._close()

    async def __aenter__(self) -> Self:
        """Give the store."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        await self.close()


try:
    import pytest
except ImportError:  # the stores serve without pytest, too
    pass
else:

    @pytest.fixture
    def stepclaim_store() -> Iterator[InMemoryRunStore]:
        """Give an empty store in memory."""
        with InMemoryRunStore() as store:
            yield store

    @pytest.fixture(scope="session")
    def stepclaim_etcd() -> Iterator[EmbeddedEtcd]:
        """Start a real etcd for the whole test session; connect to its `endpoint`, with a prefix a test."""
        with EmbeddedEtcd() as etcd:
            yield etcd
