"""Operations to etcd's messages, and etcd's messages to replies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etcd3 import etcdrpc, transactions

from stepclaim._core.keys import Keyspace
from stepclaim._core.ops import Compare, Fence, Get, KeyValue, Put, Range, RangeReply, Txn, TxnReply
from stepclaim._etcd.encoding import encode_fence, encode_op, encode_txn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stepclaim._core.batching import Batch
    from stepclaim.models import StepClaim


def guard(claim: StepClaim) -> Any:
    """Make the compare that holds while the claim is held: it is written once, so its token is its mod revision."""
    key = Keyspace(claim.prefix).step(claim.run_id, claim.step_key).claim
    return transactions.Mod(key) == claim.fencing_token


def txn_request(op: Txn) -> bytes:
    """Make a transaction's message; a fenced one also compares the barrier and reads it where it fails."""
    fence = op.fence
    return encode_op(op) if fence is None else encode_op(op) + encode_fence(fence.key, fence.mod_revision)


def batch_request(batch: Batch) -> bytes:
    """Make the message of a shared transaction: one nested transaction a member, or all in one, behind one fence."""
    fence = batch.fence
    behind = b"" if fence is None else encode_fence(fence.key, fence.mod_revision)
    members = [each.op for each in batch.reads]
    if batch.whole:  # messages one after the other are one message with the fields of all
        whole = [encode_op(each.op, reads=False) for each in batch.members]
        return b"".join((encode_txn((), members, ()), *whole, behind))
    members += [Get(each.op.compares[0].key) if each.look else encode_op(each.op) for each in batch.members]
    return encode_txn((), members, ()) + behind


def batch_replies(batch: Batch, response: Any) -> Sequence[TxnReply | None]:
    """Read what each member of a shared transaction is told; None for one that another kept back."""
    revision, fence = response.header.revision, batch.fence
    if not response.succeeded:
        barrier = _found(response.responses)
        if batch.whole and (fence is None or (barrier[0] and barrier[0].mod_revision == fence.mod_revision)):
            return [None] * len(batch.members)
        moved = TxnReply(False, revision, fence_moved=True, barrier=barrier)
        return [moved if each.op.fence else None for each in batch.members]
    for reader, each in zip(batch.reads, response.responses, strict=False):
        if not each.response_range.more:  # what has more pages has to know of which revision they are
            reader.reply = range_reply(each.response_range, lazy=reader.op.lazy)
    done = TxnReply(True, revision)
    if batch.whole:
        if len(response.responses) < len(batch.reads) + len(batch.members):
            raise ValueError("etcd answered for less than it was asked")
        return [done] * len(batch.members)
    return [
        done
        if member.only_writes and each.response_txn.succeeded
        else _reply(each.response_txn, revision)
        if member.claim is None
        else TxnReply(False, revision, _looked((each,) if member.look else each.response_txn.responses))
        for member, each in zip(batch.members, response.responses[len(batch.reads) :], strict=True)
    ]


def look_request(op: Txn) -> Any:
    """Make the message that reads the key of a claim."""
    return etcdrpc.RangeRequest(key=op.compares[0].key)


def look_reply(response: Any) -> TxnReply:
    """Read what stands there."""
    return TxnReply(False, response.header.revision, (_kv(response.kvs[0]) if response.kvs else None,))


def fence_request(op: Fence) -> bytes:
    """Make the message that rewrites the session key while it still is this session's, and reads."""
    session = op.session
    rewrite = Put(session.key, session.value, session.lease)
    return encode_txn((Compare(session.key, "create", session.create_revision),), (rewrite, *op.gets), op.gets)


def range_request(op: Range) -> Any:
    """Make the message of a read."""
    request = etcdrpc.RangeRequest(
        key=op.key, range_end=op.range_end, limit=op.limit, revision=op.revision, keys_only=op.keys_only
    )
    if op.newest_first:
        request.sort_order = etcdrpc.RangeRequest.DESCEND
        request.sort_target = etcdrpc.RangeRequest.CREATE
    return request


def txn_reply(response: Any, *, fenced: bool = False) -> TxnReply:
    """Read what a transaction did: of each read in its branch, the one key or None."""
    if fenced and response.succeeded:
        return TxnReply(True, response.header.revision)
    reply = _reply(response, response.header.revision)
    if fenced:
        reply.found, reply.barrier = reply.found[:-1], reply.found[-1:]
    return reply


def _reply(response: Any, revision: int) -> TxnReply:
    responses = response.responses
    put = tuple(each.response_txn.succeeded for each in responses if each.HasField("response_txn"))
    return TxnReply(response.succeeded, revision, _found(responses), put=put)


def _found(responses: Iterable[Any]) -> tuple[KeyValue | None, ...]:
    return tuple(
        _kv(each.response_range.kvs[0]) if each.response_range.kvs else None
        for each in responses
        if each.HasField("response_range")
    )


def _looked(responses: Iterable[Any]) -> tuple[KeyValue | None, ...]:
    """Do so where nothing else was asked for, which is what a claim does that is refused."""
    found = [each.response_range.kvs for each in responses]
    return tuple([_kv(kvs[0]) if kvs else None for kvs in found])


def range_reply(response: Any, *, lazy: bool = False) -> RangeReply:
    """Read one page; in a transaction it tells no revision."""
    kvs = list(response.kvs) if lazy else [_kv(kv) for kv in response.kvs]
    return RangeReply(kvs, response.header.revision, response.more, response.count)


def _kv(kv: Any) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)
