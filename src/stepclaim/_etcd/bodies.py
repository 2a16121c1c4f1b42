"""The bodies that run under this store's claims: who must be told when a claim is lost, and waited for at the end."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepclaim._core.ops import Get, KeyValue, Program, Txn
from stepclaim._etcd.perform import run_program
from stepclaim.session import boot_time, logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stepclaim._etcd.client import Client
    from stepclaim.models import StepClaim

_LOOK_EVERY = 1.0
_LOOKS_A_TRANSACTION = 100


@dataclass(frozen=True, eq=False)
class Body:
    """A body that runs, and how it is told that its claim is lost."""

    key: bytes
    claim: StepClaim
    lost: Callable[[], None]


class Bodies:
    """Looks after running bodies. This only tells them; what decides is the guard of their completion."""

    def __init__(self) -> None:
        self._untold: set[Body] = set()
        self._running = 0
        self._ended = threading.Condition()
        self._look_at = 0.0

    def enter(self, key: bytes, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        """Take a body in; gives what is to be called when it ends."""
        body = Body(key, claim, lost)
        with self._ended:
            if not self._untold:
                self._look_at = boot_time() + _LOOK_EVERY
            self._untold.add(body)
            self._running += 1

        def leave() -> None:
            with self._ended:
                self._untold.discard(body)
                self._running -= 1
                self._ended.notify_all()

        return leave

    def wait(self, deadline: float) -> None:
        """Wait until the last body has ended."""
        with self._ended:
            self._ended.wait_for(lambda: not self._running, max(0.0, deadline - time.monotonic()))

    def due_in(self, now: float) -> float:
        """Give the seconds until the next look."""
        return max(0.0, self._look_at - now) if self._untold else float("inf")

    def look(self, client: Client, timeout: float) -> None:
        """Read whether the claims still stand, and tell the bodies of those that don't."""
        self._look_at = boot_time() + _LOOK_EVERY
        bodies = tuple(self._untold)
        for first in range(0, len(bodies), _LOOKS_A_TRANSACTION):
            part = bodies[first : first + _LOOKS_A_TRANSACTION]
            found = run_program(client, None, _read(part), time.monotonic() + timeout)
            self._tell(
                body
                for body, kv in zip(part, found, strict=True)
                if kv is None or kv.mod_revision != body.claim.fencing_token
            )

    def session_ended(self) -> None:
        """Tell all whose claims end with the session's lease."""
        self._tell(body for body in tuple(self._untold) if body.claim.lease_id)

    def _tell(self, lost: Iterable[Body]) -> None:
        for body in lost:
            with self._ended:
                if body not in self._untold:
                    continue
                self._untold.discard(body)
            try:
                body.lost()
            except Exception:  # noqa: BLE001 - logged; the other bodies must be told, too
                logger.exception("a body could not be told that its claim is lost")


def _read(bodies: tuple[Body, ...]) -> Program[tuple[KeyValue | None, ...]]:
    reply = yield from Txn(compares=(), success=tuple(Get(body.key) for body in bodies))
    return reply.found
