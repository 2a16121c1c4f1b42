"""What may be asked of a run from outside: cancellation, time-out, and that a trigger counts once."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from msgspec.structs import replace

from stepclaim._core.keys import RunKeys, run_name
from stepclaim._core.ops import Compare, Get, KeyValue, Program, Put, Txn, read_key
from stepclaim._core.records import VERSION, ControlRow, IdempotencyRow, Stored, decode, encode, stored
from stepclaim.errors import ConfigurationError
from stepclaim.models import RunControl

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim._core.context import Context
    from stepclaim.abc import RunId

TIMED_OUT = "Run timed out."


def configure_run(
    ctx: Context,
    run_id: RunId,
    flow_id: RunId,
    trigger_key: str,
    idempotency_key: str | None,
    timeout_at: datetime | None,
) -> Program[None]:
    """Write a run's limits; a cancellation or a time-out that stands is kept."""
    run = ctx.keys.run(run_id)
    flow = run_name(flow_id, "flow_id")
    ctx.field(trigger_key, "trigger_key", optional=False)
    ctx.field(idempotency_key, "idempotency_key")
    if timeout_at is not None and (not isinstance(timeout_at, datetime) or timeout_at.tzinfo is None):
        raise ConfigurationError(f"timeout_at must be a datetime with a time zone, not {timeout_at!r}")

    def configured(record: ControlRow) -> ControlRow:
        return replace(
            record, flow_id=flow, trigger_key=trigger_key, idempotency_key=idempotency_key, timeout_at=timeout_at
        )

    yield from _change(run, configured, lambda record: configured(record) == record)


def request_cancel(ctx: Context, run_id: RunId, reason: str | None) -> Program[bool]:
    """Ask that a run be cancelled; True for the first who asks."""
    ctx.field(reason, "reason")
    now, own = ctx.now(), ctx.new_id()

    def cancelled(record: ControlRow) -> ControlRow | None:
        if record.cancel_requested:
            return None
        return replace(record, cancel_requested=True, cancel_reason=reason, cancel_requested_at=now, cancel_id=own)

    return (yield from _change(ctx.keys.run(run_id), cancelled, lambda record: record.cancel_id == own))


def mark_timed_out(ctx: Context, run_id: RunId, reason: str | None) -> Program[bool]:
    """Say that a run's time is over; True for the first who says so. It is cancelled by that, too."""
    ctx.field(reason, "reason")
    now, own = ctx.now(), ctx.new_id()

    def timed_out(record: ControlRow) -> ControlRow | None:
        if record.timed_out_at is not None:
            return None
        record = replace(record, timed_out_at=now, timed_out_id=own)
        if record.cancel_requested:
            return record
        return replace(record, cancel_requested=True, cancel_reason=reason or TIMED_OUT, cancel_requested_at=now)

    return (yield from _change(ctx.keys.run(run_id), timed_out, lambda record: record.timed_out_id == own))


def _change(
    run: RunKeys, change: Callable[[ControlRow], ControlRow | None], own: Callable[[ControlRow], bool]
) -> Program[bool]:
    """Change the control record, or make it; False where the change finds nothing to do.

    `own` recognises this call's change below whatever others have written since.
    """
    standing = yield from _control(run)
    while True:
        record = change(standing.record if standing else ControlRow(v=VERSION))
        if record is None:
            return False
        reply = yield from Txn(
            compares=(Compare(run.control, "mod", standing.kv.mod_revision if standing else 0),),
            success=(Put(run.control, encode(record, standing.kv if standing else None)),),
            failure=(Get(run.control),),
        )
        if reply.succeeded:
            return True
        standing = stored(reply.found[0], ControlRow)
        if standing is not None and own(standing.record):
            return True


def _control(run: RunKeys) -> Program[Stored[ControlRow] | None]:
    return stored((yield from read_key(run.control)), ControlRow)


def get_control(ctx: Context, run_id: RunId) -> Program[RunControl | None]:
    """Read what was asked of a run."""
    run = ctx.keys.run(run_id)
    standing = yield from _control(run)
    if standing is None:
        return None
    record = standing.record
    return RunControl(
        run_id=run.run_id,
        flow_id=record.flow_id,
        trigger_key=record.trigger_key,
        idempotency_key=record.idempotency_key,
        timeout_at=record.timeout_at,
        cancel_requested=record.cancel_requested,
        cancel_reason=record.cancel_reason,
        cancel_requested_at=record.cancel_requested_at,
        timed_out_at=record.timed_out_at,
    )


def register_key(ctx: Context, flow_id: RunId, trigger_key: str, idempotency_key: str, run_id: RunId) -> Program[bool]:
    """Let an idempotency key stand for a run; True for the one who did."""
    key = ctx.keys.idempotency(flow_id, trigger_key, idempotency_key)
    run = ctx.keys.run(run_id)
    record = idempotency_record(ctx, run)
    reply = yield from Txn(
        compares=(Compare(key, "create", 0),), success=idempotency_puts(run, key, record), failure=(Get(key),)
    )
    if reply.succeeded:
        return True
    standing: KeyValue | None = reply.found[0]
    return standing is not None and decode(standing, IdempotencyRow).write_id == record.write_id


def find_key(ctx: Context, flow_id: RunId, trigger_key: str, idempotency_key: str) -> Program[str | None]:
    """Tell which run an idempotency key stands for."""
    standing = yield from read_key(ctx.keys.idempotency(flow_id, trigger_key, idempotency_key))
    return None if standing is None else decode(standing, IdempotencyRow).run_id


def idempotency_record(ctx: Context, run: RunKeys) -> IdempotencyRow:
    """Make the record of an idempotency key."""
    return IdempotencyRow(v=VERSION, run_id=run.run_id, registered_at=ctx.now(), write_id=ctx.new_id())


def idempotency_puts(run: RunKeys, key: bytes, record: IdempotencyRow) -> tuple[Put, Put]:
    """Write an idempotency key, and the run's note of it."""
    value = encode(record)
    return (Put(key, value), Put(run.points_at(key), value))
