"""Transactions written as bytes: parsed by etcd3's own classes they are what those classes would have said."""

from typing import Any

from etcd3 import etcdrpc
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from stepclaim._core.batching import Batch, Pending
from stepclaim._core.ops import Action, Compare, Delete, Fence, Get, Put, PutOnce, Range, SessionView, Txn
from stepclaim._etcd.encoding import encode_op, encode_txn
from stepclaim._etcd.wire import batch_request, fence_request, txn_request

thoroughly = settings(
    max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

MOST = 2**63 - 1
EDGES = sorted({edge for bits in (7, 12, 14, 21, 28, 35, 42, 49, 56, 63) for edge in (2**bits - 1, 2**bits)} - {2**63})
"""Where a number needs one byte more, and where the table of the usual ones ends."""

numbers = st.integers(0, 300) | st.sampled_from(EDGES) | st.integers(0, MOST)
sizes = st.sampled_from([edge for edge in EDGES if edge < 2**16]) | st.integers(4090, 20_000)
long_texts = st.builds(lambda size, filler: (filler * size)[:size], sizes, st.binary(min_size=1, max_size=3))
texts = st.binary(max_size=12) | st.binary(max_size=300) | long_texts
keys = st.binary(min_size=1, max_size=12) | st.binary(min_size=1, max_size=300) | long_texts
range_ends = st.just(b"") | keys

compares = (
    st.builds(Compare, keys, st.sampled_from(["create", "mod"]), numbers, range_ends, st.booleans())
    | st.builds(Compare, keys, st.just("value"), texts, range_ends, st.booleans())
)  # fmt: skip
actions = (
    st.builds(Put, keys, texts)
    | st.builds(Put, keys, texts, numbers)
    | st.builds(PutOnce, keys, texts)
    | st.builds(Delete, keys, range_ends)
    | st.builds(Get, keys)
)
sessions = st.builds(SessionView, st.just("s"), st.just("w"), keys, texts, numbers, numbers, numbers, numbers)


def some(each: Any) -> Any:
    return st.lists(each, max_size=4).map(tuple)


def transactions(fences: Any) -> Any:
    return st.builds(Txn, compares=some(compares), success=some(actions), failure=some(actions), fence=fences)


# --- the same, said with etcd3's classes -----------------------------------------------------------------------------


def compare(each: Compare) -> Any:
    targets = {
        "create": (etcdrpc.Compare.CREATE, "create_revision"),
        "mod": (etcdrpc.Compare.MOD, "mod_revision"),
        "value": (etcdrpc.Compare.VALUE, "value"),
    }
    target, name = targets[each.target]
    result = etcdrpc.Compare.LESS if each.below else etcdrpc.Compare.EQUAL
    said = {"key": each.key, "target": target, "result": result, name: each.expected}
    return etcdrpc.Compare(**said, range_end=each.range_end)


def action(each: Action) -> Any:
    if isinstance(each, Put):
        put = etcdrpc.PutRequest(key=each.key, value=each.value, lease=each.lease)
        return etcdrpc.RequestOp(request_put=put)
    if isinstance(each, PutOnce):
        absent = etcdrpc.Compare(
            key=each.key, target=etcdrpc.Compare.CREATE, result=etcdrpc.Compare.EQUAL, create_revision=0
        )
        put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=each.key, value=each.value))
        return etcdrpc.RequestOp(request_txn=etcdrpc.TxnRequest(compare=[absent], success=[put]))
    if isinstance(each, Delete):
        delete = etcdrpc.DeleteRangeRequest(key=each.key, range_end=each.range_end)
        return etcdrpc.RequestOp(request_delete_range=delete)
    return etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=each.key))


def unmoved(fence: SessionView) -> Any:
    return etcdrpc.Compare(
        key=fence.key, target=etcdrpc.Compare.MOD, result=etcdrpc.Compare.EQUAL, mod_revision=fence.mod_revision
    )


def transaction(op: Txn) -> Any:
    return etcdrpc.TxnRequest(
        compare=map(compare, op.compares), success=map(action, op.success), failure=map(action, op.failure)
    )


def parsed(request: bytes) -> Any:
    return etcdrpc.TxnRequest.FromString(request)


# --- held against each other -----------------------------------------------------------------------------------------


@thoroughly
@given(transactions(st.none()))
def test_a_transaction(op: Txn) -> None:
    assert parsed(encode_op(op)) == transaction(op)
    assert txn_request(op) == encode_op(op)


plain = st.builds(Compare, keys, st.sampled_from(["create", "mod"]), st.just(0) | numbers)
puts = st.builds(Put, keys, texts) | st.builds(Put, keys, texts, numbers)
claims = st.builds(
    Txn, compares=some(compares).filter(bool), success=some(actions), failure=some(actions), fence=sessions
) | st.builds(
    Txn, compares=some(plain).filter(bool), success=some(puts), failure=some(st.builds(Get, keys)), fence=sessions
)
"""Anything behind a fence, and often what looks like a claim."""


LONE = Txn(
    compares=(Compare(b"k", "create", 0),), success=(Put(b"k", b"v", 5),), failure=(), fence=SessionView(
        "s", "w", b"/s", b"", 1, 1, 1, 1
    ),
)  # fmt: skip


@thoroughly
@given(transactions(sessions) | claims)
@example(LONE)
@example(replace(LONE, failure=(Get(b"k"),)))
@example(replace(LONE, failure=(Get(b"k"), Get(b"l"))))
@example(replace(LONE, compares=(Compare(b"k", "create", 7),)))
@example(replace(LONE, compares=(Compare(b"k", "value", b""),)))
@example(replace(LONE, compares=(Compare(b"k", "mod", 0, b"l"),)))
@example(replace(LONE, compares=(Compare(b"k", "mod", 0, below=True),)))
@example(replace(LONE, success=(PutOnce(b"k", b"v"),)))
@example(replace(LONE, failure=(Delete(b"k"),)))
@example(replace(LONE, success=(Put(b"k", b"v"), Put(b"l", b"w", 6))))
def test_a_fenced_transaction_compares_the_barrier_last_and_reads_it_last(op: Txn) -> None:
    expected = transaction(op)
    assert parsed(encode_op(op)) == expected
    assert op.fence is not None
    expected.compare.append(unmoved(op.fence))
    expected.failure.append(action(Get(op.fence.key)))
    assert parsed(txn_request(op)) == expected


@thoroughly
@given(sessions, some(st.builds(Get, keys)))
def test_a_fence(session: SessionView, gets: tuple[Get, ...]) -> None:
    ours = etcdrpc.Compare(
        key=session.key,
        target=etcdrpc.Compare.CREATE,
        result=etcdrpc.Compare.EQUAL,
        create_revision=session.create_revision,
    )
    reads = [action(each) for each in gets]
    rewrite = action(Put(session.key, session.value, session.lease))
    expected = etcdrpc.TxnRequest(compare=[ours], success=[rewrite, *reads], failure=reads)
    assert parsed(fence_request(Fence(session=session, gets=gets))) == expected


members = st.lists(st.tuples(transactions(st.none()) | claims, st.booleans()), max_size=6)


ranges = st.builds(
    Range, key=keys, range_end=st.just(b"") | keys, limit=st.sampled_from([0, 1, 100, 10_000]), keys_only=st.booleans()
)


def read(op: Range) -> Any:
    request = etcdrpc.RangeRequest(key=op.key, range_end=op.range_end, limit=op.limit, keys_only=op.keys_only)
    return etcdrpc.RequestOp(request_range=request)


@thoroughly
@given(members, st.lists(ranges, max_size=3), st.none() | sessions)
def test_a_shared_transaction(parts: list[tuple[Txn, bool]], reads: list[Range], fence: SessionView | None) -> None:
    batch = Batch()
    batch.reads = [Pending(op, None, 1, 0, 0.0, False) for op in reads]
    batch.fence = fence
    expected = etcdrpc.TxnRequest()
    if fence is not None:
        expected.compare.append(unmoved(fence))
        expected.failure.append(action(Get(fence.key)))
    expected.success.extend(map(read, reads))
    for op, looks in parts:
        member = Pending(op, op.compares[0].key if op.fence else None, 1, 1, 0.0, False)
        member.look = looks and op.fence is not None
        batch.members.append(member)
        if member.look:
            expected.success.append(action(Get(op.compares[0].key)))
        else:
            expected.success.append(etcdrpc.RequestOp(request_txn=transaction(op)))
    assert parsed(batch_request(batch)) == expected


@thoroughly
@given(st.lists(transactions(st.none()) | claims, max_size=6), st.lists(ranges, max_size=3), st.none() | sessions)
def test_a_shared_transaction_asked_as_one(ops: list[Txn], reads: list[Range], fence: SessionView | None) -> None:
    batch = Batch()
    batch.whole = True
    batch.reads = [Pending(op, None, 1, 0, 0.0, False) for op in reads]
    batch.fence = fence
    expected = etcdrpc.TxnRequest()
    expected.success.extend(map(read, reads))
    for op in ops:
        batch.members.append(Pending(op, op.compares[0].key if op.fence else None, 1, 1, 0.0, True))
        expected.compare.extend(map(compare, op.compares))
        expected.success.extend(map(action, op.success))
    if fence is not None:
        expected.compare.append(unmoved(fence))
        expected.failure.append(action(Get(fence.key)))
    assert parsed(batch_request(batch)) == expected


def test_the_edges_of_lengths_and_numbers() -> None:
    for size in (0, 1, 127, 128, 4095, 4096, 4097, 2**14 - 1, 2**14, 2**14 + 1, 2**21, 300_000):
        op = Put(b"k" * max(size, 1), b"v" * size)
        assert parsed(encode_txn((), (op,), ())).success[0] == action(op)
    for number in EDGES:
        put = Put(b"k", b"v", number)
        told = parsed(encode_txn((Compare(b"k", "mod", number),), (put,), ()))
        assert (told.compare[0].mod_revision, told.success[0].request_put.lease) == (number, number)
