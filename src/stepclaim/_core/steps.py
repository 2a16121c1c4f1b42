"""The engine's writers of steps: an attempt begins, a step is skipped; and all statuses at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepclaim._core.claims import holder_check
from stepclaim._core.context import View, view_of
from stepclaim._core.keys import last_segments
from stepclaim._core.ops import Compare, Program, read_pages
from stepclaim._core.records import VERSION, Payload, StatusOnly, StepRow, decode_each
from stepclaim._core.starting import Base, Start, base_of, begin_with
from stepclaim._core.updating import Change, Write, Written, note, seal, update
from stepclaim.errors import StepConflictError
from stepclaim.models import ClaimState, StepStatus

if TYPE_CHECKING:
    from stepclaim._core.context import Context
    from stepclaim._core.ops import KeyValue
    from stepclaim.abc import RunId

_FIRST_PAGE = 4000
"""Rows that are asked for first: most runs have no more steps."""


def record_start(
    ctx: Context, run_id: RunId, step_key: str, step_type: str, input_json: str | None, job_id: str | None
) -> Program[int]:
    """Begin an attempt, guarded where this store took the claim, and give its number."""
    ref = ctx.keys.step(run_id, step_key)
    start = Start.checked(ctx, step_type, input_json, job_id)
    write = Write.new(ctx)
    holding = ctx.holding(ref)
    first = True

    def decide(view: View) -> Program[Change | None]:
        nonlocal first
        if holding is not None:
            holder_check(ctx, ref, view, holding.claim(ctx, ref))
        base = Base() if first and view.row is None else (yield from base_of(ref, view.row))
        first = False
        token = None if holding is None else holding.token
        begun = start.begin(ref, base, owner=ctx.owner, write_id=write.write_id, now=write.now, token=token)
        guard = () if token is None else (Compare(ref.claim, "mod", token),)
        return Change((*guard, *begun.compares), begun.puts, begun.row, begun.payload)

    guess = View(None, None) if holding is None else view_of(ref, holding)
    written = yield from update(ref, write.write_id, guess, decide, begins=True)
    assert isinstance(written, Written)  # a start always has something to do
    note(ctx, ref, holding, written)
    return written.row.attempt


def skip(
    ctx: Context, run_id: RunId, step_key: str, step_type: str, reason: str | None, evaluation_trace_json: str | None
) -> Program[None]:
    """Set a step to Skipped, with an attempt of its own, and seal its claim, in one transaction."""
    ref = ctx.keys.step(run_id, step_key)
    ctx.field(step_type, "step_type", optional=False)
    ctx.field(reason, "reason")
    ctx.field(evaluation_trace_json, "evaluation_trace_json")
    write = Write.new(ctx)
    holding = ctx.holding(ref)
    first = True

    def decide(view: View) -> Program[Change | None]:
        nonlocal first
        row, standing = view.row, view.claim
        if row is not None and row.record.status is StepStatus.SKIPPED:
            return None
        if row is not None and row.record.status.is_final:
            raise StepConflictError(f"{ref} is {row.record.status}: it can't be skipped any more")
        if standing is not None and standing.record.state is ClaimState.HELD:
            token = standing.kv.create_revision
            if holding is None or holding.token != token:
                raise StepConflictError(f"{ref} is claimed by {standing.record.owner}: it can't be skipped by another")
        base = Base() if first and row is None else (yield from base_of(ref, row))
        first = False
        payload = None if evaluation_trace_json is None else Payload(v=VERSION, trace=evaluation_trace_json)
        new = StepRow(
            v=VERSION,
            status=StepStatus.SKIPPED,
            type=step_type,
            attempt=base.next_attempt,
            owner=ctx.owner,
            token=standing.kv.create_revision if standing else None,
            started_at=write.now,
            completed_at=write.now,
            reason=reason,
            payload=payload is not None,
            attempt_id=write.write_id,
            write_id=write.write_id,
        )
        begun = begin_with(ref, base, new, payload)
        guard = Compare(ref.claim, "mod", standing.kv.mod_revision if standing else 0)
        return Change((guard, *begun.compares), (seal(ctx, ref, standing, new, write), *begun.puts), new)

    guess = View(None, None) if holding is None else view_of(ref, holding)
    yield from update(ref, write.write_id, guess, decide, begins=True)
    if holding is not None:
        ctx.forget(ref, holding.token)


def statuses(ctx: Context, run_id: RunId) -> Program[dict[str, StepStatus]]:
    """Read all steps' statuses as one snapshot."""
    prefix = ctx.keys.run(run_id).below("steps")

    def each(kvs: list[KeyValue]) -> list[dict[str, StepStatus]]:
        names = last_segments([kv.key for kv in kvs], prefix)
        rows = decode_each(kvs, StatusOnly)
        return [{name: row.status for name, row in zip(names, rows, strict=True)}]

    found, _ = yield from read_pages(prefix, each, shared=True, first=_FIRST_PAGE, lazy=True)
    told = found[0]
    for more in found[1:]:
        told |= more
    return told
