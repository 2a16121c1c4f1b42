"""What may share a transaction, and what each member is told, judged by the message that etcd would get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from etcd3 import etcdrpc
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from stepclaim._core.batching import LARGEST_MEMBER, MOST_OPERATIONS, Batch, Pending, pending
from stepclaim._core.ops import Compare, Delete, Get, KeyValue, Put, PutOnce, SessionView, Txn, TxnReply
from stepclaim._etcd.queue import WaitingThread
from stepclaim._etcd.wire import batch_replies, batch_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stepclaim._core.ops import Action

thoroughly = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

ETCDS_LIMIT = 1_572_864
"""Bytes that etcd takes in one request."""


def session(name: bytes = b"/s/one", mod_revision: int = 7) -> SessionView:
    return SessionView("id", "w", name, b"{}", 5, 5, mod_revision, mod_revision)


def claim(key: bytes, fence: SessionView | None = None, value: bytes = b"mine", *more: Action) -> Txn:
    """Make the transaction that `_acquire` makes, with more to write."""
    compares = (Compare(key, "create", 0), *(Compare(each.key, "mod", 0) for each in more))
    gets = (Get(key), *(Get(each.key) for each in more))
    return Txn(compares=compares, success=(Put(key, value, 5), *more), failure=gets, fence=fence or session())


def write(key: bytes, *more: Action, value: bytes = b"result") -> Txn:
    """Make a transaction without a fence, such as a completion."""
    return Txn(compares=(Compare(key, "mod", 3),), success=(Put(key, value), *more), failure=(Get(key),))


def entry(op: Txn, *, look: bool = False) -> Pending:
    """Measure a transaction that may share."""
    made = pending(op, 0.0, Pending)
    assert made is not None
    made.look = look
    return made


def together(*entries: Pending, most: int = MOST_OPERATIONS) -> Batch:
    """Put all of them into one batch, which must take each."""
    batch = Batch(most)
    for each in entries:
        assert batch.take(each)
    return batch


# --- etcd's own rules, read off the message --------------------------------------------------------------------------


def levels(request: Any) -> int:
    """Count as etcd does: each level has the larger of its compares and its branches, and levels add up."""
    own = max(len(request.compare), len(request.success), len(request.failure))
    below = [levels(op.request_txn) for op in (*request.success, *request.failure) if op.HasField("request_txn")]
    return own + max(below, default=0)


def operations(op: Any) -> Iterator[tuple[str, bytes]]:
    """Name all keys that an operation may read or write, whichever branch is taken."""
    if op.HasField("request_put"):
        yield "written", op.request_put.key
    elif op.HasField("request_delete_range"):
        assert not op.request_delete_range.range_end
        yield "written", op.request_delete_range.key
    elif op.HasField("request_range"):
        yield "read", op.request_range.key
    else:
        for compare in op.request_txn.compare:
            assert not compare.range_end
            yield "read", compare.key
        for each in (*op.request_txn.success, *op.request_txn.failure):
            yield from operations(each)


# --- any transactions ------------------------------------------------------------------------------------------------

keys = st.sampled_from([f"/k{number}".encode() for number in range(12)])
values = st.binary(max_size=5) | st.sampled_from([b"v" * 30_000, b"v" * 99_000, b"v" * 120_000])
ranges = st.just(b"") | st.just(b"") | st.just(b"/l")
fences = st.sampled_from([session(), session(b"/s/one", 8), session(b"/s/two", 9)])
puts = st.builds(Put, keys, values)
reads = st.lists(st.builds(Get, keys), max_size=3).map(tuple)
writes = st.lists(
    puts | st.builds(PutOnce, keys, values) | st.builds(Delete, keys, ranges) | st.builds(Get, keys), max_size=4
).map(tuple)
conditions = st.lists(st.builds(Compare, keys, st.just("mod"), st.integers(0, 9), ranges), max_size=4).map(tuple)
many = st.integers(0, 70).map(lambda size: tuple(PutOnce(f"/d{number}".encode(), b"e") for number in range(size)))
claims = st.builds(claim, keys, fences, values) | st.builds(lambda key, fence, put: claim(key, fence, b"", put), keys,
                                                            fences, puts)  # fmt: skip
transactions = (
    st.builds(Txn, compares=conditions, success=writes, failure=reads)
    | st.builds(lambda key, more: write(key, *more), keys, many)
    | claims
    | claims
)


@thoroughly
@given(
    st.lists(st.tuples(transactions, st.booleans()), min_size=1, max_size=40),
    st.sampled_from([2, 3, 8, 16, 60, MOST_OPERATIONS]),
)
def test_whatever_comes_a_batch_is_one_that_etcd_takes_and_in_which_none_meets_another(
    parts: list[tuple[Txn, bool]], most: int
) -> None:
    batch = Batch(most)
    taken: list[Pending] = []
    refused: list[Pending] = []
    for op, looks in parts:
        each = pending(op, 0.0, Pending)
        if each is None:
            continue
        each.look = looks and op.fence is not None
        (taken if batch.take(each) else refused).append(each)
    event(f"{min(len(taken), 10)} taken")

    message = etcdrpc.TxnRequest.FromString(batch_request(batch))
    assert levels(message) <= most
    assert message.ByteSize() < ETCDS_LIMIT
    seen: list[tuple[set[bytes], set[bytes]]] = []
    for op_sent in message.success:
        named = list(operations(op_sent))
        written = {key for how, key in named if how == "written"}
        touched = {key for _, key in named}
        for others_written, others_touched in seen:
            assert written.isdisjoint(others_touched)
            assert touched.isdisjoint(others_written)
        seen.append((written, touched))
    # everybody has exactly one place, and a follower's is behind the same claim
    assert sorted(map(id, batch.everyone)) == sorted(map(id, taken))
    for member in batch.members:
        for follower in member.followers or ():
            assert follower.claim == member.claim
    # one fence for all that have one
    assert {each.op.fence for each in batch.members if each.op.fence and not each.look} <= {batch.fence}
    for each in refused:
        alone = etcdrpc.TxnRequest.FromString(batch_request(_alone(each)))
        assert levels(alone) > most or Batch(most).take(each)


def _alone(each: Pending) -> Batch:
    batch = Batch()
    batch.members.append(each)
    return batch


@thoroughly
@given(st.lists(transactions, min_size=2, max_size=40), st.sampled_from([8, 16, 60, MOST_OPERATIONS]))
def test_what_is_asked_as_one_is_the_same_conditions_and_writes_in_one_level(ops: list[Txn], most: int) -> None:
    batch = Batch(most)
    for op in ops:
        each = pending(op, 0.0, Pending)
        if each is not None:
            batch.take(each)
    batch.as_one()
    event(f"as one: {batch.whole}")
    apart = etcdrpc.TxnRequest.FromString(batch_request(batch))
    if not batch.whole:
        assert len(apart.success) == len(batch.members), "a nested one each"
        return
    assert levels(apart) <= most
    assert not [op for op in apart.success if op.HasField("request_txn") or op.HasField("request_range")]
    batch.whole = False
    nested = etcdrpc.TxnRequest.FromString(batch_request(batch))
    own = [op.request_txn for op in nested.success]
    assert list(apart.success) == [op for member in own for op in member.success]
    assert len(apart.compare) == len(nested.compare) + sum(len(member.compare) for member in own)
    for compare in (*nested.compare, *(each for member in own for each in member.compare)):
        assert compare in apart.compare
    assert apart.failure == nested.failure


# --- who goes alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        Txn(compares=(), success=(Delete(b"/a", b"/b"),)),
        Txn(compares=(Compare(b"/a", "mod", 1, range_end=b"/b"),), success=(Put(b"/c", b""),)),
        Txn(compares=(Compare(b"/a", "mod", 1),), success=(Put(b"/c", b""),), failure=(Put(b"/c", b"no"),)),
        Txn(compares=(), success=tuple(Put(f"/{number}".encode(), b"") for number in range(100))),
        write(b"/a", value=b"v" * (LARGEST_MEMBER + 1)),
        write(b"/a", PutOnce(b"/b", b"v" * (LARGEST_MEMBER + 1))),
        write(b"/a", *(Put(f"/{number}".encode(), b"v" * (LARGEST_MEMBER // 4)) for number in range(5))),
    ],
    ids=["deletes a range", "compares a range", "writes if it fails", "long", "large", "large ledger", "large in sum"],
)
def test_what_goes_alone(op: Txn) -> None:
    assert pending(op, 0.0, Pending) is None


# --- what must wait for the next -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (write(b"/a"), write(b"/a")),
        (write(b"/a"), Txn(compares=(Compare(b"/a", "mod", 1),), success=(Put(b"/b", b""),))),
        (Txn(compares=(Compare(b"/a", "mod", 1),), success=(Put(b"/b", b""),)), write(b"/a")),
        (write(b"/a"), Txn(compares=(Compare(b"/a", "mod", 1),), success=(Delete(b"/c"),))),
        (Txn(compares=(), success=(Delete(b"/a"),)), claim(b"/a")),
        (claim(b"/a"), Txn(compares=(), success=(Delete(b"/a"),))),
        (write(b"/a", PutOnce(b"/b", b"")), write(b"/b")),
        (write(b"/b"), write(b"/a", PutOnce(b"/b", b""))),
        (write(b"/b", PutOnce(b"/d", b"")), write(b"/a", PutOnce(b"/d", b""))),
        (write(b"/a"), Txn(compares=(), success=(Put(b"/b", b""), Get(b"/a")))),
        (Txn(compares=(), success=(Put(b"/b", b""), Get(b"/a"))), write(b"/a")),
        (write(b"/a"), Txn(compares=(Compare(b"/b", "mod", 1),), success=(Put(b"/b", b""),), failure=(Get(b"/a"),))),
        (Txn(compares=(Compare(b"/b", "mod", 1),), success=(Put(b"/b", b""),), failure=(Get(b"/a"),)), write(b"/a")),
        (
            Txn(compares=(Compare(b"/run", "mod", 1),), success=(Put(b"/a", b""),)),
            Txn(compares=(Compare(b"/run", "mod", 1),), success=(Put(b"/b", b""),)),
        ),
        (claim(b"/a", session()), claim(b"/b", session(b"/s/one", 8))),
        (claim(b"/a", session()), claim(b"/b", session(b"/s/two", 9))),
    ],
    ids=[
        "writes what is written",
        "compares what is written",
        "writes what is compared",
        "deletes beside what is written",
        "claims what is released",
        "releases what is claimed",
        "writes an entry of the ledger",
        "enters what is written into the ledger",
        "the same entry of the ledger",
        "reads what is written",
        "writes what is read",
        "reads what is written if it fails",
        "writes what is read by one that fails",
        "looks at what is looked at, which nothing needs",
        "another fence",
        "another session's fence",
    ],
)
def test_what_waits_for_the_next(first: Txn, second: Txn) -> None:
    batch = together(entry(first))
    later = entry(second)
    assert not batch.take(later)
    assert [each.op for each in batch.everyone] == [first]
    assert Batch().take(later)


def test_what_goes_together() -> None:
    """Different keys, and any kinds beside each other."""
    batch = together(
        entry(claim(b"/a")),
        entry(claim(b"/b", None, b"other", Put(b"/b/row", b"{}"))),
        entry(write(b"/c", PutOnce(b"/d", b""))),
        entry(Txn(compares=(Compare(b"/run", "mod", 1),), success=(Put(b"/e", b""),))),
        entry(Txn(compares=(Compare(b"/claim", "mod", 1),), success=(Delete(b"/claim"),))),
        entry(claim(b"/g"), look=True),
    )
    assert len(batch.members) == 6
    assert batch.fence == session()


def test_a_step_that_is_looked_at_is_not_written_beside() -> None:
    assert not together(entry(claim(b"/a"), look=True)).take(entry(Txn(compares=(), success=(Delete(b"/a"),))))
    assert not together(entry(Txn(compares=(), success=(Delete(b"/a"),)))).take(entry(claim(b"/a"), look=True))


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "fit", "make"),
    [
        (1, 127, lambda number: claim(f"/{number}".encode())),
        (4, 124, lambda n: claim(f"/{n}".encode(), None, b"", *(Put(f"/{n}/{at}".encode(), b"") for at in range(3)))),
        # the entry of the ledger is a transaction of its own in a member's
        (3, 125, lambda n: write(f"/{n}".encode(), PutOnce(f"/d{n}".encode(), b""))),
        (64, 64, lambda n: write(f"/{n}".encode(), *(Put(f"/{n}/{at}".encode(), b"") for at in range(63)))),
    ],
)
def test_as_many_as_etcd_takes_and_no_more(weight: int, fit: int, make: Any) -> None:
    batch = Batch()
    for number in range(fit):
        assert batch.room
        assert batch.take(entry(make(number)))
    message = etcdrpc.TxnRequest.FromString(batch_request(batch))
    assert levels(message) == len(batch.members) + weight == MOST_OPERATIONS
    assert not batch.room
    assert not batch.take(entry(make(fit)))
    assert not batch.take(entry(claim(b"/looked at"), look=True))
    batch.take(entry(make(0)))
    assert levels(etcdrpc.TxnRequest.FromString(batch_request(batch))) == MOST_OPERATIONS


def test_the_heaviest_counts_whenever_it_came() -> None:
    heavy = write(b"/heavy", *(Put(f"/heavy/{at}".encode(), b"") for at in range(62)))
    light = [write(f"/{number}".encode()) for number in range(64)]
    batch = together(*map(entry, light))
    assert batch.take(entry(heavy)), "64 and one, and 63 below"
    assert not batch.take(entry(write(b"/one more")))
    late = together(*map(entry, light), entry(write(b"/one more")))
    assert not late.take(entry(heavy)), "66 and 63 below"


def test_claims_that_look_count_too() -> None:
    batch = Batch(16)
    taken = [batch.take(entry(claim(f"/{number}".encode()), look=True)) for number in range(20)]
    assert batch.take(entry(write(b"/w"))) is False
    assert levels(etcdrpc.TxnRequest.FromString(batch_request(batch))) <= 16
    assert sum(taken) == len(batch.members) >= 14


def test_bytes() -> None:
    large = [write(f"/{number}".encode(), value=b"v" * 90_000) for number in range(20)]
    batch = Batch()
    taken = [batch.take(entry(op)) for op in large]
    assert 8 <= sum(taken) < 17
    assert batch.take(entry(write(b"/small"))), "who is small still has room"
    assert len(batch_request(batch)) < ETCDS_LIMIT
    long_keys = [f"/{number}/".encode() + b"k" * 10_000 for number in range(100)]
    batch = Batch()
    taken = [batch.take(entry(write(key))) for key in long_keys]
    assert 20 <= sum(taken) < 100
    assert len(batch_request(batch)) < ETCDS_LIMIT


# --- what each is told -----------------------------------------------------------------------------------------------


PUT = etcdrpc.ResponseOp(response_put=etcdrpc.PutResponse())


def found(*kvs: KeyValue) -> Any:
    """Answer a read."""
    answer = etcdrpc.RangeResponse(count=len(kvs))
    for kv in kvs:
        answer.kvs.add(
            key=kv.key, value=kv.value, create_revision=kv.create_revision, mod_revision=kv.mod_revision, lease=kv.lease
        )
    return etcdrpc.ResponseOp(response_range=answer)


def nested(*responses: Any, succeeded: bool = True) -> Any:
    """Answer a transaction in a transaction."""
    return etcdrpc.ResponseOp(response_txn=etcdrpc.TxnResponse(succeeded=succeeded, responses=responses))


def response(*responses: Any, succeeded: bool = True) -> Any:
    """Answer a transaction."""
    header = etcdrpc.ResponseHeader(revision=50)
    return etcdrpc.TxnResponse(header=header, succeeded=succeeded, responses=responses)


def test_the_same_claims_become_one_member_and_the_others_lose_to_it() -> None:
    winner = entry(claim(b"/a", None, b"first"))
    others = [entry(claim(b"/a", None, b"second")), entry(claim(b"/a", None, b"third", Put(b"/a/row", b"")))]
    batch = together(winner, entry(write(b"/b")), *others)
    assert [each.op for each in batch.members] == [winner.op, write(b"/b")]
    done, again = batch.settle([TxnReply(True, 50), TxnReply(True, 50)])
    assert (len(done), again) == (4, [])
    assert winner.reply == TxnReply(True, 50)
    for other in others:
        assert other.reply is not None
        assert (other.reply.succeeded, other.reply.revision, other.reply.fence_moved) == (False, 50, False)
        assert other.reply.found[0] == KeyValue(b"/a", b"first", 50, 50, 5)


def test_where_the_claim_stands_already_all_are_told_of_it() -> None:
    standing = KeyValue(b"/a", b"theirs", 30, 31, 9)
    first, second = entry(claim(b"/a", None, b"", Put(b"/row", b""))), entry(claim(b"/a"))
    batch = together(first, second)
    row = KeyValue(b"/row", b"", 30, 30)
    done, again = batch.settle([TxnReply(False, 50, (standing, row))])
    assert (done, again) == ([first, second], [])
    assert first.reply == TxnReply(False, 50, (standing, row))
    assert second.reply is not None
    assert (second.reply.succeeded, second.reply.found[0], second.reply.revision) == (False, standing, 50)


def test_who_followed_one_that_was_refused_for_another_reason_tries_again() -> None:
    """The step is free, but the first to claim it stood on an old row: that says nothing of the others."""
    first, second = entry(claim(b"/a", None, b"", Put(b"/row", b""))), entry(claim(b"/a"))
    batch = together(first, second)
    refused = TxnReply(False, 50, (None, KeyValue(b"/row", b"", 30, 30)))
    done, again = batch.settle([refused])
    assert (done, again) == ([first], [second])
    assert (first.reply, second.reply) == (refused, None)
    assert first.followers is None


def test_a_moved_fence_is_told_to_those_who_have_it_and_the_others_wait_again() -> None:
    fenced, follower, plain = entry(claim(b"/a")), entry(claim(b"/a")), entry(write(b"/b"))
    looking = entry(claim(b"/c"), look=True)
    batch = together(plain, fenced, follower, looking)
    barrier = KeyValue(b"/s/one", b"{}", 7, 40)
    done, again = batch.settle(batch_replies(batch, response(found(barrier), succeeded=False)))
    assert set(map(id, done)) >= {id(fenced), id(follower)}
    assert set(map(id, again)) >= {id(plain)}
    for each in (fenced, follower):
        assert each.reply is not None
        assert (each.reply.succeeded, each.reply.fence_moved, each.reply.found) == (False, True, ())
        assert each.reply.barrier == (barrier,)
    assert plain.reply is None
    assert looking.reply is None or looking.reply.fence_moved, "it has looked at nothing"


def whole(*entries: Pending) -> Batch:
    """Put all of them into a batch that is asked as one."""
    batch = together(*entries)
    batch.as_one()
    assert batch.whole
    return batch


def test_all_who_are_asked_as_one_succeed_together() -> None:
    winner, other, follower = entry(claim(b"/a", None, b"first")), entry(write(b"/b")), entry(claim(b"/a"))
    batch = whole(winner, other, follower)
    done, again = batch.settle(batch_replies(batch, response(PUT, PUT)))
    assert (set(map(id, done)), again) == ({id(winner), id(other), id(follower)}, [])
    assert winner.reply == other.reply == TxnReply(True, 50)
    assert follower.reply is not None
    assert (follower.reply.succeeded, follower.reply.found[0].value) == (False, b"first")
    assert not batch.clean, "one was refused"


def test_where_what_was_asked_as_one_did_nothing_all_wait_again() -> None:
    """Somebody's condition did not hold, nobody knows whose. The fence stands: no claim is told that it moved."""
    entries = [entry(claim(b"/a")), entry(write(b"/b")), entry(claim(b"/a"))]
    batch = whole(*entries)
    barrier = KeyValue(b"/s/one", b"{}", 7, 7)
    done, again = batch.settle(batch_replies(batch, response(found(barrier), succeeded=False)))
    assert (done, set(map(id, again))) == ([], set(map(id, entries)))
    assert [each.reply for each in entries] == [None] * 3
    assert not batch.clean
    without_fence = whole(entry(write(b"/b")), entry(write(b"/c")))
    done, again = without_fence.settle(batch_replies(without_fence, response(succeeded=False)))
    assert (done, len(again)) == ([], 2)


@pytest.mark.parametrize("barrier", [None, KeyValue(b"/s/one", b"{}", 7, 40)])
def test_where_the_fence_of_what_was_asked_as_one_moved_its_claims_are_told(barrier: KeyValue | None) -> None:
    fenced, plain = entry(claim(b"/a")), entry(write(b"/b"))
    batch = whole(fenced, plain)
    answer = response(found(*([barrier] if barrier else [])), succeeded=False)
    done, again = batch.settle(batch_replies(batch, answer))
    assert (done, again) == ([fenced], [plain])
    assert fenced.reply == TxnReply(False, 50, fence_moved=True, barrier=(barrier,))


@pytest.mark.parametrize(
    "other",
    [
        entry(claim(b"/a"), look=True),
        entry(write(b"/a", PutOnce(b"/d", b""))),
        entry(Txn(compares=(), success=(Put(b"/a", b""), Get(b"/b")))),
    ],
    ids=["looks", "puts once", "reads"],
)
def test_who_has_to_read_its_answer_is_asked_apart(other: Pending) -> None:
    batch = together(entry(claim(b"/x")), entry(write(b"/y")), other)
    batch.as_one()
    assert not batch.whole


def test_as_many_are_asked_as_one_as_etcd_takes_in_one_level() -> None:
    def made(number: int) -> Pending:
        return entry(claim(f"/{number}".encode(), None, b"", Put(f"/{number}/row".encode(), b"")))

    most = whole(*map(made, range(63)))
    message = etcdrpc.TxnRequest.FromString(batch_request(most))
    assert levels(message) == 2 * 63 + 1, "the fence's compare is one more"
    more = together(*map(made, range(64)))
    more.as_one()
    assert not more.whole
    one = together(made(0))
    one.as_one()
    assert not one.whole, "it goes as it would go without all this"


def test_nobody_is_told_of_the_fence_of_another_session() -> None:
    """A claim behind the new session's fence that is told that the old one is gone would take its own for gone."""
    for look in (False, True):
        old, new = session(b"/s/old", 7), session(b"/s/new", 20)
        first, second = entry(claim(b"/a", old), look=look), entry(claim(b"/a", new))
        other = entry(claim(b"/b", old))
        batch = together(other, first)
        taken = batch.take(second)
        batch.settle(batch_replies(batch, response(found(), succeeded=False)))
        assert not taken or second.reply is None or not second.reply.fence_moved


def test_who_looks_is_told_of_the_claim_that_it_found() -> None:
    standing = KeyValue(b"/a", b"theirs", 30, 31, 9)
    looking = entry(claim(b"/a", None, b"", Put(b"/row", b"")), look=True)
    follower = entry(claim(b"/a"))
    batch = together(looking, follower)
    done, again = batch.settle([TxnReply(False, 50, (standing,))])
    assert (done, again) == ([looking, follower], [])
    for each in done:
        assert each.reply is not None
        assert (each.reply.succeeded, each.reply.found[0], each.reply.revision) == (False, standing, 50)


def test_who_looks_and_finds_nothing_claims_next() -> None:
    looking, follower = entry(claim(b"/a"), look=True), entry(claim(b"/a"))
    batch = together(looking, follower)
    done, again = batch.settle([TxnReply(False, 50, (None,))])
    assert (done, again) == ([], [looking, follower])
    assert (looking.reply, follower.reply) == (None, None)
    assert looking.looked, "it does not look for ever"
    assert looking.followers is None


def test_members_succeed_and_fail_by_themselves() -> None:
    """Each reads its own part of etcd's answer."""
    standing = KeyValue(b"/b", b"theirs", 30, 30, 9)
    batch = together(
        entry(claim(b"/a")),
        entry(claim(b"/b")),
        entry(claim(b"/b2"), look=True),
        entry(write(b"/d", PutOnce(b"/e", b""), PutOnce(b"/f", b""))),
        entry(write(b"/g")),
        entry(Txn(compares=(), success=(Put(b"/h", b""), Get(b"/i")))),
    )
    answer = response(
        nested(PUT),
        nested(found(standing), succeeded=False),
        found(standing),
        nested(PUT, nested(PUT), nested(succeeded=False)),
        nested(found(), succeeded=False),
        nested(PUT, found(standing)),
    )
    done, again = batch.settle(batch_replies(batch, answer))
    assert (done, again) == (batch.members, [])
    assert [each.reply for each in done] == [
        TxnReply(True, 50),
        TxnReply(False, 50, (standing,)),
        TxnReply(False, 50, (standing,)),
        TxnReply(True, 50, put=(True, False)),
        TxnReply(False, 50, (None,)),
        TxnReply(True, 50, (standing,)),
    ]


def test_who_is_to_wait_again_is_decided_for_once() -> None:
    waiting = pending(write(b"/a"), 0.0, WaitingThread)
    assert waiting is not None
    assert waiting.take()
    assert not waiting.take()
    waiting.reopen()
    assert waiting.take()
    assert not waiting.take()
