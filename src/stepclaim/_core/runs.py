"""Runs: their records, the index of the active ones, and the dispatch ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from stepclaim._core.control import idempotency_puts, idempotency_record
from stepclaim._core.keys import RunKeys, attempt_number, last_segment, run_name
from stepclaim._core.ops import (
    Compare,
    Delete,
    Get,
    Program,
    Put,
    Range,
    Txn,
    prefix_end,
    read_key,
    read_prefix,
)
from stepclaim._core.records import (
    VERSION,
    ActiveRow,
    DispatchRow,
    IdempotencyRow,
    Payload,
    RunRow,
    StepRow,
    Stored,
    decode,
    encode,
    stored,
)
from stepclaim._core.starting import token_of
from stepclaim.errors import ConfigurationError, OutcomeUnknownError, StepConflictError
from stepclaim.models import AttemptRecord, RunRecord, RunStatus, StepRecord, StepStatus

if TYPE_CHECKING:
    from stepclaim._core.context import Context
    from stepclaim.abc import RunId

_BATCH = 100


def start_run(
    ctx: Context,
    flow_id: RunId,
    flow_name: str,
    run_id: RunId,
    trigger_key: str,
    trigger_data_json: str | None,
    job_id: str | None,
    source_run_id: RunId | None,
    idempotency_key: str | None,
) -> Program[RunRecord]:
    """Create a run's record and its entry among the active ones, or give the record that stands.

    With an idempotency key: that of the run which the key stands for, whatever its id.
    """
    run = ctx.keys.run(run_id)
    once = None if idempotency_key is None else ctx.keys.idempotency(flow_id, trigger_key, idempotency_key)
    ctx.field(flow_name, "flow_name", optional=False)
    ctx.field(trigger_key, "trigger_key", optional=False)
    ctx.field(trigger_data_json, "trigger_data_json")
    ctx.field(job_id, "job_id")
    record = RunRow(
        v=VERSION,
        flow_id=run_name(flow_id, "flow_id"),
        flow_name=flow_name,
        status=RunStatus.RUNNING,
        trigger_key=trigger_key,
        trigger_data=trigger_data_json,
        job_id=job_id,
        source_run_id=None if source_run_id is None else run_name(source_run_id, "source_run_id"),
        started_at=ctx.now(),
        write_id=ctx.new_id(),
    )
    puts = (
        Put(run.record, encode(record)),
        Put(run.active, encode(ActiveRow(v=VERSION, started_at=record.started_at))),
    )
    while True:
        if once is None:
            reply = yield from Txn(
                compares=(Compare(run.record, "create", 0),), success=puts, failure=(Get(run.record),)
            )
        else:
            reply = yield from Txn(
                compares=(Compare(run.record, "create", 0), Compare(once, "create", 0)),
                success=(*puts, *idempotency_puts(run, once, idempotency_record(ctx, run))),
                failure=(Get(run.record), Get(once)),
            )
        if reply.succeeded:
            return run_record(run.run_id, record)
        standing = reply.found[0]
        if once is not None and reply.found[1] is not None:
            winner = ctx.keys.run(decode(reply.found[1], IdempotencyRow).run_id)
            winning = yield from _run_row(winner)
            if winning is not None:
                return run_record(winner.run_id, winning.record)
            if winner.run_id != run.run_id:
                raise StepConflictError(
                    f"idempotency key {idempotency_key!r} stands for run {winner.run_id!r}, which was never started: "
                    "start that run, or delete it to free the key"
                )
            once = None  # the key was registered for this very run before: only the run is missing
            continue
        if standing is not None:
            return run_record(run.run_id, decode(standing, RunRow))


def complete_run(ctx: Context, run_id: RunId, status: RunStatus | str) -> Program[bool]:
    """Give a run its final status; the first one wins."""
    run = ctx.keys.run(run_id)
    try:
        final = RunStatus(status)
    except ValueError as unknown:
        raise ConfigurationError(f"status {status!r} is unknown: give one of {', '.join(RunStatus)}") from unknown
    if not final.is_final:
        raise ConfigurationError(f"complete_run takes a final status, not {final}")
    write_id, now = ctx.new_id(), ctx.now()
    standing = yield from _run_row(run)
    while standing is not None and not standing.record.status.is_final:
        before = standing.record.completions
        record = replace(standing.record, status=final, completed_at=now, completions=before + 1, write_id=write_id)
        reply = yield from Txn(
            compares=(Compare(run.record, "mod", standing.kv.mod_revision),),
            success=(Put(run.record, encode(record, standing.kv)), Delete(run.active)),
            failure=(Get(run.record),),
        )
        if reply.succeeded:
            return True
        standing = stored(reply.found[0], RunRow)
        if standing is not None and standing.record.write_id == write_id:
            return True
        if reply.in_doubt and (
            standing is None or standing.record.completions > before + standing.record.status.is_final
        ):
            raise OutcomeUnknownError(
                f"the reply to completing run {run.run_id!r} was lost, and it was retried or deleted since: whether it "
                "was completed before can't be told"
            )
    return False


def run_status(ctx: Context, run_id: RunId) -> Program[RunStatus | None]:
    """Read a run's status."""
    standing = yield from _run_row(ctx.keys.run(run_id))
    return None if standing is None else standing.record.status


def _run_row(run: RunKeys) -> Program[Stored[RunRow] | None]:
    return stored((yield from read_key(run.record)), RunRow)


def active_runs(ctx: Context) -> Program[list[RunRecord]]:
    """Read the runs that are Running, newest first, at the cost of the active ones alone."""
    entries = yield from read_prefix(ctx.keys.active, keys_only=True)
    names = [last_segment(kv.key) for kv in entries]
    return (yield from _fetch(ctx, names, only_running=True))


def ping(ctx: Context) -> Program[None]:
    """Ask for one key, so that a cluster that can't be reached or refuses is told of."""
    yield from Range(key=ctx.keys.active, range_end=prefix_end(ctx.keys.active), limit=1, keys_only=True)


def list_runs(ctx: Context) -> Program[list[RunRecord]]:
    """Read all runs' records, newest first. Costs a look at every key of every run."""
    entries = yield from read_prefix(ctx.keys.runs, keys_only=True)
    names = []
    for kv in entries:
        run, _, rest = kv.key.removeprefix(ctx.keys.runs).partition(b"/")
        if rest == b"run":
            names.append(last_segment(run))
    return (yield from _fetch(ctx, names, only_running=False))


def _fetch(ctx: Context, names: list[str], *, only_running: bool) -> Program[list[RunRecord]]:
    found: list[tuple[int, RunRecord]] = []
    for first in range(0, len(names), _BATCH):
        batch = names[first : first + _BATCH]
        reply = yield from Txn(compares=(), success=tuple(Get(ctx.keys.run(name).record) for name in batch))
        for name, kv in zip(batch, reply.found, strict=True):
            if kv is not None:
                record = run_record(name, decode(kv, RunRow))
                if not only_running or not record.status.is_final:
                    found.append((kv.create_revision, record))
    found.sort(key=lambda each: each[0], reverse=True)
    return [record for _, record in found]


def get_run(ctx: Context, run_id: RunId) -> Program[RunRecord | None]:
    """Read a run with its steps and their attempts, all as of one revision."""
    run = ctx.keys.run(run_id)
    record: RunRow | None = None
    rows: dict[str, Stored[StepRow]] = {}
    earlier: dict[str, list[Stored[StepRow]]] = {}
    payloads: dict[tuple[str, int], Payload] = {}
    for kv in (yield from read_prefix(run.all)):
        part, _, rest = kv.key.removeprefix(run.all).partition(b"/")
        if part == b"run":
            record = decode(kv, RunRow)
        elif part == b"steps":
            rows[last_segment(rest)] = Stored(decode(kv, StepRow), kv)
        elif part in (b"attempts", b"payloads"):
            step = rest.partition(b"/")[0]
            name = last_segment(step)
            if part == b"attempts":
                earlier.setdefault(name, []).append(Stored(decode(kv, StepRow), kv))
            else:
                payloads[name, attempt_number(kv.key)] = decode(kv, Payload)
    if record is None:
        return None
    steps = (_step_record(name, row, earlier.get(name, []), payloads) for name, row in sorted(rows.items()))
    return run_record(run.run_id, record, tuple(steps))


def _step_record(
    name: str,
    current: Stored[StepRow],
    earlier: list[Stored[StepRow]],
    payloads: dict[tuple[str, int], Payload],
) -> StepRecord:
    history = sorted(earlier, key=lambda row: row.record.attempt)
    if current.record.retried:  # the row stands for no attempt of its own: it waits for the next one
        attempts = tuple(_attempt_record(name, row, payloads) for row in history)
        last = _attempt_record(name, current, {})
    else:
        attempts = tuple(_attempt_record(name, row, payloads) for row in (*history, current))
        last = attempts[-1]
    return StepRecord(
        step_key=name,
        step_type=last.step_type,
        status=last.status,
        attempt_count=last.attempt,
        attempts=attempts,
        input_json=last.input_json,
        output_json=last.output_json,
        error=last.error,
        evaluation_trace_json=last.evaluation_trace_json,
        job_id=last.job_id,
        owner=last.owner,
        fencing_token=last.fencing_token,
        started_at=last.started_at,
        completed_at=last.completed_at,
    )


def _attempt_record(name: str, stored_row: Stored[StepRow], payloads: dict[tuple[str, int], Payload]) -> AttemptRecord:
    row = stored_row.record
    payload = payloads.get((name, row.attempt)) or Payload(v=VERSION)
    return AttemptRecord(
        attempt=row.attempt,
        step_key=name,
        step_type=row.type,
        status=row.status,
        input_json=payload.input,
        output_json=payload.output,
        error=row.reason if row.status is StepStatus.SKIPPED else payload.error,
        evaluation_trace_json=payload.trace,
        job_id=row.job,
        owner=row.owner,
        fencing_token=token_of(stored_row),
        started_at=row.started_at,
        completed_at=row.completed_at,
    )


def run_record(run_id: str, row: RunRow, steps: tuple[StepRecord, ...] = ()) -> RunRecord:
    """Tell a run as a public value."""
    return RunRecord(
        run_id=run_id,
        flow_id=row.flow_id,
        flow_name=row.flow_name,
        status=row.status,
        trigger_key=row.trigger_key,
        trigger_data_json=row.trigger_data,
        job_id=row.job_id,
        source_run_id=row.source_run_id,
        started_at=row.started_at,
        completed_at=row.completed_at,
        steps=steps,
    )


def try_record_dispatch(ctx: Context, run_id: RunId, step_key: str) -> Program[bool]:
    """Write a step into the dispatch ledger; True for the one call that did."""
    ref = ctx.keys.step(run_id, step_key)
    record = DispatchRow(v=VERSION, recorded_at=ctx.now(), write_id=ctx.new_id())
    reply = yield from Txn(
        compares=(Compare(ref.dispatch, "create", 0),),
        success=(Put(ref.dispatch, encode(record)),),
        failure=(Get(ref.dispatch),),
    )
    if reply.succeeded:
        return True
    standing = reply.found[0]
    return standing is not None and decode(standing, DispatchRow).write_id == record.write_id


def annotate_dispatch(ctx: Context, run_id: RunId, step_key: str, job_id: str) -> Program[None]:
    """Note the job that a dispatch became; a dispatch that was released stays released."""
    ref = ctx.keys.step(run_id, step_key)
    ctx.field(job_id, "job_id")
    standing = yield from read_key(ref.dispatch)
    while standing is not None:
        record = decode(standing, DispatchRow)
        if record.job == job_id:
            return
        reply = yield from Txn(
            compares=(Compare(ref.dispatch, "mod", standing.mod_revision),),
            success=(Put(ref.dispatch, encode(replace(record, job=job_id), standing)),),
            failure=(Get(ref.dispatch),),
        )
        if reply.succeeded:
            return
        standing = reply.found[0]


def release_dispatch(ctx: Context, run_id: RunId, step_key: str) -> Program[None]:
    """Take a step out of the dispatch ledger; never an entry made after this call looked."""
    ref = ctx.keys.step(run_id, step_key)
    standing = yield from read_key(ref.dispatch)
    while standing is not None:
        reply = yield from Txn(
            compares=(Compare(ref.dispatch, "mod", standing.mod_revision),),
            success=(Delete(ref.dispatch),),
            failure=(Get(ref.dispatch),),
        )
        now = None if reply.succeeded else reply.found[0]
        standing = now if now is not None and now.create_revision == standing.create_revision else None


def dispatched_step_keys(ctx: Context, run_id: RunId) -> Program[frozenset[str]]:
    """Name the steps in the dispatch ledger."""
    kvs = yield from read_prefix(ctx.keys.run(run_id).below("dispatches"), keys_only=True, shared=True)
    return frozenset(last_segment(kv.key) for kv in kvs)
