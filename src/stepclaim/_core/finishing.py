"""Finishing a step: its result and its claim's seal, or its deferral, in one transaction guarded by the claim."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from stepclaim._core.claims import carried_through, holder_check, look, ref_of
from stepclaim._core.context import view_of
from stepclaim._core.ops import Action, Compare, Delete, Get, KeyValue, Program, Put, PutOnce, Txn, read_key
from stepclaim._core.records import VERSION, DispatchRow, Payload, StepRow, Stored, decode, encode, stored
from stepclaim._core.starting import token_of
from stepclaim._core.updating import Change, Write, Written, note, seal, update
from stepclaim.errors import ClaimLostError, ConfigurationError, StepConflictError
from stepclaim.models import StepClaim, StepStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stepclaim._core.context import Context, Holding, View
    from stepclaim._core.keys import StepKeys
    from stepclaim.abc import RunId

MOST_DISPATCHES = 100
"""etcd takes 128 operations in a transaction, nested ones included."""


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
        if view.row is None or view.row.record.retried:
            return
        yield from _finish(ctx, ref, outcome, holding.claim(ctx, ref), None, view)
        return
    yield from _finish(ctx, ref, outcome, None if holding is None else holding.claim(ctx, ref), holding)


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
                holder_check(ctx, ref, view, claim)
            except ClaimLostError:
                if _sealed_by(view, claim) and (yield from _same_result(ref, row, outcome)):
                    return None  # the holder's own result, told again
                raise
        elif row is None or row.record.retried:
            return None  # no attempt was begun that this could be the outcome of
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
    written = yield from update(ref, write.write_id, guess, decide)
    if outcome.status.is_final:
        if claim is not None:
            ctx.forget(ref, claim.fencing_token)
    elif isinstance(written, Written):
        note(ctx, ref, holding, written)
    if not successors:
        return frozenset()
    if isinstance(written, Written) and written.reply is not None:
        return frozenset(each.step_key for each, own in zip(successors, written.reply.put, strict=True) if own)
    # written before, by this call or an earlier one: the ledger tells which entries came with it
    row = written.row if isinstance(written, Written) else (written.row.record if written.row else None)
    looked = yield from Txn(compares=(), success=tuple(Get(each.dispatch) for each in successors))
    return frozenset(
        each.step_key
        for each, kv in zip(successors, looked.found, strict=True)
        if kv is not None and row is not None and decode(kv, DispatchRow).write_id == row.write_id
    )


def _outcome_change(
    ctx: Context,
    ref: StepKeys,
    view: View,
    outcome: Outcome,
    claim: StepClaim | None,
    known: Stored[Payload] | None,
    write: Write,
    dispatches: tuple[PutOnce, ...],
) -> Change:
    row = view.row
    final = outcome.status.is_final
    if outcome.output_json is None and outcome.error is None:
        payload = known.record if known else None
    else:
        payload = replace(
            known.record if known else Payload(v=VERSION), output=outcome.output_json, error=outcome.error
        )
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
            reason=outcome.error if outcome.status is StepStatus.SKIPPED else None,
            payload=payload is not None,
            write_id=write.write_id,
        )
    actions: list[Action] = [Put(ref.row, encode(new, row.kv if row else None))]
    if final:
        actions.insert(0, seal(ctx, ref, view.claim, new, write))
    if payload is not None and (known is None or payload is not known.record):
        actions.append(Put(ref.payload(new.attempt), encode(payload, known.kv if known else None)))
    actions += dispatches
    compares = [Compare(ref.row, "mod", row.kv.mod_revision if row else 0)]
    if final or claim is not None:
        compares.insert(0, Compare(ref.claim, "mod", view.claim.kv.mod_revision if view.claim else 0))
    return Change(tuple(compares), tuple(actions), new, payload)


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
    standing = payload.record if payload else Payload(v=VERSION)
    return standing.output == outcome.output_json and standing.error == outcome.error


def _payload_of(ref: StepKeys, row: Stored[StepRow] | None, holding: Holding | None) -> Program[Stored[Payload] | None]:
    if row is None or not row.record.payload:
        return None
    if (
        holding is not None
        and holding.payload is not None
        and holding.row is not None
        and holding.row.write_id == row.record.write_id
    ):
        return Stored(holding.payload, KeyValue(b"", b"", 0, 0))
    return stored((yield from read_key(ref.payload(row.record.attempt), shared=False)), Payload)


def defer(ctx: Context, claim: StepClaim, reason: str | None, dispatch: bool | datetime) -> Program[None]:
    """Set a claimed step back to Pending and give the claim up, in one transaction; with a fresh dispatch, if asked."""
    ref = ref_of(ctx, claim)
    ctx.field(reason, "reason")
    if not isinstance(dispatch, bool) and (not isinstance(dispatch, datetime) or dispatch.tzinfo is None):
        raise ConfigurationError(f"dispatch must be True, False or a datetime with a time zone, not {dispatch!r}")
    yield from carried_through(partial(_defer, ctx, ref, claim, reason, dispatch=dispatch))


def _defer(
    ctx: Context, ref: StepKeys, claim: StepClaim, reason: str | None, *, dispatch: bool | datetime
) -> Program[None]:
    write = Write.new(ctx)
    holding = ctx.holding(ref, claim.fencing_token)

    def decide(view: View) -> Program[Change | None]:
        holder_check(ctx, ref, view, claim)
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
            due = dispatch if isinstance(dispatch, datetime) else None
            entry = DispatchRow(v=VERSION, recorded_at=write.now, due=due, write_id=write.write_id)
            actions.append(Put(ref.dispatch, encode(entry)))
        return Change(tuple(compares), tuple(actions), new)
        yield  # a decision is a program, also where it asks for nothing

    guess = view_of(ref, holding) if holding is not None else None
    yield from update(ref, write.write_id, guess, decide)
    ctx.forget(ref, claim.fencing_token)
