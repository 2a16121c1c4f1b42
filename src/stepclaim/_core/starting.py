"""How an attempt begins: its number, its row, and where the attempt before it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from stepclaim._core.keys import StepKeys, attempt_number
from stepclaim._core.ops import Compare, Program, Put, Range, prefix_end
from stepclaim._core.records import VERSION, Payload, StepRow, Stored, encode, encode_new
from stepclaim.models import StepStatus

if TYPE_CHECKING:
    from datetime import datetime

    from stepclaim._core.context import Context

SAME_REVISION = 0
"""A row's token where row and claim were written by one transaction: the token is the row's own mod revision."""


class Base(Struct, frozen=True):
    """What the next attempt stands on: the row of the last one, or, where the row was reset, its number alone."""

    row: Stored[StepRow] | None = None
    last_attempt: int = 0

    @property
    def next_attempt(self) -> int:
        """Number the attempt that comes."""
        return self.last_attempt + 1


NO_BASE = Base()


class Begun(Struct, frozen=True):
    """An attempt's beginning, as part of a transaction."""

    compares: tuple[Compare, ...]
    puts: tuple[Put, ...]
    row: StepRow
    payload: Payload | None


class Start(Struct, frozen=True):
    """What the caller said of the attempt."""

    step_type: str
    input_json: str | None
    job_id: str | None

    @classmethod
    def checked(cls, ctx: Context, step_type: str, input_json: str | None, job_id: str | None) -> Start:
        """Check the texts before anything is sent."""
        ctx.field(step_type, "step_type", optional=False)
        ctx.field(input_json, "input_json")
        ctx.field(job_id, "job_id")
        return cls(step_type, input_json, job_id)

    def begin(
        self, ref: StepKeys, base: Base, *, owner: str, write_id: str, now: datetime, token: int | None = SAME_REVISION
    ) -> Begun:
        """Write the new row over the old one, and the old one to its place among the earlier attempts."""
        payload = None if self.input_json is None else Payload(v=VERSION, input=self.input_json)
        row = StepRow(
            v=VERSION,
            status=StepStatus.RUNNING,
            type=self.step_type,
            attempt=base.next_attempt,
            token=token,
            owner=owner,
            job=self.job_id,
            started_at=now,
            payload=payload is not None,
            attempt_id=write_id,
            write_id=write_id,
        )
        return begin_with(ref, base, row, payload)


def begin_with(ref: StepKeys, base: Base, row: StepRow, payload: Payload | None) -> Begun:
    """Put a first row of an attempt into a transaction that holds only while the base stands."""
    old = base.row
    puts = [Put(ref.row, encode_new(row))]
    if old is not None:
        compares: tuple[Compare, ...] = (Compare(ref.row, "mod", old.kv.mod_revision),)
        if not old.record.retried:
            puts.append(Put(ref.attempt(old.record.attempt), encode(settled(old), old.kv)))
    else:
        # where earlier attempts are kept there is one with this number or a later row: the number would be used twice
        compares = (Compare(ref.row, "mod", 0), Compare(ref.attempt(base.next_attempt), "create", 0))
    if payload is not None:
        puts.append(Put(ref.payload(row.attempt), encode_new(payload)))
    return Begun(compares, tuple(puts), row, payload)


def settled(old: Stored[StepRow]) -> StepRow:
    """Give a row whose token no longer depends on where it stands."""
    return replace(old.record, token=token_of(old))


def token_of(row: Stored[StepRow]) -> int | None:
    """Tell the fencing token that a row was written under."""
    return row.kv.mod_revision if row.record.token == SAME_REVISION else row.record.token


def base_of(ref: StepKeys, row: Stored[StepRow] | None) -> Program[Base]:
    """Find what the next attempt stands on."""
    if row is not None:
        return Base(row, row.record.attempt)
    newest = yield from Range(key=ref.attempts, range_end=prefix_end(ref.attempts), limit=1, newest_first=True)
    return Base(None, attempt_number(newest.kvs[0].key) if newest.kvs else 0)
