"""What a crash can leave behind in a run, found in one snapshot, and put right without touching what lives."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from stepclaim._core.keys import RunKeys, last_segment
from stepclaim._core.ops import Compare, Get, KeyValue, Program, Put, Txn, read_snapshot
from stepclaim._core.records import VERSION, ClaimRecord, DispatchRow, StepRow, decode, encode
from stepclaim._core.runs import complete_run
from stepclaim._core.steps import skip
from stepclaim.models import PREREQUISITES_UNMET, ClaimState, Finding, FindingKind, NextSteps, RunRecord, StepStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from stepclaim._core.context import Context

Plan: TypeAlias = "Callable[[RunRecord, Mapping[str, StepStatus]], NextSteps]"


class Seen(Struct, frozen=True):
    """A run's steps as of one revision."""

    rows: dict[str, KeyValue]
    claims: dict[str, KeyValue]
    dispatches: dict[str, KeyValue]

    @property
    def statuses(self) -> dict[str, StepStatus]:
        """All steps' statuses."""
        return {key: decode(kv, StepRow).status for key, kv in self.rows.items()}

    def held(self, key: str) -> bool:
        """Whether a step lives on some worker."""
        claim = self.claims.get(key)
        return claim is not None and decode(claim, ClaimRecord).state is ClaimState.HELD

    def on_its_way(self, key: str, too_old: datetime) -> bool:
        """Whether another recovery has dispatched this very orphan a short time ago."""
        entry = self.dispatches.get(key)
        if entry is None:
            return False
        record = decode(entry, DispatchRow)
        return record.orphan == self.rows[key].mod_revision and record.recorded_at > too_old


def recover_run(ctx: Context, run: RunRecord, plan: Plan | None, *, mend: bool, grace: float) -> Program[list[Finding]]:
    """Find what a crash left in one run; with `mend`, put it right. Whoever mends a finding is told so, once."""
    keys = ctx.keys.run(run.run_id)
    seen = yield from _look(keys)
    statuses = seen.statuses
    following = None if plan is None else plan(run, statuses)
    found: list[Finding] = []

    def note(kind: FindingKind, step_key: str | None, detail: str, *, mended: bool) -> None:
        found.append(Finding(kind, run.run_id, step_key, detail, mended))

    too_old = ctx.now() - timedelta(seconds=grace)
    for key, status in statuses.items():
        if status is StepStatus.RUNNING and not seen.held(key) and not seen.on_its_way(key, too_old):
            mended = mend and (yield from _dispatch_again(ctx, keys, seen, key))
            row = decode(seen.rows[key], StepRow)
            note(FindingKind.ORPHANED_STEP, key, f"attempt {row.attempt} by {row.owner} has no claim", mended=mended)
    for key, kv in seen.dispatches.items():
        entry = decode(kv, DispatchRow)
        if key in seen.claims or (entry.due or entry.recorded_at) > too_old:
            continue
        if key in seen.rows:
            if not _put_off(decode(seen.rows[key], StepRow), entry):
                continue
        elif following is not None and key not in following.ready:
            continue
        mended = mend and (yield from _dispatch_again(ctx, keys, seen, key))
        note(
            FindingKind.LOST_DISPATCH, key, f"recorded at {entry.recorded_at.isoformat()}, never started", mended=mended
        )
    if following is not None:
        for key in following.unreachable:
            if key not in seen.rows and key not in seen.claims:
                if mend:
                    yield from skip(ctx, run.run_id, key, "", PREREQUISITES_UNMET, None)
                note(FindingKind.UNREACHABLE_STEP, key, "its prerequisites can't be met any more", mended=mend)
        for key in following.ready:
            if key not in seen.rows and key not in seen.claims and key not in seen.dispatches:
                mended = mend and (yield from _dispatch_again(ctx, keys, seen, key))
                note(FindingKind.UNDISPATCHED_STEP, key, "it is ready, and not in the ledger", mended=mended)
    if _is_over(seen, statuses) and (following is None or following.outcome is not None):
        outcome = None if following is None else following.outcome
        mended = False
        if mend and outcome is not None:
            mended = yield from complete_run(ctx, run.run_id, outcome)
        detail = f"every step is final: {outcome or 'give a plan to know the status'}"
        note(FindingKind.UNCOMPLETED_RUN, None, detail, mended=mended)
    return found


def _put_off(row: StepRow, entry: DispatchRow) -> bool:
    """Whether a step is Pending by a deferral that said when its next message is due. Any other waits for somebody."""
    return row.status is StepStatus.PENDING and entry.due is not None and entry.write_id == row.write_id


def _is_over(seen: Seen, statuses: Mapping[str, StepStatus]) -> bool:
    return (
        bool(statuses)
        and all(status.is_final for status in statuses.values())
        and not any(seen.held(key) for key in seen.claims)
        and seen.dispatches.keys() <= seen.rows.keys()
    )


def _look(run: RunKeys) -> Program[Seen]:
    while True:
        rows, revision = yield from read_snapshot(run.below("steps"))
        claims, of_claims = yield from read_snapshot(run.below("claims"), revision=revision)
        dispatches, of_dispatches = yield from read_snapshot(run.below("dispatches"), revision=revision)
        if of_claims == of_dispatches == revision:  # else a compaction came between
            return Seen(_by_key(rows), _by_key(claims), _by_key(dispatches))


def _by_key(kvs: list[KeyValue]) -> dict[str, KeyValue]:
    return {last_segment(kv.key): kv for kv in kvs}


def _dispatch_again(ctx: Context, run: RunKeys, seen: Seen, key: str) -> Program[bool]:
    """Make the step's entry in the ledger anew, if row, claim and entry are as they were seen: True for one caller."""
    ref = run.step(key)
    standing = (
        (ref.row, seen.rows.get(key)),
        (ref.claim, seen.claims.get(key)),
        (ref.dispatch, seen.dispatches.get(key)),
    )
    row, old = seen.rows.get(key), seen.dispatches.get(key)
    entry = DispatchRow(
        v=VERSION, recorded_at=ctx.now(), orphan=row.mod_revision if row else None, write_id=ctx.new_id()
    )
    value = encode(entry, old)
    reply = yield from Txn(
        compares=tuple(Compare(each, "mod", kv.mod_revision if kv else 0) for each, kv in standing),
        success=(Put(ref.dispatch, value),),
        failure=(Get(ref.dispatch),),
    )
    now = None if reply.succeeded else reply.found[0]
    return reply.succeeded or (now is not None and now.value == value)
