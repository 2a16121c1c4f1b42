"""What becomes of a claimed step: start, completion, deferral, skip. Each is one transaction guarded by what it saw.

A program proposes a change to the step as it believes it stands; the transaction holds only if it does stand so, and
otherwise shows what stands instead. Where the store has just written the step itself, the first proposal needs no read.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from stepclaim._core.claims import carried_through, holder_check, look, ref_of, seen
from stepclaim._core.context import Context, Holding, View, view_of
from stepclaim._core.keys import last_segment
from stepclaim._core.ops import Action, Compare, Delete, Get, Program, Put, PutOnce, Range, Txn, TxnReply, read_prefix
from stepclaim._core.records import (
    VERSION,
    ClaimRecord,
    DispatchRow,
    Payload,
    StatusOnly,
    StepRow,
    Stored,
    decode,
    encode,
)
from stepclaim._core.starting import Base, Start, base_of, begin_with, token_of
from stepclaim.errors import ClaimError, ClaimLostError, ConfigurationError, OutcomeUnknownError, StepConflictError
from stepclaim.models import ClaimState, StepClaim, StepStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from stepclaim._core.keys import StepKeys
    from stepclaim.abc import RunId


MOST_DISPATCHES = 100
"""etcd takes 128 operations in a transaction, nested ones included."""


class Change(Struct, frozen=True):
    """A proposal: what must still stand, what is written, and the row as it will be."""

    compares: tuple[Compare, ...]
    actions: tuple[Action, ...]
    row: StepRow
    payload: Payload | None = None


Decision: TypeAlias = "Callable[[View], Program[Change | None]]"
"""Judges what stands: a change, None if there is nothing to do, or an error that refuses."""


class Write(Struct, frozen=True):
    """One write's identity, the same through all its retries, and its time."""

    write_id: str
    now: datetime

    @classmethod
    def new(cls, ctx: Context) -> Write:
        """Begin a write."""
        return cls(ctx.new_id(), ctx.now())


class Written(Struct, frozen=True):
    """What an update left behind; without a reply where its own was lost and it recognised what it wrote."""

    row: StepRow
    row_revision: int
    payload: Payload | None
    reply: TxnReply | None = None


def _update(ref: StepKeys, write_id: str, guess: View | None, decide: Decision) -> Program[Written | None]:
    """Propose, and propose again to what stands instead, until a change is taken, refused or not needed."""
    view = guess if guess is not None else (yield from look(ref))
    in_doubt = False
    before = view
    while True:
        try:
            change = yield from decide(view)
        except (ClaimLostError, StepConflictError) as refused:
            if in_doubt and (yield from _was_written(ref, write_id, before, view, refused)):
                return None
            raise
        if change is None:
            return None
        reply = yield from Txn(compares=change.compares, success=change.actions, failure=(Get(ref.claim), Get(ref.row)))
        if reply.succeeded:
            return Written(change.row, reply.revision, change.payload, reply)
        in_doubt = in_doubt or reply.in_doubt
        before, view = view, seen(reply.found)
        if view.row is not None and view.row.record.write_id == write_id:
            return Written(view.row.record, view.row.kv.mod_revision, change.payload)


def _was_written(
    ref: StepKeys, write_id: str, before: View, view: View, refused: ClaimError | StepConflictError
) -> Program[bool]:
    """Tell whether a write whose reply was lost took place before others went on: the records' ids are the evidence.

    True if it did, False if it certainly did not; raises `OutcomeUnknownError` where the evidence was overwritten.
    """
    rows = [] if view.row is None else [view.row.record]
    rows += [decode(kv, StepRow) for kv in (yield from read_prefix(ref.attempts))]
    ids = {row.write_id for row in rows}
    if write_id in ids:
        return True
    if before.row is not None and before.row.record.write_id in ids:
        return False  # the row stands, or was put among the earlier attempts, as it was before this write
    raise OutcomeUnknownError(
        f"the reply to a write on {ref} was lost, and others have written since: whether it took place can't be told"
    ) from refused


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
            holder_check(ref, view, holding.claim)
        base = Base() if first and view.row is None else (yield from base_of(ref, view.row))
        first = False
        token = None if holding is None else holding.claim.fencing_token
        begun = start.begin(ref, base, owner=ctx.owner, write_id=write.write_id, now=write.now, token=token)
        guard = () if token is None else (Compare(ref.claim, "mod", token),)
        return Change((*guard, *begun.compares), begun.puts, begun.row, begun.payload)

    guess = View(None, None) if holding is None else view_of(ref, holding)
    written = yield from _update(ref, write.write_id, guess, decide)
    if written is None:  # found among the earlier attempts: others went on since
        kept = [decode(kv, StepRow) for kv in (yield from read_prefix(ref.attempts))]
        return next(row.attempt for row in kept if row.write_id == write.write_id)
    _note(ctx, ref, holding, written)
    return written.row.attempt


class Outcome(Struct, frozen=True):
    """What came of an attempt."""

    status: StepStatus
    output_json: str | None
    error: str | None

    @classmethod
    def checked(cls, ctx: Context, status: StepStatus | str, output_json: str | None, error: str | None) -> Outcome:
        """Check status and texts before anything is sent."""
        try:
            known = StepStatus(status)
        except ValueError as unknown:
            names = ", ".join(StepStatus)
            raise ConfigurationError(f"status {status!r} is unknown: give one of {names}") from unknown
        ctx.field(output_json, "output_json")
        ctx.field(error, "error")
        return cls(known, output_json, error)


def complete(
    ctx: Context,
    claim: StepClaim,
    status: StepStatus | str,
    output_json: str | None,
    error: str | None,
    dispatch: Iterable[str] = (),
) -> Program[frozenset[str]]:
    """Finish a claimed step: status, attempt and seal in one transaction that holds only while the claim is held.

    The steps to dispatch go into the ledger with it; those that were not in there yet are given back.
    """
    ref = ref_of(ctx, claim)
    if isinstance(dispatch, str):
        raise ConfigurationError(f"dispatch must be several step keys, not one text: [{dispatch!r}]")
    run = ctx.keys.run(claim.run_id)
    successors = [run.step(key) for key in dict.fromkeys(dispatch)]
    if len(successors) > MOST_DISPATCHES:
        raise ConfigurationError(
            f"{len(successors)} dispatches are too many for one transaction: give at most {MOST_DISPATCHES} and record "
            "the others with try_record_dispatch"
        )
    outcome = Outcome.checked(ctx, status, output_json, error)
    if not outcome.status.is_final:
        raise ConfigurationError(
            f"complete_step takes a final status, not {outcome.status}: to run the step again later use defer_step"
        )
    holding = ctx.holding(ref, claim.fencing_token)
    return (yield from carried_through(partial(_finish, ctx, ref, outcome, claim, holding, successors=successors)))


def record_complete(
    ctx: Context,
    run_id: RunId,
    step_key: str,
    status: StepStatus | str,
    output_json: str | None,
    error: str | None,
) -> Program[None]:
    """Record an attempt's outcome, guarded where this store took the claim."""
    ref = ctx.keys.step(run_id, step_key)
    outcome = Outcome.checked(ctx, status, output_json, error)
    if outcome.status is StepStatus.RUNNING:
        raise ConfigurationError("record_step_complete takes Pending or a final status: to begin use record_step_start")
    holding = ctx.holding(ref)
    if holding is not None and holding.row is None:
        # claimed here, started elsewhere or not at all: only etcd knows
        view = yield from look(ref)
        if view.row is None:
            return
        yield from _finish(ctx, ref, outcome, holding.claim, None, view)
        return
    yield from _finish(ctx, ref, outcome, None if holding is None else holding.claim, holding)


def _finish(
    ctx: Context,
    ref: StepKeys,
    outcome: Outcome,
    claim: StepClaim | None,
    holding: Holding | None,
    guess: View | None = None,
    successors: Sequence[StepKeys] = (),
) -> Program[frozenset[str]]:
    write = Write.new(ctx)
    entry = encode(DispatchRow(v=VERSION, recorded_at=write.now, write_id=write.write_id)) if successors else b""
    dispatches = tuple(PutOnce(each.dispatch, entry) for each in successors)

    def decide(view: View) -> Program[Change | None]:
        row = view.row
        if claim is not None:
            try:
                holder_check(ref, view, claim)
            except ClaimLostError:
                if _sealed_by(view, claim) and (yield from _same_result(ref, row, outcome)):
                    return None  # the holder's own result, told again
                raise
        elif row is None:
            return None
        elif row.record.status.is_final:
            if (yield from _same_result(ref, row, outcome)):
                return None
            raise StepConflictError(
                f"{ref} is {row.record.status} already: a result counts once; retry the step to run it again"
            )
        payload = yield from _payload_of(ref, row, holding)
        return _outcome_change(ctx, ref, view, outcome, claim, payload, write, dispatches)

    if guess is None and holding is not None:
        guess = view_of(ref, holding)
    written = yield from _update(ref, write.write_id, guess, decide)
    token = None if claim is None else claim.fencing_token
    if outcome.status.is_final:
        ctx.forget(ref, token)
    elif written is not None:
        _note(ctx, ref, holding, written)
    if not successors or written is None:
        return frozenset()
    if written.reply is not None:
        put = written.reply.put
    else:
        looked = yield from Txn(compares=(), success=tuple(Get(each.dispatch) for each in successors))
        put = tuple(kv is not None and kv.value == entry for kv in looked.found)
    return frozenset(each.step_key for each, own in zip(successors, put, strict=True) if own)


def _outcome_change(
    ctx: Context,
    ref: StepKeys,
    view: View,
    outcome: Outcome,
    claim: StepClaim | None,
    known: Payload | None,
    write: Write,
    dispatches: tuple[PutOnce, ...],
) -> Change:
    row = view.row
    final = outcome.status.is_final
    if outcome.output_json is None and outcome.error is None:
        payload = known
    else:
        payload = replace(known or Payload(v=VERSION), output=outcome.output_json, error=outcome.error)
    if row is None:  # the row of a held claim was removed by hand: the result must not be lost for that
        assert claim is not None
        new = StepRow(
            v=VERSION,
            status=outcome.status,
            attempt=max(claim.attempt, 1),
            token=claim.fencing_token,
            owner=claim.owner,
            completed_at=write.now,
            payload=payload is not None,
            write_id=write.write_id,
        )
    else:
        new = replace(
            row.record,
            status=outcome.status,
            token=token_of(row),
            completed_at=write.now if final else None,
            reason=None,
            payload=payload is not None,
            write_id=write.write_id,
        )
    actions: list[Action] = [Put(ref.row, encode(new, row.kv if row else None))]
    if final:
        actions.insert(0, _seal(ctx, ref, view.claim, new, write))
    if payload is not None and payload is not known:
        actions.append(Put(ref.payload(new.attempt), encode(payload)))
    actions += dispatches
    compares = [Compare(ref.row, "mod", row.kv.mod_revision if row else 0)]
    if final or claim is not None:
        compares.insert(0, Compare(ref.claim, "mod", view.claim.kv.mod_revision if view.claim else 0))
    return Change(tuple(compares), tuple(actions), new, payload)


def _seal(ctx: Context, ref: StepKeys, claim: Stored[ClaimRecord] | None, row: StepRow, write: Write) -> Put:
    """Rewrite the claim without a lease: its create revision stays, and nobody can claim the step any more."""
    record = (
        claim.record
        if claim
        else ClaimRecord(
            v=VERSION, state=ClaimState.HELD, owner=ctx.owner, attempt_id=write.write_id, claimed_at=write.now
        )
    )
    sealed = replace(record, state=ClaimState.SEALED, status=row.status, sealed_at=write.now, attempt=row.attempt)
    return Put(ref.claim, encode(sealed, claim.kv if claim else None))


def _sealed_by(view: View, claim: StepClaim) -> bool:
    standing = view.claim
    return (
        standing is not None
        and standing.kv.create_revision == claim.fencing_token
        and standing.record.owner == claim.owner
        and view.row is not None
        and token_of(view.row) == claim.fencing_token
    )


def _same_result(ref: StepKeys, row: Stored[StepRow] | None, outcome: Outcome) -> Program[bool]:
    if row is None or row.record.status is not outcome.status:
        return False
    payload = yield from _payload_of(ref, row, None)
    standing = payload or Payload(v=VERSION)
    return standing.output == outcome.output_json and standing.error == outcome.error


def _payload_of(ref: StepKeys, row: Stored[StepRow] | None, holding: Holding | None) -> Program[Payload | None]:
    if row is None or not row.record.payload:
        return None
    if holding is not None and holding.row is not None and holding.row.write_id == row.record.write_id:
        return holding.payload
    page = yield from Range(key=ref.payload(row.record.attempt), range_end=b"")
    return decode(page.kvs[0], Payload) if page.kvs else None


def defer(ctx: Context, claim: StepClaim, reason: str | None, dispatch: bool) -> Program[None]:
    """Set a claimed step back to Pending and give the claim up, in one transaction; with a fresh dispatch, if asked."""
    ref = ref_of(ctx, claim)
    ctx.field(reason, "reason")
    yield from carried_through(partial(_defer, ctx, ref, claim, reason, dispatch=dispatch))


def _defer(ctx: Context, ref: StepKeys, claim: StepClaim, reason: str | None, *, dispatch: bool) -> Program[None]:
    write = Write.new(ctx)
    holding = ctx.holding(ref, claim.fencing_token)

    def decide(view: View) -> Program[Change | None]:
        holder_check(ref, view, claim)
        row = view.row
        actions: list[Action] = [Delete(ref.claim)]
        compares = [Compare(ref.claim, "mod", claim.fencing_token)]
        new = StepRow(
            v=VERSION,
            status=StepStatus.PENDING,
            attempt=max(claim.attempt, 1),
            token=claim.fencing_token,
            owner=claim.owner,
            reason=reason,
            write_id=write.write_id,
        )
        if row is not None:
            new = replace(
                row.record, status=StepStatus.PENDING, token=token_of(row), reason=reason, write_id=write.write_id
            )
        compares.append(Compare(ref.row, "mod", row.kv.mod_revision if row else 0))
        actions.append(Put(ref.row, encode(new, row.kv if row else None)))
        if dispatch:
            entry = DispatchRow(v=VERSION, recorded_at=write.now, write_id=write.write_id)
            actions.append(Put(ref.dispatch, encode(entry)))
        return Change(tuple(compares), tuple(actions), new)
        yield  # a decision is a program, also where it asks for nothing

    guess = view_of(ref, holding) if holding is not None else None
    yield from _update(ref, write.write_id, guess, decide)
    ctx.forget(ref, claim.fencing_token)


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
            if holding is None or holding.claim.fencing_token != token:
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
            write_id=write.write_id,
        )
        begun = begin_with(ref, base, new, payload)
        guard = Compare(ref.claim, "mod", standing.kv.mod_revision if standing else 0)
        return Change((guard, *begun.compares), (_seal(ctx, ref, standing, new, write), *begun.puts), new)

    guess = View(None, None) if holding is None else view_of(ref, holding)
    yield from _update(ref, write.write_id, guess, decide)
    ctx.forget(ref)


def _note(ctx: Context, ref: StepKeys, holding: Holding | None, written: Written) -> None:
    """Keep what was written to a claimed step, so that the next write needs no read."""
    if holding is not None and ctx.holding(ref, holding.claim.fencing_token) is holding:
        holding.row, holding.row_revision, holding.payload = written.row, written.row_revision, written.payload


def statuses(ctx: Context, run_id: RunId) -> Program[dict[str, StepStatus]]:
    """Read all steps' statuses as one snapshot."""
    kvs = yield from read_prefix(ctx.keys.run(run_id).below("steps"))
    return {last_segment(kv.key): decode(kv, StatusOnly).status for kv in kvs}
