"""Operations to etcd's messages, and etcd's messages to replies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etcd3 import etcdrpc, transactions

from stepclaim._core.keys import Keyspace
from stepclaim._core.ops import (
    Action,
    Compare,
    Fence,
    Get,
    KeyValue,
    Put,
    PutOnce,
    Range,
    RangeReply,
    Txn,
    TxnReply,
)

if TYPE_CHECKING:
    from stepclaim.models import StepClaim

_TARGETS = {
    "create": (etcdrpc.Compare.CREATE, "create_revision"),
    "mod": (etcdrpc.Compare.MOD, "mod_revision"),
    "value": (etcdrpc.Compare.VALUE, "value"),
}


def compare(each: Compare) -> Any:
    """Make the message of one condition."""
    target, name = _TARGETS[each.target]
    result = etcdrpc.Compare.LESS if each.below else etcdrpc.Compare.EQUAL
    message = etcdrpc.Compare(result=result, target=target, key=each.key, **{name: each.expected})
    if each.range_end:
        message.range_end = each.range_end
    return message


def guard(claim: StepClaim) -> Any:
    """Make the compare that holds while the claim is held: it is written once, so its token is its mod revision."""
    key = Keyspace(claim.prefix).step(claim.run_id, claim.step_key).claim
    return transactions.Mod(key) == claim.fencing_token


def _action(each: Action) -> Any:
    if isinstance(each, Put):
        return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=each.key, value=each.value, lease=each.lease))
    if isinstance(each, Get):
        return etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=each.key))
    if isinstance(each, PutOnce):
        return etcdrpc.RequestOp(
            request_txn=etcdrpc.TxnRequest(
                compare=[compare(Compare(each.key, "create", 0))], success=[_action(Put(each.key, each.value))]
            )
        )
    return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=each.key, range_end=each.range_end))


def txn_request(op: Txn) -> Any:
    """Make a transaction's message; a fenced one also compares the barrier and reads it where it fails."""
    compares = [compare(each) for each in op.compares]
    failure = [_action(each) for each in op.failure]
    fence = op.fence
    if fence is not None:
        compares.append(compare(Compare(fence.key, "mod", fence.mod_revision)))
        failure.append(_action(Get(fence.key)))
    return etcdrpc.TxnRequest(compare=compares, success=[_action(each) for each in op.success], failure=failure)


def fence_request(op: Fence) -> Any:
    """Make the message that rewrites the session key while it still is this session's, and reads."""
    session = op.session
    gets = [_action(each) for each in op.gets]
    return etcdrpc.TxnRequest(
        compare=[compare(Compare(session.key, "create", session.create_revision))],
        success=[_action(Put(session.key, session.value, session.lease)), *gets],
        failure=gets,
    )


def range_request(op: Range) -> Any:
    """Make the message of a read."""
    request = etcdrpc.RangeRequest(
        key=op.key, range_end=op.range_end, limit=op.limit, revision=op.revision, keys_only=op.keys_only
    )
    if op.newest_first:
        request.sort_order = etcdrpc.RangeRequest.DESCEND
        request.sort_target = etcdrpc.RangeRequest.CREATE
    return request


def txn_reply(response: Any, *, in_doubt: bool = False) -> TxnReply:
    """Read what a transaction did: of each read in its branch, the one key or None."""
    found = tuple(
        _kv(each.response_range.kvs[0]) if each.response_range.kvs else None
        for each in response.responses
        if each.HasField("response_range")
    )
    put = tuple(each.response_txn.succeeded for each in response.responses if each.HasField("response_txn"))
    return TxnReply(response.succeeded, response.header.revision, found, in_doubt, put)


def range_reply(response: Any) -> RangeReply:
    """Read one page."""
    return RangeReply([_kv(kv) for kv in response.kvs], response.header.revision, response.more, response.count)


def _kv(kv: Any) -> KeyValue:
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def split_fence(reply: TxnReply) -> tuple[TxnReply, KeyValue | None]:
    """Take the barrier's own read off a failed fenced transaction's reply."""
    *found, barrier = reply.found
    return TxnReply(reply.succeeded, reply.revision, tuple(found), reply.in_doubt, reply.put), barrier
