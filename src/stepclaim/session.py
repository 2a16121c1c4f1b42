"""A store's session as its users see it: who claims, for how long it can be trusted, and when it was lost."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from stepclaim.models import SessionState

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim._core.lease import LeaseClock

logger = logging.getLogger("stepclaim")


boot_time: Callable[[], float] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""Read a clock that also runs while the machine is suspended, where the system has one."""


class Session:
    """One session: a lease and the key that stands on it. Once lost it stays lost; the store opens another."""

    def __init__(
        self,
        session_id: str,
        owner: str,
        lease_id: int,
        clock: LeaseClock | None,
        callbacks: list[Callable[[Session], Any]],
        deliver: Callable[[Callable[[], None]], None],
        lost: Any = None,
    ) -> None:
        self.session_id = session_id
        self.owner = owner
        self.lease_id = lease_id
        self.lost: Any = threading.Event() if lost is None else lost
        """Set once the session is lost: a threading.Event, or an asyncio.Event on the asyncio face."""
        self._clock = clock
        self._callbacks = callbacks
        self._deliver = deliver
        self._told = False

    @property
    def state(self) -> SessionState:
        """ACTIVE; UNCERTAIN while renewals fail; LOST by the server's word or once the deadline has passed."""
        if self._told:
            return SessionState.LOST
        return SessionState.ACTIVE if self._clock is None else self._clock.state(boot_time())

    def expires_in(self) -> float:
        """Give the seconds for which the session can still be trusted; 0 once it is lost."""
        if self._told:
            return 0.0
        return float("inf") if self._clock is None else self._clock.expires_in(boot_time())

    def on_lost(self, callback: Callable[[Session], Any]) -> None:
        """Call back with the session that was lost; also for the sessions that follow this one.

        The callback runs in a thread of its own, or in the event loop on the asyncio face; what it raises is logged.
        """
        self._callbacks.append(callback)

    def _tell_lost(self) -> None:
        """Tell everybody, once."""
        if self._told:
            return
        self._told = True

        if isinstance(self.lost, threading.Event):
            self.lost.set()

        def tell() -> None:
            self.lost.set()
            for callback in tuple(self._callbacks):
                try:
                    callback(self)
                except Exception:
                    logger.exception("a callback of on_lost failed")

        self._deliver(tell)

    def __repr__(self) -> str:
        """Show what an operator would look for."""
        return f"<Session {self.session_id} lease={self.lease_id:x} {self.state}>"
