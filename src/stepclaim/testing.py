"""Stores in memory with the semantics of the stores on etcd, and pytest fixtures, for your own tests.

The same programs run here against `stepclaim.memory`, which keeps etcd's rules. In a `conftest.py`,
`pytest_plugins = ["stepclaim.testing"]` gives the fixtures `stepclaim_store` (in memory) and `stepclaim_etcd` (a real
etcd for the whole test session).
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core.driving import drive, drive_async
from stepclaim._core.ops import (
    Batch,
    Begin,
    Fence,
    Finish,
    Later,
    Many,
    Op,
    OpenSession,
    Program,
    Put,
    Range,
    SessionView,
    Txn,
    UntilChanged,
    prefix_end,
)
from stepclaim.async_run_store import AsyncRunStore
from stepclaim.embedded import EmbeddedEtcd
from stepclaim.errors import DeadlineExceededError, StoreClosedError
from stepclaim.identity import context_of
from stepclaim.memory import InMemoryBackend
from stepclaim.run_store import RunStore
from stepclaim.session import Session
from stepclaim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from types import TracebackType
    from typing import Self

    from stepclaim.models import StepClaim

__all__ = ["AsyncInMemoryRunStore", "InMemoryBackend", "InMemoryRunStore"]

R = TypeVar("R")


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
        self._ctx = context_of(settings)
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
        name = f"{self._ctx.owner}-{secrets.token_hex(6)}"
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
        if isinstance(op, Many):
            return self.backend.many(op.txns)
        if isinstance(op, Begin):
            return self._perform(op.op)
        if isinstance(op, Finish):
            return op.begun
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

        def perform(op: Op[Any], deadline: float) -> Any:
            if isinstance(op, UntilChanged):
                return self._wait(op.key, b"", op.revision, deadline)
            return self._perform(op)

        return drive(program, perform, deadline)


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

        async def perform(op: Op[Any], deadline: float) -> Any:
            await asyncio.sleep(0)  # others get their turn between two operations, as they would on etcd
            if isinstance(op, UntilChanged):
                return await self._await(op.key, b"", op.revision, deadline)
            return self._perform(op)

        return await drive_async(program, perform, deadline, set())

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
