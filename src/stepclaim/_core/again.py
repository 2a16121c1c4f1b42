"""Running a step again: a failed one, those that were skipped because of it; and finding those that nobody runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from stepclaim._core.claims import seen
from stepclaim._core.keys import StepKeys, last_segment
from stepclaim._core.ops import Action, Compare, Delete, Get, Program, Put, Txn, read_snapshot
from stepclaim._core.records import (
    VERSION,
    ActiveRow,
    ClaimRecord,
    RunRow,
    StatusOnly,
    StepRow,
    Stored,
    decode,
    encode,
    stored,
)
from stepclaim._core.starting import settled
from stepclaim.errors import ConfigurationError
from stepclaim.models import PREREQUISITES_UNMET, ClaimState, RunStatus, StepStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.context import Context, View
    from stepclaim.abc import RunId

_KEYS_A_TRANSACTION = 24


def retry_step(ctx: Context, run_id: RunId, step_key: str) -> Program[None]:
    """Set step and run back to Running; claim and dispatch go, and with them whatever the old holder may write."""
    run = ctx.keys.run(run_id)
    ref = run.step(step_key)
    write_id = ctx.new_id()
    gets = (Get(ref.claim), Get(ref.row), Get(run.record))
    holding = ctx.holding(ref)
    reply = yield from Txn(compares=(), success=gets)
    before: View | None = None
    while True:
        view, standing = seen(reply.found[:2]), stored(reply.found[2], RunRow)
        if reply.in_doubt and before is not None and _went_on(before, view):
            break  # this retry, or another, took place, and the step went on from there: leave its new holder alone
        compares = [
            Compare(ref.claim, "mod", view.claim.kv.mod_revision if view.claim else 0),
            Compare(ref.row, "mod", view.row.kv.mod_revision if view.row else 0),
            Compare(run.record, "mod", standing.kv.mod_revision if standing else 0),
        ]
        actions: list[Action] = [Delete(ref.claim), Delete(ref.dispatch)]
        if view.row is not None:
            actions += _waiting_row(ref, view.row, write_id)
        if standing is not None and standing.record.status.is_final:
            running = replace(standing.record, status=RunStatus.RUNNING, completed_at=None, write_id=write_id)
            started_at = ActiveRow(v=VERSION, started_at=running.started_at)
            actions += [Put(run.record, encode(running, standing.kv)), Put(run.active, encode(started_at))]
        before = view
        reply = yield from Txn(compares=tuple(compares), success=tuple(actions), failure=gets)
        if reply.succeeded:
            break
    if holding is not None:
        ctx.forget(ref, holding.token)


def _went_on(before: View, now: View) -> bool:
    """Whether a step was retried since it was seen: it waits for its next attempt, or that has begun."""
    if before.row is None and now.row is None:  # nothing was ever begun: only the claim was to go, and it went
        return _created(before) != _created(now)
    if before.row is None or now.row is None:
        return True
    return now.row.record.retried or now.row.record.attempt > before.row.record.attempt


def _created(view: View) -> int:
    return view.claim.kv.create_revision if view.claim else 0


def _waiting_row(ref: StepKeys, row: Stored[StepRow], write_id: str) -> list[Action]:
    """Keep the attempt among the earlier ones, and let the row say Running while it waits for the next."""
    waiting = replace(
        settled(row),
        status=StepStatus.RUNNING,
        completed_at=None,
        reason=None,
        payload=False,
        retried=True,
        write_id=write_id,
    )
    actions: list[Action] = [Put(ref.row, encode(waiting, row.kv))]
    if not row.record.retried:
        actions.append(Put(ref.attempt(row.record.attempt), encode(settled(row), row.kv)))
    return actions


def reset_skipped(ctx: Context, run_id: RunId, step_keys: Iterable[str]) -> Program[None]:
    """Let steps be evaluated anew that were skipped only because of what came before them; their attempts stay."""
    if isinstance(step_keys, str):
        raise ConfigurationError(f"step_keys must be several step keys, not one text: [{step_keys!r}]")
    run = ctx.keys.run(run_id)
    refs = [run.step(key) for key in dict.fromkeys(step_keys)]
    for first in range(0, len(refs), _KEYS_A_TRANSACTION):
        batch = refs[first : first + _KEYS_A_TRANSACTION]
        while not (yield from _reset_batch(batch)):
            continue


def _reset_batch(refs: list[StepKeys]) -> Program[bool]:
    reply = yield from Txn(compares=(), success=tuple(Get(ref.row) for ref in refs))
    compares: list[Compare] = []
    actions: list[Action] = []
    matched: list[StepKeys] = []
    for ref, kv in zip(refs, reply.found, strict=True):
        row = stored(kv, StepRow)
        if row is None or row.record.status is not StepStatus.SKIPPED or row.record.reason != PREREQUISITES_UNMET:
            continue
        matched.append(ref)
        compares.append(Compare(ref.row, "mod", row.kv.mod_revision))
        actions += [Delete(ref.row), Delete(ref.claim), Delete(ref.dispatch)]
        actions.append(Put(ref.attempt(row.record.attempt), encode(settled(row), row.kv)))
    if matched:
        answer = yield from Txn(compares=tuple(compares), success=tuple(actions))
        if not answer.succeeded:
            # after a lost reply the matched rows are gone, or were evaluated anew: looking again leaves those alone
            return False
    return True


def orphaned_steps(ctx: Context, run_id: RunId) -> Program[frozenset[str]]:
    """Name the steps that are Running without a claim that is held, as of one revision."""
    run = ctx.keys.run(run_id)
    while True:
        rows, revision = yield from read_snapshot(run.below("steps"))
        running = {last_segment(kv.key) for kv in rows if decode(kv, StatusOnly).status is StepStatus.RUNNING}
        if not running:
            return frozenset()
        claims, as_of = yield from read_snapshot(run.below("claims"), revision=revision)
        if as_of == revision:  # else a compaction came between
            held = {last_segment(kv.key) for kv in claims if decode(kv, ClaimRecord).state is ClaimState.HELD}
            return frozenset(running - held)
