"""What every program of one store shares: names, limits, time, ids, and the claims that the store took."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

from msgspec import Struct

from stepclaim._core.ops import KeyValue
from stepclaim._core.records import ClaimRecord, Payload, StepRow, Stored
from stepclaim.errors import ConfigurationError, RecordTooLargeError
from stepclaim.models import StepClaim  # noqa: TC001 - msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from stepclaim._core.keys import Keyspace, StepKeys


MOST_REMEMBERED = 100_000
"""Steps whose claims a store remembers: the oldest go first, in a store that never sees its claims end."""


_CLAIMS_A_STEP = 2
"""More than the newest, because threads may come to remember theirs in another order than etcd gave them."""


_KEPT_CHARACTERS = 8192


class Holding(Struct, gc=False):
    """A claim that this store took, with what it wrote: the next write need not read first."""

    claim: StepClaim
    record: ClaimRecord
    row: StepRow | None = None
    row_revision: int = 0
    payload: Payload | None = None


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
    ) -> None:
        self.keys = keys
        self.owner = owner
        self.now = now
        self.new_id = new_id
        self.value_limit = value_limit
        self._held: OrderedDict[tuple[str, str], dict[int, Holding]] = OrderedDict()

    def remember(self, ref: StepKeys, holding: Holding) -> None:
        """Keep a claim, so that this store's later writes to the step are guarded by it."""
        taken = self._held.setdefault((ref.run_id, ref.step_key), {})
        taken[holding.claim.fencing_token] = holding
        if len(taken) > _CLAIMS_A_STEP:
            taken.pop(min(tuple(taken)), None)
        with suppress(KeyError):  # another thread may just have dropped the step
            self._held.move_to_end((ref.run_id, ref.step_key))
        if len(self._held) > MOST_REMEMBERED:
            self._held.popitem(last=False)

    def holding(self, ref: StepKeys, token: int | None = None) -> Holding | None:
        """Give the claim that this store took of the step; with a token, only that very claim."""
        taken = self._held.get((ref.run_id, ref.step_key))
        if not taken:
            return None
        return taken.get(max(tuple(taken), default=0) if token is None else token)

    def forget(self, ref: StepKeys, token: int) -> None:
        """Drop a claim that has ended by this store's own doing. A lost one is kept: it must go on refusing."""
        taken = self._held.get((ref.run_id, ref.step_key))
        if taken is not None and taken.pop(token, None) is not None and not taken:
            newer = self._held.pop((ref.run_id, ref.step_key), None)
            if newer:  # another thread has claimed the step anew meanwhile
                self._held.setdefault((ref.run_id, ref.step_key), {}).update(newer)

    def lost(self, ref: StepKeys, token: int) -> None:
        """Keep of a lost claim no more than that it was lost."""
        holding = self.holding(ref, token)
        if holding is not None:
            holding.row = holding.payload = None

    def forget_run(self, run_id: str) -> None:
        """Drop all claims of a run that is no more."""
        for key in [key for key in tuple(self._held) if key[0] == run_id]:
            self._held.pop(key, None)

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
    token = holding.claim.fencing_token
    row = holding.row
    return View(
        Stored(holding.record, KeyValue(ref.claim, b"", token, token)),
        None if row is None else Stored(row, KeyValue(ref.row, b"", 0, holding.row_revision)),
    )
