"""Keeps a session alive: a thread and channels of its own, which renew the lease, settle doubts, open it anew."""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from etcd3 import etcdrpc
from msgspec.structs import replace

from stepclaim._core.lease import LeaseClock
from stepclaim._core.ops import Compare, Get, KeyValue, Later, Program, Put, SessionView, Txn, TxnReply
from stepclaim._core.records import VERSION, SessionRecord, encode
from stepclaim._etcd.bodies import Bodies
from stepclaim._etcd.client import Client
from stepclaim._etcd.perform import run_program
from stepclaim.errors import (
    BackendError,
    DeadlineExceededError,
    ResourceExhaustedError,
    SessionLostError,
    StepClaimError,
    StoreClosedError,
    UnavailableError,
)
from stepclaim.models import SessionState
from stepclaim.session import Session, boot_time, logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim._core.keys import Keyspace
    from stepclaim._etcd.channel import Access, Member
    from stepclaim.models import StepClaim
    from stepclaim.settings import Settings

AT_MOST_ONCE_SESSION_TTL = 30.0
_LONGEST_RENEWAL = 2.0
_CARRY_AGAIN = 0.5
_PASSING = (UnavailableError, DeadlineExceededError, ResourceExhaustedError)
"""What passes by itself, also where the request has certainly had no effect, as a refused connection has none."""


class Keeper:
    """One store's session, whichever face the store has.

    Lock order: the keeper's one lock is never held during a call to etcd.
    """

    def __init__(
        self,
        settings: Settings,
        access: Access,
        keys: Keyspace,
        owner: str,
        *,
        deliver: Callable[[Callable[[], None]], None],
        lost_event: Callable[[], Any],
        changed: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._owner = owner
        self._deliver = deliver
        self._lost_event = lost_event
        self._changed = changed
        self._client = Client(settings, access)
        self._callbacks: list[Callable[[Session], Any]] = []
        self._ttl = AT_MOST_ONCE_SESSION_TTL if settings.lease_ttl is None else settings.lease_ttl
        self._condition = threading.Condition()
        self._closing = False
        self._bodies = Bodies()
        self._draining = False
        self._carried: list[Callable[[], Program[Any]]] = []
        self._carry_at = 0.0
        self._undone: list[Callable[[], Program[None]]] = []
        self._session: Session | None = None
        self._clock: LeaseClock | None = None
        self._view: SessionView | None = None
        self._thread = threading.Thread(target=self._run, name="stepclaim-session", daemon=True)

    # --- what the store asks -------------------------------------------------------------------------------------

    def open(self, deadline: float) -> None:
        """Open the first session, or tell at once why that is not possible, and begin to renew it."""
        try:
            self._open_session(deadline, attempts=max(3, len(self._settings.endpoints)))
        except BaseException:
            self._client.close()
            raise
        self._thread.start()

    @property
    def session(self) -> Session:
        """The session in use: the latest one, also while it is lost."""
        assert self._session is not None
        return self._session

    def view(self) -> SessionView | None:
        """Give what a claim needs, or None while there is no live session."""
        if self._draining or self._closing:
            raise StoreClosedError("the store is closed: open another one")
        clock = self._clock
        return self._view if clock is not None and boot_time() < clock.deadline else None

    def wait_view(self, deadline: float) -> SessionView:
        """Wait for a live session."""
        with self._condition:
            while (view := self.view()) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise no_session(self.session)
                self._condition.wait(min(left, 0.5))
        return view

    def barrier(self, key: bytes, found: KeyValue | None, revision: int | None = None) -> None:
        """Take note of where the session key's mod revision stands, or that the key is gone."""
        with self._condition:
            view = self._view
            if view is None or view.key != key:
                return
            if revision is None:
                if found is None or found.create_revision != view.create_revision:
                    if self._clock is not None:
                        self._clock.revoked()
                    self._condition.notify_all()
                    return
                revision = found.mod_revision
            if revision > view.mod_revision:
                self._view = _moved(view, revision)

    def passed(self, session: SessionView) -> bool:
        """Tell whether the barrier has moved on from where it was, so that nothing sent behind it can happen."""
        view = self._view
        return view is not None and view.key == session.key and view.mod_revision > session.mod_revision

    def watch_claim(self, key: bytes, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        """Call back, once, when a claim is found to be lost; asked each second, and when the session ends."""
        leave = self._bodies.enter(key, claim, lost)
        with self._condition:
            self._condition.notify_all()
        return leave

    def later(self, later: Later) -> None:
        """Run a program in the background; one that undoes what nobody knows of before the lease is renewed again."""
        with self._condition:
            if later.undo:
                self._undone.append(later.program)
            else:
                self._carried.append(later.program)
            self._condition.notify_all()

    def drain(self, deadline: float) -> None:
        """Give no more claims, and wait for the bodies that run to their end."""
        self._draining = True
        self._bodies.wait(deadline)

    def give_up(self) -> None:
        """Renew no more. Takes no lock: a store that nobody closed is freed at any time, in any thread."""
        self._closing = True

    def close(self, deadline: float) -> None:
        """Settle what is in doubt, end the session's claims by revoking its lease, and stop."""
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(max(0.1, deadline - time.monotonic()))
        try:
            self._settle_doubts(deadline)
            self._carry_through(deadline)
            if self._view is not None and self.session.state is not SessionState.LOST:
                self._client.call(_lease_revoke, etcdrpc.LeaseRevokeRequest(ID=self._view.lease), deadline)
        except StepClaimError as error:
            if not isinstance(error, BackendError) or error.code != "NOT_FOUND":  # an attempt that seemed lost was not
                logger.warning("the session could not be revoked, its claims end with its lease: %s", error)
        finally:
            if self._clock is not None:
                self._clock.revoked()
            self._bodies.session_ended()
            self._client.close()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._closing:
                    return
                clock = self._clock
                if clock is not None and not self._undone:
                    now = boot_time()
                    carry_in = max(0.0, self._carry_at - now) if self._carried else float("inf")
                    self._condition.wait(min(clock.wait(now), self._bodies.due_in(now), carry_in))
                if self._closing:
                    return
            try:
                self._tick()
            except StepClaimError as error:
                logger.debug("session: %s", error)
                self._pause(0.2)
            except Exception:  # noqa: BLE001 - logged; without this thread every claim would be lost
                logger.exception("the session's thread met an error of its own; it goes on")
                self._pause(1.0)

    def _tick(self) -> None:
        clock = self._clock
        assert clock is not None
        if clock.state(boot_time()) is SessionState.LOST:
            self.session._tell_lost()  # noqa: SLF001 - the keeper is the session's other half
            self._bodies.session_ended()
            with self._condition:  # the lease is over: what it may keep alive unknown to anybody ends with it
                self._carried += self._undone
                self._undone.clear()
            self._open_session(time.monotonic() + self._settings.timeout)
            return
        if self._undone:
            # a claim that nobody knows of must not be kept alive: no renewal before the doubt is settled
            self._settle_doubts(time.monotonic() + min(_LONGEST_RENEWAL, clock.expires_in(boot_time()) + 0.1))
        if clock.wait(boot_time()) <= 0:
            self._renew(clock)
        if self._carried and boot_time() >= self._carry_at:
            self._carry_through(time.monotonic() + min(_LONGEST_RENEWAL, clock.granted / 4))
        if self._bodies.due_in(boot_time()) <= 0:
            self._bodies.look(self._client, min(_LONGEST_RENEWAL, clock.granted / 4))

    def _renew(self, clock: LeaseClock) -> None:
        assert self._view is not None
        sent_at = boot_time()
        timeout = max(0.1, min(_LONGEST_RENEWAL, clock.granted / 4, clock.expires_in(sent_at)))
        try:
            granted = self._client.keep_alive(self._view.lease, timeout)
        except StepClaimError as error:
            if isinstance(error, BackendError) and error.code == "NOT_FOUND":
                clock.revoked()
            else:
                clock.failed(boot_time())
            logger.debug("a renewal failed: %s", error)
        else:
            clock.renewed(sent_at, granted)

    def _open_session(self, deadline: float, attempts: int = 0) -> None:
        sent_at = boot_time()
        request = etcdrpc.LeaseGrantRequest(TTL=math.ceil(self._ttl))
        answer = self._client.call(lambda member: member.lease.LeaseGrant, request, deadline, attempts=attempts)
        clock = LeaseClock(sent_at, answer.TTL)
        session_id = f"{self._owner}-{secrets.token_hex(6)}"
        record = SessionRecord(
            v=VERSION,
            owner=self._owner,
            host=socket.gethostname(),
            pod=os.environ.get("POD_NAME"),
            pid=os.getpid(),
            version=version("stepclaim"),
            started_at=datetime.now(UTC),
        )
        view = SessionView(
            session_id=session_id,
            owner=self._owner,
            key=self._keys.session(session_id),
            value=encode(record),
            lease=answer.ID,
            claim_lease=0 if self._settings.lease_ttl is None else answer.ID,
            create_revision=0,
            mod_revision=0,
        )
        try:
            revision = run_program(self._client, None, _register(view), deadline)
        except StepClaimError:
            self._revoke(answer.ID, time.monotonic() + 0.5)
            raise
        session = Session(session_id, self._owner, answer.ID, clock, self._callbacks, self._deliver, self._lost_event())
        with self._condition:
            self._clock = clock
            self._view = _moved(view, revision, created=revision)
            self._session = session
            self._condition.notify_all()
        self._changed()

    def _revoke(self, lease: int, deadline: float) -> None:
        """Leave no lease behind, if that can be had; else it ends by itself."""
        try:
            self._client.call(_lease_revoke, etcdrpc.LeaseRevokeRequest(ID=lease), deadline)
        except StepClaimError as error:
            logger.debug("a lease could not be revoked: %s", error)

    def _settle_doubts(self, deadline: float) -> None:
        while self._undone:
            try:
                run_program(self._client, self, self._undone[0](), deadline)
            except BackendError:
                raise
            except StepClaimError as settled:  # such as a claim that is lost: there is nothing left to do
                logger.debug("carried through: %s", settled)
            with self._condition:
                self._undone.pop(0)

    def _carry_through(self, deadline: float) -> None:
        """Try once each what callers left behind that must end by itself; what etcd refuses for good is dropped."""
        with self._condition:
            tried, self._carried = self._carried, []
        for program in tried:
            try:
                run_program(self._client, self, program(), deadline)
            except BackendError as error:
                if error.definite and not isinstance(error, _PASSING):
                    logger.warning("given up in the background: %s", error)
                    continue
                with self._condition:
                    self._carried.append(program)
                    self._carry_at = boot_time() + _CARRY_AGAIN
            except StepClaimError as settled:  # such as a claim that is lost: there is nothing left to do
                logger.debug("carried through: %s", settled)

    def _pause(self, seconds: float) -> None:
        with self._condition:
            if not self._closing:
                self._condition.wait(seconds)


def _lease_revoke(member: Member) -> Any:
    return member.lease.LeaseRevoke


def _register(view: SessionView) -> Program[int]:
    """Write the session key; its name is new, so that whoever finds it has written it."""
    reply: TxnReply = yield from Txn(
        compares=(Compare(view.key, "create", 0),),
        success=(Put(view.key, view.value, view.lease),),
        failure=(Get(view.key),),
    )
    if reply.succeeded:
        return reply.revision
    found = reply.found[0]
    assert found is not None
    return found.create_revision


def _moved(view: SessionView, revision: int, *, created: int = 0) -> SessionView:
    return replace(view, create_revision=created or view.create_revision, mod_revision=revision)


def no_session(session: Session) -> SessionLostError:
    """Tell that there is nothing to claim with."""
    return SessionLostError(
        f"session {session.session_id} was lost and no new one could be opened before the deadline; etcd can't be "
        "reached or refuses: try again once it answers"
    )
