"""The store on etcd for threads."""

from __future__ import annotations

import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core import runs
from stepclaim._core.driving import drive
from stepclaim._core.ops import Later, prefix_end
from stepclaim._etcd.channel import NO_ACCESS, Access
from stepclaim._etcd.client import Client
from stepclaim._etcd.keeper import Keeper
from stepclaim._etcd.perform import Performer, run_program
from stepclaim._etcd.watch import stream
from stepclaim.errors import ConfigurationError, StoreClosedError
from stepclaim.identity import borrowed, context_of, fork_error
from stepclaim.run_store import RunStore
from stepclaim.settings import Endpoints, Overrides, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    from stepclaim._core.ops import Batch, Program
    from stepclaim.models import StepClaim
    from stepclaim.session import Session

R = TypeVar("R")


def _in_a_thread(tell: Callable[[], None]) -> None:
    """Call back where it does no harm: the session's thread must go on, whatever a callback does."""
    threading.Thread(target=tell, name="stepclaim-lost", daemon=True).start()


class EtcdRunStore(RunStore):
    """A store on etcd, for any number of threads."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS, *, session: bool = True) -> None:
        """Open the store. Use `connect` or `from_client`."""
        self._pid = os.getpid()
        self._closed = True
        self._closing = False
        self._ended = threading.Event()
        self._timeout = settings.timeout
        self._calls: set[Program[Any]] = set()
        self._idle = threading.Condition()
        self._ctx = context_of(settings)
        self._client = Client(settings, access)
        self._keeper: Keeper | None = None
        deadline = time.monotonic() + settings.timeout
        try:
            if session:
                self._keeper = Keeper(
                    settings,
                    access,
                    self._ctx.keys,
                    self._ctx.owner,
                    deliver=_in_a_thread,
                    lost_event=threading.Event,
                    changed=lambda: None,
                )
                self._keeper.open(deadline)
                self._ctx.session = self._keeper.view
            else:
                run_program(
                    self._client, None, runs.ping(self._ctx), deadline, attempts=max(3, len(settings.endpoints))
                )
        except BaseException:
            self._client.close()
            raise
        self._performer = Performer(self._client, self._keeper)
        self._closed = False

    @classmethod
    def connect(
        cls, endpoints: Settings | Endpoints | None = None, *, session: bool = True, **overrides: Unpack[Overrides]
    ) -> Self:
        """Connect, open a session and begin to renew it; a cluster that can't be reached or refuses is told at once.

        `endpoints`: host:port, several of them, or `Settings`; by default what STEPCLAIM_* in the environment says.
        Keywords override settings: `owner`, `prefix`, `lease_ttl` (seconds; None is at-most-once), `timeout` (seconds
        that each call may take, retries included), `attempt_timeout`, `value_limit`, `user`, `password`, `ca_file`,
        `cert_file`, `key_file`, `tls`, `tls_server_name`. `session=False` opens a store that can look and release but
        not claim, and writes nothing for itself.
        Raises `ConfigurationError`, `UnavailableError`, `AuthenticationError` or `PermissionDeniedError`.
        """
        return cls(Settings.resolve(endpoints, overrides), session=session)

    @classmethod
    def from_client(cls, client: Any, *, session: bool = True, **overrides: Unpack[Overrides]) -> Self:
        """Connect to where an `etcd3` client of the user's is connected, with its TLS credentials and its token.

        The client itself is neither used nor closed. It doesn't keep the password: give `user` and `password` for a
        token that can be renewed.
        """
        endpoints, access = borrowed(client)
        return cls(Settings.resolve(endpoints, overrides), access, session=session)

    @property
    def session(self) -> Session:
        """The session in use: its owner, state and lease, and what to call when it is lost."""
        self._check()
        if self._keeper is None:
            raise ConfigurationError("this store was opened with session=False: it has no session and can't claim")
        return self._keeper.session

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise fork_error(self._pid)
        if self._closed:
            raise StoreClosedError("the store is closed: open another one")

    def _run(self, program: Program[R], timeout: float | None = None) -> R:
        self._calls.add(program)  # before the check, so that a call that passes it is waited for by `close`
        try:
            self._check()
            return drive(program, self._performer.perform, time.monotonic() + (timeout or self._timeout))
        finally:
            self._calls.discard(program)
            if self._closed and os.getpid() == self._pid:  # a forked child's copy of the lock may be held for ever
                with self._idle:
                    self._idle.notify_all()

    def _run_later(self, program: Callable[[], Program[Any]]) -> None:
        if self._keeper is not None:
            self._keeper.later(Later(program))

    def _watch_claim(self, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        assert self._keeper is not None  # there is no claim without a session
        return self._keeper.watch_claim(self._ctx.keys.step(claim.run_id, claim.step_key).claim, claim, lost)

    def _batches(self, prefix: bytes, start: int, deadline: float | None) -> Iterator[Batch]:
        self._check()
        return stream(self._client, prefix, prefix_end(prefix), start, deadline)

    def close(self) -> None:
        """End the session: no more claims, wait for bodies and calls, settle what is in doubt, revoke the lease.

        Bodies of `step` and calls under way are waited for up to the store's time-out. In at-least-once mode the lease
        takes every claim with it that is still held. Doing it again does nothing but wait for the first; in a forked
        child it leaves the parent's session alone.
        """
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + self._timeout
        with self._idle:
            first, self._closing = not self._closing, True
        if not first:
            self._ended.wait(self._timeout)
            return
        self._client.stop_waiting()
        if self._keeper is not None:
            self._keeper.drain(deadline)
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._calls, max(0.1, deadline - time.monotonic()))
        try:
            if self._keeper is not None:
                self._keeper.close(max(deadline, time.monotonic() + 0.5))
        finally:
            self._client.close()
            self._ended.set()

    def __enter__(self) -> Self:
        """Give the open store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def __del__(self) -> None:
        """Tell of a store that nobody closed."""
        if not getattr(self, "_closed", True) and os.getpid() == self._pid:
            warnings.warn(f"{self!r} was never closed: its session lives until its lease ends", ResourceWarning, 2)
            if self._keeper is not None:
                self._keeper.give_up()
