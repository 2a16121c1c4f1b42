"""Transactions as the bytes that etcd reads, without message objects in between.

In a shared transaction making those objects would cost a client more than everything else that it does for a call. The
layout is that of etcd's `rpc.proto`; the tests hold it against etcd3's messages.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from stepclaim._core.ops import Compare, Get, Put, PutOnce

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.ops import Action, Txn

# field numbers with their wire types: 2 for what has a length, 0 for numbers
_COMPARE, _SUCCESS, _FAILURE = b"\x0a", b"\x12", b"\x1a"  # TxnRequest
_RANGE, _PUT, _DELETE, _TXN = b"\x0a", b"\x12", b"\x1a", b"\x22"  # RequestOp
_KEY = b"\x0a"  # of all three requests
_VALUE, _LEASE, _RANGE_END = b"\x12", b"\x18", b"\x12"
_TARGETS = {"create": b"\x10\x01\x1a", "mod": b"\x10\x02\x1a", "value": b"\x10\x03\x1a"}  # and the tag of the key
_EXPECTED = {"create": b"\x28", "mod": b"\x30", "value": b"\x3a"}
_LESS = b"\x08\x02"
_COMPARE_END = b"\x82\x04"


def _digits(number: int) -> bytes:
    out = bytearray()
    while number > 127:  # noqa: PLR2004 - seven bits each
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_lease = lru_cache(64)(_digits)
_USUAL = [_digits(number) for number in range(4096)]


def _number(number: int) -> bytes:
    return _USUAL[number] if number < 4096 else _digits(number)  # noqa: PLR2004


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + _number(len(content)) + content


def encode_txn(compares: Iterable[Compare], success: Iterable[bytes], failure: Iterable[bytes]) -> bytes:
    """Write a transaction: its conditions and the operations of both branches."""
    parts = [_sized(_COMPARE, _compare(each)) for each in compares]
    parts += [_sized(_SUCCESS, each) for each in success]
    parts += [_sized(_FAILURE, each) for each in failure]
    return b"".join(parts)


def encode_op(op: Txn) -> bytes:
    """Write a transaction without its fence."""
    return encode_txn(op.compares, map(encode_action, op.success), map(encode_action, op.failure))


def nested(txn: bytes) -> bytes:
    """Make a transaction an operation of another."""
    return _sized(_TXN, txn)


def encode_action(each: Action) -> bytes:
    """Write one operation of a branch."""
    key = _sized(_KEY, each.key)
    if isinstance(each, Put):
        put = key + _sized(_VALUE, each.value)
        return _sized(_PUT, put + _LEASE + _lease(each.lease) if each.lease else put)
    if isinstance(each, Get):
        return _sized(_RANGE, key)
    if isinstance(each, PutOnce):
        put_once = encode_action(Put(each.key, each.value))
        return nested(encode_txn((Compare(each.key, "create", 0),), (put_once,), ()))
    return _sized(_DELETE, key + _sized(_RANGE_END, each.range_end) if each.range_end else key)


def _compare(each: Compare) -> bytes:
    expected = each.expected
    value = _number(expected) if isinstance(expected, int) else _number(len(expected)) + expected
    parts = (_TARGETS[each.target], _number(len(each.key)), each.key, _EXPECTED[each.target], value)
    head = (_LESS, *parts) if each.below else parts
    return b"".join((*head, _COMPARE_END, _number(len(each.range_end)), each.range_end) if each.range_end else head)
