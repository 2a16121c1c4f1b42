"""Deliberate bugs, for the test that the judge catches them: switched on in a worker by STEPCLAIM_FAULTS_BUG."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from msgspec import json as msgspec_json
from msgspec.structs import replace

from stepclaim._core import claims, finishing
from stepclaim._core.context import View
from stepclaim._core.ops import Compare, Fence, Get, KeyValue, Program, Put, SessionView, Txn, TxnReply
from stepclaim._core.records import ClaimRecord, Stored, encode
from stepclaim.models import ClaimState, StepClaim

if TYPE_CHECKING:
    from stepclaim._core.keys import StepKeys

BUGS = ("unguarded-completion", "fresh-attempt-id")


def switch_on(bug: str) -> None:
    """Break the store in this process."""
    if bug == "unguarded-completion":
        _unguard()
    elif bug == "fresh-attempt-id":
        _forget_attempts()
    elif bug:
        raise ValueError(f"there is no bug {bug!r}: choose one of {', '.join(BUGS)}")


def _unguard() -> None:
    """Let a completion be written whoever holds the step."""
    module: Any = finishing
    outcome_change = module._outcome_change

    def unguarded(*args: Any) -> Any:
        return replace(outcome_change(*args), compares=())

    def anybody(*args: Any) -> Stored[ClaimRecord]:
        (view,) = (each for each in args if isinstance(each, View))
        if view.claim is not None:
            return view.claim
        (claim,) = (each for each in args if isinstance(each, StepClaim))
        record = ClaimRecord(
            v=1, state=ClaimState.HELD, owner=claim.owner, attempt_id="gone", claimed_at=dt.datetime.now(dt.UTC)
        )
        return Stored(record, KeyValue(b"", b"", 0, 0))

    module._outcome_change = unguarded
    module.holder_check = anybody


def _forget_attempts() -> None:
    """Send a claim whose reply was lost again under another attempt id, so that its own win looks like another's."""

    def settle(ref: StepKeys, session: SessionView, value: bytes, gets: tuple[Get, ...]) -> Program[TxnReply]:
        record = msgspec_json.decode(value, type=ClaimRecord)
        fresh = encode(replace(record, attempt_id=f"{record.attempt_id}-again"))
        yield from Fence(session=session)
        reply = yield from Txn(
            compares=(Compare(ref.claim, "create", 0),),
            success=(Put(ref.claim, fresh, session.claim_lease),),
            failure=gets,
        )
        if reply.succeeded:
            own = KeyValue(ref.claim, value, reply.revision, reply.revision, session.claim_lease)
            return TxnReply(succeeded=True, revision=reply.revision, found=(own, *(None for _ in gets[1:])))
        (claim, *rest) = reply.found
        if claim is not None and claim.value == value:
            claim = replace(claim, value=value + b" ")  # not the id that is looked for
        return replace(reply, found=(claim, *rest))

    claims._settle = settle
