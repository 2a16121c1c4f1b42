"""How long a lease can be trusted: a deadline counted from before each request, by whoever's clock is handed in."""

from __future__ import annotations

from stepclaim.models import SessionState


class LeaseClock:
    """The state of one lease, from the times at which renewals were sent and what the server granted."""

    __slots__ = ("_failing", "_next", "_revoked", "deadline", "granted")

    def __init__(self, sent_at: float, granted: float) -> None:
        self._failing = False
        self._revoked = False
        self.granted = granted
        self.deadline = self._next = 0.0
        """Until when the lease can be trusted."""
        self.renewed(sent_at, granted)

    def renewed(self, sent_at: float, granted: float) -> None:
        """Count the new deadline from before the request; a server that answers zero has no such lease any more."""
        if granted <= 0:
            self.revoked()
            return
        self.granted = granted
        self._failing = False
        self.deadline = float("-inf") if self._revoked else sent_at + granted - margin(granted)
        self._next = sent_at + granted / 3

    def failed(self, now: float) -> None:
        """Note a renewal without an answer and try again soon."""
        self._failing = True
        self._next = now + min(0.5, self.granted / 20)

    def revoked(self) -> None:
        """Take the server's word that the lease is gone."""
        self._revoked = True
        self.deadline = float("-inf")

    def state(self, now: float) -> SessionState:
        """Tell what is known at this moment."""
        if self._revoked or now >= self.deadline:
            return SessionState.LOST
        return SessionState.UNCERTAIN if self._failing else SessionState.ACTIVE

    def expires_in(self, now: float) -> float:
        """Seconds for which the lease can still be trusted, 0 once it can't."""
        return 0.0 if self._revoked else max(0.0, self.deadline - now)

    def wait(self, now: float) -> float:
        """Seconds until the next renewal is due."""
        return 0.0 if self._revoked else max(0.0, min(self._next, self.deadline) - now)


def margin(granted: float) -> float:
    """Give what is taken off the granted time for clocks that run apart and for a slow last write."""
    return min(1.0, granted / 10)
