"""Who runs a step: where a claim is decided, settled, undone, released and looked up.

A step is claimable if and only if its claim key does not exist. One transaction compares that key's create revision
with 0 and writes it; the create revision is the fencing token. The same transaction compares the session key's mod
revision: rewriting that key (`Fence`) makes every claim sent before impossible, so that a claim whose reply was lost
can be settled by one read, and no late commit can leave a claim that nobody knows of.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct

from stepclaim._core.context import Holding, View, small
from stepclaim._core.keys import StepKeys, last_segment, run_name
from stepclaim._core.ops import (
    OPEN_SESSION,
    Abandoned,
    Answered,
    Compare,
    Delete,
    Fence,
    Get,
    InDoubt,
    KeyValue,
    Later,
    Program,
    Put,
    SessionView,
    Txn,
    TxnReply,
    UntilChanged,
    read_key,
    read_prefix,
)
from stepclaim._core.records import VERSION, ClaimRecord, StepRow, Stored, decode, encode_new, stored
from stepclaim._core.starting import NO_BASE, Start, base_of
from stepclaim._core.together import together
from stepclaim.errors import (
    BackendError,
    ClaimLostError,
    ClaimTimeoutError,
    ConfigurationError,
    DeadlineExceededError,
    OutcomeUnknownError,
)
from stepclaim.models import ClaimInfo, ClaimState, StepClaim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stepclaim._core.context import Context
    from stepclaim.abc import RunId


R = TypeVar("R")


def try_claim(ctx: Context, run_id: RunId, step_key: str) -> Program[bool]:
    """Claim, and only that."""
    got = yield from _acquire(ctx, ctx.keys.step(run_id, step_key), None)
    return isinstance(got, Holding)


def claim_step(
    ctx: Context, run_id: RunId, step_key: str, step_type: str, input_json: str | None, job_id: str | None
) -> Program[StepClaim | None]:
    """Claim and start: claim, row and attempt in one transaction."""
    ref = ctx.keys.step(run_id, step_key)
    return _begin(ctx, ref, Start.checked(ctx, step_type, input_json, job_id))


def _begin(ctx: Context, ref: StepKeys, start: Start) -> Program[StepClaim | None]:
    got = yield from _acquire(ctx, ref, start)
    return got.claim(ctx, ref) if isinstance(got, Holding) else None


def wait_for_step(
    ctx: Context, run_id: RunId, step_key: str, step_type: str, input_json: str | None, job_id: str | None
) -> Program[StepClaim]:
    """Claim and start as soon as whoever has the step gives it up. The caller's time-out is the program's deadline."""
    ref = ctx.keys.step(run_id, step_key)
    start = Start.checked(ctx, step_type, input_json, job_id)
    try:
        while True:
            got = yield from _acquire(ctx, ref, start)
            if isinstance(got, Holding):
                return got.claim(ctx, ref)
            yield from UntilChanged(key=ref.claim, revision=got.revision)
    except DeadlineExceededError as late:
        raise ClaimTimeoutError(f"{ref} was not given up in time: wait longer, or look at who has it") from late


def claim_steps(ctx: Context, run_id: RunId, step_keys: Iterable[str]) -> Program[dict[str, StepClaim]]:
    """Claim and start several steps, each by itself, in as few transactions as they fit into."""
    refs = [ctx.keys.step(run_id, key) for key in dict.fromkeys(_listed(step_keys))]
    start = Start.checked(ctx, "", None, None)
    won, errors = yield from together(_begin(ctx, ref, start) for ref in refs)
    for error in errors:  # nobody is told of the claims that were won: they must not stay
        for claim in won:
            if claim is not None:
                yield from Later(partial(_release, ctx, claim))
        raise error
    return {claim.step_key: claim for claim in won if claim is not None}


def _listed(step_keys: Iterable[str]) -> Iterable[str]:
    if isinstance(step_keys, str):
        raise ConfigurationError(f"step_keys must be several step keys, not one text: [{step_keys!r}]")
    return step_keys


class Taken(Struct, frozen=True):
    """A claim that somebody else has, as of a revision."""

    revision: int


def _acquire(ctx: Context, ref: StepKeys, start: Start | None) -> Program[Holding | Taken]:
    attempt_id = ctx.new_id()
    free = Compare(ref.claim, "create", 0)
    gets = (Get(ref.claim),) if start is None else (Get(ref.claim), Get(ref.row))
    base = NO_BASE
    while True:
        session: SessionView = ctx.session() or (yield OPEN_SESSION)
        now = ctx.now()
        record = ClaimRecord(
            v=VERSION,
            state=ClaimState.HELD,
            owner=session.owner,
            session=session.session_id,
            attempt_id=attempt_id,
            attempt=0 if start is None else base.next_attempt,
            claimed_at=now,
        )
        value = encode_new(record)
        claim = Put(ref.claim, value, session.claim_lease)
        begun = None if start is None else start.begin(ref, base, owner=session.owner, write_id=attempt_id, now=now)
        try:
            reply: TxnReply = yield Txn(
                compares=(free,) if begun is None else (free, *begun.compares),
                success=(claim,) if begun is None else (claim, *begun.puts),
                failure=gets,
                fence=session,
            )
            token = reply.revision if reply.succeeded else 0
        except InDoubt:
            reply = yield from _settle(ref, session, value, gets)
            found = reply.found[0]
            token = found.create_revision if found is not None and found.value == value else 0
        except Answered as answered:
            token = yield from _granted_all_the_same(ref, value, answered)
        except Abandoned:
            yield from Later(partial(_undo, ref, session, value), undo=True)
            raise
        if token:
            holding = Holding(token, session.claim_lease, record)
            if begun is not None:
                holding.row, holding.row_revision, holding.payload = begun.row, token, small(begun.payload)
            ctx.remember(ref, holding)
            return holding
        if reply.fence_moved:
            continue
        if reply.found[0] is not None:
            decode(reply.found[0], ClaimRecord)  # a claim that can't be read is told, not taken for a lost race
            return Taken(reply.revision)
        if start is not None:
            base = yield from base_of(ref, stored(reply.found[1], StepRow))


def _granted_all_the_same(ref: StepKeys, value: bytes, answered: Answered) -> Program[int]:
    """Look whether a claim was granted that etcd answered with an error: the one that fills its space is.

    Gives its token, or raises that error.
    """
    try:
        found = yield from read_key(ref.claim)
    except (BackendError, Abandoned):
        yield from Later(partial(_take_back, ref, value), undo=True)
        raise
    if found is None or found.value != value:
        answered.error.definite = True
        raise answered.error
    return found.create_revision


def _settle(ref: StepKeys, session: SessionView, value: bytes, gets: tuple[Get, ...]) -> Program[TxnReply]:
    """Make a late commit impossible, then read what stands; undo later what can't be settled now."""
    try:
        return (yield from Fence(session=session, gets=gets))
    except BackendError as error:
        yield from Later(partial(_undo, ref, session, value), undo=True)
        raise OutcomeUnknownError(
            f"no answer came to the claim of {ref} before the deadline; should it have been granted, it is being "
            "undone: claim again",
            code=error.code,
        ) from error
    except Abandoned:
        yield from Later(partial(_undo, ref, session, value), undo=True)
        raise


def _undo(ref: StepKeys, session: SessionView, value: bytes) -> Program[None]:
    """Take back a claim that nobody was told of, if it was granted at all."""
    yield from Fence(session=session)
    yield from _take_back(ref, value)


def _take_back(ref: StepKeys, value: bytes) -> Program[None]:
    yield from Txn(compares=(Compare(ref.claim, "value", value),), success=(Delete(ref.claim),))


def release_claim(ctx: Context, claim: StepClaim) -> Program[bool]:
    """Remove the claim if it is still the holder's."""
    return (yield from carried_through(partial(_release, ctx, claim)))


def carried_through(make: Callable[[], Program[R]]) -> Program[R]:
    """Run a program; should its caller go away meanwhile, carry it through in the background: nothing stays held."""
    try:
        return (yield from make())
    except Abandoned:
        yield from Later(make)
        raise


def _release(ctx: Context, claim: StepClaim) -> Program[bool]:
    ref = ref_of(ctx, claim)
    reply = yield from Txn(compares=(still_held(ref, claim.fencing_token),), success=(Delete(ref.claim),))
    if not reply.succeeded and reply.in_doubt:
        raise OutcomeUnknownError(
            f"the claim of {ref} is gone; whether this call removed it or it had ended before can't be told any more"
        )
    ctx.forget(ref, claim.fencing_token)
    return reply.succeeded


def release_step(ctx: Context, run_id: RunId, step_key: str) -> Program[None]:
    """Remove whatever claim stands; never one that was made after this call looked."""
    yield from carried_through(partial(_release_whatever, ctx, ctx.keys.step(run_id, step_key)))


def _release_whatever(ctx: Context, ref: StepKeys) -> Program[None]:
    holding = ctx.holding(ref)
    seen = yield from read_key(ref.claim)
    while seen is not None:
        reply = yield from Txn(
            compares=(Compare(ref.claim, "mod", seen.mod_revision),),
            success=(Delete(ref.claim),),
            failure=(Get(ref.claim),),
        )
        if reply.succeeded:
            break
        now = reply.found[0]
        seen = now if now is not None and now.create_revision == seen.create_revision else None
    if holding is not None:
        ctx.forget(ref, holding.token)


def holds(ctx: Context, claim: StepClaim) -> Program[bool]:
    """Ask etcd, linearizable, whether the claim is still held."""
    ref = ref_of(ctx, claim)
    found = yield from read_key(ref.claim)
    return found is not None and found.mod_revision == claim.fencing_token


def get_claim(ctx: Context, run_id: RunId, step_key: str) -> Program[ClaimInfo | None]:
    """Tell who holds a step, or what it was sealed with."""
    ref = ctx.keys.step(run_id, step_key)
    found = yield from read_key(ref.claim)
    return None if found is None else claim_info(ref.run_id, found)


def list_claims(ctx: Context, run_id: RunId | None) -> Program[list[ClaimInfo]]:
    """Tell all claims of a run, held and sealed; or of all runs, at the cost of a look at every key."""
    if run_id is not None:
        run = ctx.keys.run(run_id)
        kvs = yield from read_prefix(run.below("claims"))
        return [claim_info(run.run_id, kv) for kv in kvs]
    told: list[ClaimInfo] = []
    names = {kv.key.removeprefix(ctx.keys.runs).split(b"/")[0] for kv in (yield from _claim_keys(ctx))}
    for name in sorted(names):
        told += yield from list_claims(ctx, last_segment(name))
    return told


def _claim_keys(ctx: Context) -> Program[list[KeyValue]]:
    kvs = yield from read_prefix(ctx.keys.runs, keys_only=True)
    return [kv for kv in kvs if kv.key.removeprefix(ctx.keys.runs).partition(b"/")[2].startswith(b"claims/")]


def claimed_step_keys(ctx: Context, run_id: RunId) -> Program[frozenset[str]]:
    """Name the steps that are claimed and not yet completed."""
    kvs = yield from read_prefix(ctx.keys.run(run_id).below("claims"), shared=True)
    return frozenset(last_segment(kv.key) for kv in kvs if decode(kv, ClaimRecord).state is ClaimState.HELD)


def look(ref: StepKeys) -> Program[View]:
    """Read a step's claim and row as of one revision."""
    reply = yield from Txn(compares=(), success=(Get(ref.claim), Get(ref.row)))
    return seen(reply.found)


def seen(found: tuple[KeyValue | None, ...]) -> View:
    """Read the claim and the row that a transaction found."""
    claim, row = found
    return View(stored(claim, ClaimRecord), stored(row, StepRow))


def still_held(ref: StepKeys, token: int) -> Compare:
    """Compare that the claim is the one with this token and was not sealed: a held claim is written only once."""
    return Compare(ref.claim, "mod", token)


def holder_check(ctx: Context, ref: StepKeys, view: View, claim: StepClaim) -> Stored[ClaimRecord]:
    """Give the claim's record if the claim still stands and is held, else tell that it was lost."""
    standing = view.claim
    if standing is not None and standing.kv.create_revision == claim.fencing_token:
        if standing.record.state is ClaimState.HELD:
            return standing
        why = f"it was sealed as {standing.record.status}"
    elif standing is not None:
        why = f"{standing.record.owner} has it now, with token {standing.kv.create_revision}"
    else:
        why = "its lease ended, or somebody released it"
    ctx.lost(ref, claim.fencing_token)
    raise ClaimLostError(
        f"{claim.owner} no longer holds {ref} (token {claim.fencing_token}): {why}; drop this result", claim
    )


def ref_of(ctx: Context, claim: StepClaim) -> StepKeys:
    """Name the keys of a claim's step."""
    if not isinstance(claim, StepClaim):
        raise ConfigurationError(f"claim must be a StepClaim, not {type(claim).__name__}: {claim!r}")
    return ctx.keys.step(claim.run_id, claim.step_key)


def claim_info(run_id: str, kv: KeyValue) -> ClaimInfo:
    """Tell a claim as a public value."""
    record = decode(kv, ClaimRecord)
    return ClaimInfo(
        run_id=run_name(run_id),
        step_key=last_segment(kv.key),
        state=record.state,
        owner=record.owner,
        session=record.session,
        fencing_token=kv.create_revision,
        attempt=record.attempt,
        lease_id=kv.lease,
        claimed_at=record.claimed_at,
        status=record.status,
        sealed_at=record.sealed_at,
    )
