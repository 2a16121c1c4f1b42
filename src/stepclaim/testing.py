"""Stores in memory with the semantics of the stores on etcd, and pytest fixtures, for your own tests.

The same programs run here against a small key-value store that keeps etcd's rules for transactions, revisions and
leases. In a `conftest.py`, `pytest_plugins = ["stepclaim.testing"]` gives the fixtures `stepclaim_store` (in memory)
and `stepclaim_etcd` (a real etcd for the whole test session).
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core.context import Context
from stepclaim._core.keys import Keyspace
from stepclaim._core.ops import (
    Action,
    Compare,
    Delete,
    Fence,
    Get,
    KeyValue,
    Later,
    Op,
    OpenSession,
    Program,
    Put,
    Range,
    RangeReply,
    SessionView,
    Txn,
    TxnReply,
)
from stepclaim.async_store import AsyncRunStore
from stepclaim.embedded import EmbeddedEtcd
from stepclaim.errors import StoreClosedError
from stepclaim.identity import new_id, utc_now
from stepclaim.session import Session
from stepclaim.settings import Settings
from stepclaim.sync_store import RunStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

R = TypeVar("R")

_UNBATCHED = 128
"""etcd refuses a transaction with more operations."""


class InMemoryBackend:
    """What several stores in memory share, as several workers share one etcd."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kvs: dict[bytes, KeyValue] = {}
        self._revision = 1
        self._leases = 0

    def grant(self) -> int:
        """Give a new lease."""
        with self._lock:
            self._leases += 1
            return self._leases

    def revoke(self, lease: int) -> None:
        """End a lease: all its keys go, at one revision."""
        with self._lock:
            gone = [key for key, kv in self._kvs.items() if kv.lease == lease]
            self._revision += bool(gone)
            for key in gone:
                del self._kvs[key]

    def txn(self, op: Txn) -> TxnReply:
        """Carry out one transaction."""
        with self._lock:
            succeeded = all(self._holds(each) for each in op.compares) and self._unfenced(op.fence)
            return self._apply(op.success if succeeded else op.failure, succeeded=succeeded)

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
            if op.range_end:
                kvs = [self._kvs[key] for key in sorted(self._kvs) if op.key <= key < op.range_end]
            else:
                kvs = [self._kvs[op.key]] if op.key in self._kvs else []
            if op.newest_first:
                kvs.sort(key=lambda kv: kv.create_revision, reverse=True)
                kvs = kvs[: op.limit or None]
            return RangeReply(kvs, self._revision, more=False, count=len(kvs))

    def get(self, key: bytes) -> KeyValue | None:
        """Look at one key."""
        with self._lock:
            return self._kvs.get(key)

    def _holds(self, compare: Compare) -> bool:
        kv = self._kvs.get(compare.key)
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
        self._revision += any(
            isinstance(each, Put) or (isinstance(each, Delete) and each.key in self._kvs) for each in actions
        )
        for each in actions:
            old = self._kvs.get(each.key)
            if isinstance(each, Get):
                found.append(old)
            elif isinstance(each, Delete):
                self._kvs.pop(each.key, None)
            else:
                created = old.create_revision if old else self._revision
                self._kvs[each.key] = KeyValue(each.key, each.value, created, self._revision, each.lease)
        return TxnReply(succeeded, self._revision, tuple(found))


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
        return self._drive(op.program())

    def _drive(self, program: Program[R]) -> R:
        self._check()
        try:
            op = next(program)
            while True:
                op = program.send(self._perform(op))
        except StopIteration as stop:
            result: R = stop.value
            return result


class InMemoryRunStore(_InMemoryStore, RunStore):
    """A store in memory for threads. Give several the same `InMemoryBackend` to have them compete."""

    def _run(self, program: Program[R]) -> R:
        return self._drive(program)

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
        return asyncio.Event()

    async def _run(self, program: Program[R]) -> R:
        self._check()
        try:
            op = next(program)
            while True:
                await asyncio.sleep(0)  # others get their turn between two operations, as they would on etcd
                op = program.send(self._perform(op))
        except StopIteration as stop:
            result: R = stop.value
            return result

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
