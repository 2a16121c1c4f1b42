"""The store on etcd for asyncio."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core import runs
from stepclaim._core.driving import drive_async
from stepclaim._core.ops import Later, prefix_end
from stepclaim._etcd.aio_client import AsyncClient
from stepclaim._etcd.channel import NO_ACCESS, Access
from stepclaim._etcd.keeper import Keeper
from stepclaim._etcd.perform import AsyncPerformer
from stepclaim._etcd.watch import stream_async
from stepclaim.async_run_store import AsyncRunStore, carried_through, share_docstrings
from stepclaim.errors import ConfigurationError, StoreClosedError
from stepclaim.identity import borrowed, context_of, fork_error
from stepclaim.settings import Endpoints, Overrides, Settings
from stepclaim.sync_store import EtcdRunStore

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Callable,
        Coroutine,
        Generator,
    )
    from types import TracebackType
    from typing import Self, Unpack

    from stepclaim._core.ops import Batch, Program
    from stepclaim.models import StepClaim
    from stepclaim.session import Session

R = TypeVar("R")


class AsyncEtcdRunStore(AsyncRunStore):
    """A store on etcd, for any number of tasks of one event loop."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS, *, session: bool = True) -> None:
        """Prepare the store. Use `connect` or `from_client`."""
        self._pid = os.getpid()
        self._settings = settings
        self._timeout = settings.timeout
        self._access = access
        self._wants_session = session
        self._opened = False
        self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._calls: set[Program[Any]] = set()
        self._session_changed = asyncio.Event()
        self._ctx = context_of(settings)
        self._client: AsyncClient | None = None
        self._keeper: Keeper | None = None
        self._performer: AsyncPerformer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def connect(
        cls, endpoints: Settings | Endpoints | None = None, *, session: bool = True, **overrides: Unpack[Overrides]
    ) -> Self:
        return cls(Settings.resolve(endpoints, overrides), session=session)

    @classmethod
    def from_client(cls, client: Any, *, session: bool = True, **overrides: Unpack[Overrides]) -> Self:
        endpoints, access = borrowed(client)
        return cls(Settings.resolve(endpoints, overrides), access, session=session)

    @property
    def session(self) -> Session:
        self._check_open()
        if self._keeper is None:
            raise ConfigurationError("this store was opened with session=False: it has no session and can't claim")
        return self._keeper.session

    async def _open(self) -> Self:
        if self._opened or self._closed:
            raise StoreClosedError("a store is opened once: make another one")
        self._loop = asyncio.get_running_loop()
        self._client = AsyncClient(self._settings, self._access)
        deadline = time.monotonic() + self._timeout
        try:
            if self._wants_session:
                await self._open_session(deadline)
            else:
                attempts = max(3, len(self._settings.endpoints))
                ping = AsyncPerformer(self._client, None, self._session_changed, attempts)
                await drive_async(runs.ping(self._ctx), ping.perform, deadline, self._calls)
        except BaseException:
            await self._client.close()
            raise
        self._performer = AsyncPerformer(self._client, self._keeper, self._session_changed)
        self._opened = True
        return self

    async def _open_session(self, deadline: float) -> None:
        loop, changed = self._loop, self._session_changed

        def deliver(tell: Callable[[], None]) -> None:  # not a method: the keeper's thread must not keep the store
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(tell)

        keeper = Keeper(
            self._settings,
            self._access,
            self._ctx.keys,
            self._ctx.owner,
            deliver=deliver,
            lost_event=asyncio.Event,
            changed=lambda: deliver(changed.set),
        )
        lock, gone, opened = threading.Lock(), False, False

        def open_it() -> None:
            nonlocal opened
            keeper.open(deadline)
            with lock:
                opened = True
                late = gone
            if late:
                keeper.close(time.monotonic() + 1.0)

        try:
            await asyncio.to_thread(open_it)
        except asyncio.CancelledError:  # the thread can't be stopped: whoever of the two is last closes what it opened
            with lock:
                gone = True
                late = opened
            if late:
                threading.Thread(target=keeper.close, args=(time.monotonic() + 1.0,), daemon=True).start()
            raise
        self._keeper = keeper
        self._ctx.session = keeper.view

    def _in_loop(self, tell: Callable[[], None]) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(tell)

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise fork_error(self._pid)
        if self._closed:
            raise StoreClosedError("the store is closed: open another one")
        if not self._opened:
            raise StoreClosedError("the store is not open yet: use `async with` or `await` on what connect gives")

    def _check(self) -> None:
        self._check_open()
        if asyncio.get_running_loop() is not self._loop:
            raise StoreClosedError("the store was opened in another event loop: open one in this loop")

    def _run(self, program: Program[R], timeout: float | None = None) -> Coroutine[Any, Any, R]:
        performer = self._performer
        if performer is None or self._closed or os.getpid() != self._pid:
            self._check_open()  # which tells why not
        if asyncio.get_running_loop() is not self._loop:
            self._check()
        assert performer is not None
        return drive_async(program, performer.perform, time.monotonic() + (timeout or self._timeout), self._calls)

    def _run_later(self, program: Callable[[], Program[Any]]) -> None:
        if self._keeper is not None:
            self._keeper.later(Later(program))

    def _watch_claim(self, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        assert self._keeper is not None  # there is no claim without a session
        key = self._ctx.keys.step(claim.run_id, claim.step_key).claim
        return self._keeper.watch_claim(key, claim, lambda: self._in_loop(lost))

    def _batches(self, prefix: bytes, start: int, deadline: float | None) -> AsyncGenerator[Batch]:
        self._check()
        assert self._client is not None
        return stream_async(self._client, prefix, prefix_end(prefix), start, deadline)

    async def close(self) -> None:
        if os.getpid() != self._pid:
            return
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._close_all())
        await carried_through(self._ending)

    async def _close_all(self) -> None:
        deadline = time.monotonic() + self._timeout
        if self._client is not None:
            self._client.stop_waiting()
        if self._keeper is not None:
            await asyncio.to_thread(self._keeper.drain, deadline)
        self._closed = True
        while self._calls and time.monotonic() < deadline:  # noqa: ASYNC110 - no call should have to tell that it ends
            await asyncio.sleep(0.01)
        if self._keeper is not None:
            await asyncio.to_thread(self._keeper.close, max(deadline, time.monotonic() + 0.5))
        if self._client is not None:
            await self._client.close()

    def __await__(self) -> Generator[Any, None, Self]:
        """Open the store: `store = await AsyncEtcdRunStore.connect(...)`."""
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        """Open the store, unless it was awaited before."""
        return self if self._opened else await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        await self.close()

    def __del__(self) -> None:
        """Tell of a store that nobody closed."""
        if os.getpid() != getattr(self, "_pid", 0) and getattr(self, "_client", None) is not None:
            # freeing gRPC's last asyncio channel waits for a thread that a forked child does not have: keep it
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._client))
        if getattr(self, "_opened", False) and not self._closed and os.getpid() == self._pid:
            warnings.warn(f"{self!r} was never closed: its session lives until its lease ends", ResourceWarning, 2)
            if self._keeper is not None:
                self._keeper.give_up()


share_docstrings(EtcdRunStore, AsyncEtcdRunStore)
