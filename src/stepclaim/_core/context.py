"""What every program of one store shares: names, limits, time, ids, and the claims that the store took."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from stepclaim._core.ops import KeyValue
from stepclaim._core.records import ClaimRecord, Payload, StepRow, Stored
from stepclaim.errors import ConfigurationError, RecordTooLargeError
from stepclaim.models import StepClaim

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from datetime import datetime

    from stepclaim._core.keys import Keyspace, StepKeys
    from stepclaim._core.ops import SessionView


MOST_REMEMBERED = 100_000
"""Steps whose claims a store remembers: the oldest tenth goes first, in a store that never sees its claims end."""


_KEPT_CHARACTERS = 8192


class Holding(Struct, gc=False):
    """A claim that this store took, with what it wrote: the next write need not read first."""

    token: int
    lease: int
    record: ClaimRecord
    row: StepRow | None = None
    row_revision: int = 0
    payload: Payload | None = None
    earlier: Holding | None = None
    """The claim before: threads may come to remember theirs in another order than etcd gave them."""

    def claim(self, ctx: Context, ref: StepKeys) -> StepClaim:
        """Give the claim as its holder has it."""
        return StepClaim(
            ref.run_id, ref.step_key, self.record.owner, self.token, self.record.attempt, self.lease, ctx.keys.prefix
        )


def small(payload: Payload | None) -> Payload | None:
    """Give a payload that is worth keeping to save a read; a large one is read again when it is needed."""
    if payload is None:
        return None
    texts = (payload.input, payload.output, payload.error, payload.trace)
    return payload if sum(len(each) for each in texts if each) <= _KEPT_CHARACTERS else None


class View(Struct, frozen=True):
    """A step as it stands, or as this store left it: its claim and its row."""

    claim: Stored[ClaimRecord] | None
    row: Stored[StepRow] | None


class Context:
    """Shared by all programs of one store."""

    def __init__(
        self,
        keys: Keyspace,
        owner: str,
        *,
        value_limit: int,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
        lock: AbstractContextManager[Any],
    ) -> None:
        self.keys = keys
        self.owner = owner
        self.now = now
        self.new_id = new_id
        self.value_limit = value_limit
        self.session: Callable[[], SessionView | None] = lambda: None
        """Gives the live session; where it gives None a program asks for one by `OpenSession`, and waits."""
        self._held: dict[tuple[str, str], Holding] = {}
        self._lock = lock

    def remember(self, ref: StepKeys, holding: Holding) -> None:
        """Keep a claim, so that this store's later writes to the step are guarded by it."""
        key = ref.run_id, ref.step_key
        held = self._held
        with self._lock:
            other = held.pop(key, None)
            if other is not None:
                newer, older = (holding, other) if holding.token > other.token else (other, holding)
                newer.earlier, older.earlier = older, None
                holding = newer
            held[key] = holding
            if len(held) > MOST_REMEMBERED:  # many at once: a dict looks for its first entry behind all that are gone
                for oldest in [*islice(held, MOST_REMEMBERED // 10)]:
                    del held[oldest]

    def holding(self, ref: StepKeys, token: int | None = None) -> Holding | None:
        """Give the newest claim that this store took of the step; with a token, only that very claim."""
        with self._lock:
            found = self._held.get((ref.run_id, ref.step_key))
        while token is not None and found is not None and found.token != token:
            found = found.earlier
        return found

    def forget(self, ref: StepKeys, token: int) -> None:
        """Drop a claim that has ended by this store's own doing. A lost one is kept: it must go on refusing."""
        key = ref.run_id, ref.step_key
        with self._lock:
            newest = self._held.get(key)
            if newest is None:
                return
            if newest.token != token:
                if newest.earlier is not None and newest.earlier.token == token:
                    newest.earlier = None
            elif newest.earlier is not None:
                self._held[key] = newest.earlier
            else:
                del self._held[key]

    def lost(self, ref: StepKeys, token: int) -> None:
        """Keep of a lost claim no more than that it was lost."""
        holding = self.holding(ref, token)
        if holding is not None:
            holding.row = holding.payload = None

    def forget_run(self, run_id: str) -> None:
        """Drop all claims of a run that is no more."""
        with self._lock:
            for key in [key for key in self._held if key[0] == run_id]:
                del self._held[key]

    def field(self, value: object, what: str, *, optional: bool = True) -> None:
        """Check one text before anything is written."""
        if value is None and optional:
            return
        if not isinstance(value, str):
            raise ConfigurationError(f"{what} must be a str{' or None' if optional else ''}, not {value!r}")
        if value.isascii() and len(value) <= self.value_limit:
            return
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise ConfigurationError(f"{what} is not valid Unicode: it can't be written as UTF-8") from error
        if size > self.value_limit:
            raise RecordTooLargeError(
                f"{what} has {size} bytes, {self.value_limit} are allowed: keep it elsewhere and record where it is"
            )


def view_of(ref: StepKeys, holding: Holding) -> View:
    """Show a step as this store left it, without asking etcd."""
    token = holding.token
    row = holding.row
    return View(
        Stored(holding.record, KeyValue(ref.claim, b"", token, token)),
        None if row is None else Stored(row, KeyValue(ref.row, b"", 0, holding.row_revision)),
    )
