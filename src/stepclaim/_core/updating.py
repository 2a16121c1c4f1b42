"""Changing a step as it stands: propose, and propose again to what stands instead, until it is taken or refused.

A program proposes a change to the step as it believes it stands; the transaction holds only if it does stand so, and
otherwise shows what stands. Where the store has just written the step itself, the first proposal needs no read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from stepclaim._core.claims import look, seen
from stepclaim._core.context import small
from stepclaim._core.ops import Action, Compare, Get, Program, Put, Range, Txn, TxnReply, read_prefix
from stepclaim._core.records import VERSION, ClaimRecord, Payload, StepRow, Stored, decode, encode, stored
from stepclaim.errors import BackendError, OutcomeUnknownError, ResourceExhaustedError
from stepclaim.models import ClaimState

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from stepclaim._core.context import Context, Holding, View
    from stepclaim._core.keys import StepKeys


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


def update(
    ref: StepKeys, write_id: str, guess: View | None, decide: Decision, *, begins: bool = False
) -> Program[Written | View]:
    """Propose, and propose again to what stands instead, until a change is taken, refused or not needed.

    Gives what was written, or the view in which there was nothing to do. `begins`: the change starts an attempt.
    """
    view = guess if guess is not None else (yield from look(ref))
    while True:
        change = yield from decide(view)
        if change is None:
            return view
        try:
            reply = yield from Txn(
                compares=change.compares, success=change.actions, failure=(Get(ref.claim), Get(ref.row))
            )
        except ResourceExhaustedError as full:  # the write that fills etcd's space is answered so, and carried out
            try:
                page = yield from Range(key=ref.row, range_end=b"")  # not in a transaction: etcd may refuse those now
            except BackendError as error:
                raise _unknown(ref, error.code) from error
            row = stored(page.kvs[0], StepRow) if page.kvs else None
            if row is None or row.record.write_id != write_id:
                full.definite = True
                raise
            return Written(row.record, row.kv.mod_revision, change.payload)
        if reply.succeeded:
            return Written(change.row, reply.revision, change.payload, reply)
        before, view = view, seen(reply.found)
        if view.row is not None and view.row.record.write_id == write_id:
            return Written(view.row.record, view.row.kv.mod_revision, change.payload)
        if reply.in_doubt:  # others have written since: only proposing again where ours certainly did not take place
            own = yield from _own_write(ref, write_id, before, view, begins=begins)
            if own is not None:
                return Written(own.record, own.kv.mod_revision, change.payload)


def _unknown(ref: StepKeys, code: str) -> OutcomeUnknownError:
    return OutcomeUnknownError(f"no answer came that tells whether a write on {ref} took place", code=code)


def _own_write(
    ref: StepKeys, write_id: str, before: View, view: View, *, begins: bool
) -> Program[Stored[StepRow] | None]:
    """Find a write whose reply was lost below what others wrote since: the records' ids are the evidence.

    Gives its record, or None if it certainly did not take place; raises `OutcomeUnknownError` where the evidence was
    overwritten.
    """
    rows = [] if view.row is None else [view.row]
    rows += [Stored(decode(kv, StepRow), kv) for kv in (yield from read_prefix(ref.attempts))]
    for row in rows:
        if write_id in (row.record.write_id, row.record.attempt_id):
            return row
    if begins:
        return None  # every attempt keeps the id of its beginning, and this one is not among them
    if before.row is not None and any(row.record.write_id == before.row.record.write_id for row in rows):
        return None  # the row stands, or was put among the earlier attempts, as it was before this write
    raise OutcomeUnknownError(
        f"the reply to a write on {ref} was lost, and others have written since: whether it took place can't be told"
    )


def seal(ctx: Context, ref: StepKeys, claim: Stored[ClaimRecord] | None, row: StepRow, write: Write) -> Put:
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


def note(ctx: Context, ref: StepKeys, holding: Holding | None, written: Written) -> None:
    """Keep what was written to a claimed step, so that the next write needs no read."""
    if holding is not None and ctx.holding(ref, holding.token) is holding:
        holding.row, holding.row_revision, holding.payload = written.row, written.row_revision, small(written.payload)
