"""Transactions as the bytes that etcd reads, without message objects in between.

In a shared transaction making those objects would cost a client more than everything else that it does for a call. The
layout is that of etcd's `rpc.proto`; the tests hold it against etcd3's messages. What stands around keys and values
depends on their lengths alone, and these repeat: it is kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from stepclaim._core.ops import Action, Compare, Delete, Get, Put, PutOnce, Range

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.ops import Txn

Encoded: TypeAlias = bytes
"""A whole transaction, which may be an operation of another."""

# field numbers with their wire types: 2 for what has a length, 0 for numbers
_COMPARE, _SUCCESS, _FAILURE = b"\x0a", b"\x12", b"\x1a"  # TxnRequest
_RANGE, _PUT, _DELETE, _TXN = b"\x0a", b"\x12", b"\x1a", b"\x22"  # RequestOp
_KEY = b"\x0a"  # of all three requests
_VALUE, _LEASE, _RANGE_END = b"\x12", b"\x18", b"\x12"
_TARGETS = {"create": b"\x10\x01\x1a", "mod": b"\x10\x02\x1a", "value": b"\x10\x03\x1a"}  # and the tag of the key
_EXPECTED = {"create": b"\x28", "mod": b"\x30", "value": b"\x3a"}
_LIMIT, _KEYS_ONLY = b"\x18", b"\x40\x01"
_LESS = b"\x08\x02"
_COMPARE_END = b"\x82\x04"
_KEPT = 4096


@lru_cache(_KEPT)
def _number(number: int) -> bytes:
    out = bytearray()
    while number > 127:  # noqa: PLR2004 - seven bits each
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode_txn(
    compares: Iterable[Compare], success: Iterable[Action | Range | Encoded], failure: Iterable[Action]
) -> Encoded:
    """Write a transaction: its conditions and the operations of both branches."""
    parts: list[bytes] = []
    for each in compares:
        _compare(parts, each)
    for branch, actions in ((_SUCCESS, success), (_FAILURE, failure)):
        for action in actions:
            if type(action) is bytes:  # these three without a call each: they are most of what is written
                parts += (_before_txn(branch, len(action)), action)
            elif type(action) is Put:
                head, middle, tail = _around_put(branch, len(action.key), len(action.value), action.lease)
                parts += (head, action.key, middle, action.value, tail)
            elif type(action) is Get:
                parts += (_before_get(branch, len(action.key)), action.key)
            else:
                parts.append(_operation(branch, action))  # type: ignore[arg-type]  # what is left
    return b"".join(parts)


def encode_op(op: Txn, *, reads: bool = True) -> Encoded:
    """Write a transaction without its fence, and without what it would read where it does not hold if so wanted.

    Claims are sent most, and differ in nothing but their keys and values: what stands between these is kept whole.
    What is not like them goes the longer way.
    """
    compares, success = op.compares, op.success
    failure = op.failure if reads else ()
    if op.fence is None:
        return encode_txn(compares, success, failure)
    fields: list[bytes] = []
    form: list[Any] = [len(compares), len(success)]
    for compare in compares:
        if compare.expected != 0 or compare.range_end or compare.below:
            return encode_txn(compares, success, failure)
        fields.append(compare.key)
        form.append(compare.target)
    for put in success:
        if type(put) is not Put:
            return encode_txn(compares, success, failure)
        fields += (put.key, put.value)
        form.append(put.lease)
    for get in failure:
        if type(get) is not Get:
            return encode_txn(compares, success, failure)
        fields.append(get.key)
    parts = _between(*form, *map(len, fields)).copy()
    parts[1::2] = fields
    return b"".join(parts)


@lru_cache(_KEPT)
def _between(compares: int, puts: int, *form: Any) -> list[bytes]:
    """Give what stands around a claim's keys and values, with room for these.

    The form is: the targets of its compares, the leases of its puts, the lengths of its keys and values.
    """
    sizes = iter(form[compares + puts :])
    parts = [b""]
    for target in form[:compares]:
        head, middle = _around_key(target, next(sizes), 1)
        parts[-1:] = (parts[-1] + head, b"", middle + _number(0))
    for lease in form[compares : compares + puts]:
        head, middle, tail = _around_put(_SUCCESS, next(sizes), next(sizes), lease)
        parts[-1:] = (parts[-1] + head, b"", middle, b"", tail)
    for size in sizes:
        parts[-1:] = (parts[-1] + _before_get(_FAILURE, size), b"", b"")
    return parts


@lru_cache(64)
def encode_fence(key: bytes, revision: int) -> Encoded:
    """Write what makes a transaction hold only while the key's mod revision is this one, and reads it where it isn't.

    It stands behind the transaction: fields that come several times count as one list.
    """
    return encode_txn((Compare(key, "mod", revision),), (), (Get(key),))


def _operation(branch: bytes, each: PutOnce | Delete | Range) -> bytes:
    if isinstance(each, PutOnce):
        nested = encode_txn((Compare(each.key, "create", 0),), (Put(each.key, each.value),), ())
        return _before_txn(branch, len(nested)) + nested
    if isinstance(each, Range):
        return _sized(branch, _sized(_RANGE, _range(each)))
    delete = _sized(_KEY, each.key) + (_sized(_RANGE_END, each.range_end) if each.range_end else b"")
    return _sized(branch, _sized(_DELETE, delete))


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + _number(len(content)) + content


@lru_cache(_KEPT)
def _around_put(branch: bytes, key: int, value: int, lease: int) -> tuple[bytes, bytes, bytes]:
    """Give what stands before the key, between it and the value, and behind."""
    head, middle = _KEY + _number(key), _VALUE + _number(value)
    tail = _LEASE + _number(lease) if lease else b""
    put = len(head) + key + len(middle) + value + len(tail)
    return _heads(branch, _PUT, put) + head, middle, tail


@lru_cache(_KEPT)
def _before_get(branch: bytes, key: int) -> bytes:
    head = _KEY + _number(key)
    return _heads(branch, _RANGE, len(head) + key) + head


def _range(each: Range) -> bytes:
    """Write a read of what stands; one of an earlier revision, or in another order, has no place in a transaction."""
    end = _sized(_RANGE_END, each.range_end) if each.range_end else b""
    limit = _LIMIT + _number(each.limit) if each.limit else b""
    return _sized(_KEY, each.key) + end + limit + (_KEYS_ONLY if each.keys_only else b"")


@lru_cache(_KEPT)
def _before_txn(branch: bytes, size: int) -> bytes:
    return _heads(branch, _TXN, size)


def _heads(branch: bytes, kind: bytes, size: int) -> bytes:
    """Begin an operation of a branch whose content has a size."""
    inner = kind + _number(size)
    return branch + _number(len(inner) + size) + inner


def _compare(parts: list[bytes], each: Compare) -> None:
    expected = each.expected
    value = _number(expected) if isinstance(expected, int) else _number(len(expected)) + expected
    if each.below or each.range_end:
        end = _COMPARE_END + _number(len(each.range_end)) + each.range_end if each.range_end else b""
        less = _LESS if each.below else b""
        key = _TARGETS[each.target] + _number(len(each.key)) + each.key
        parts.append(_sized(_COMPARE, less + key + _EXPECTED[each.target] + value + end))
    else:
        head, middle = _around_key(each.target, len(each.key), len(value))
        parts += (head, each.key, middle, value)


@lru_cache(_KEPT)
def _around_key(target: str, key: int, value: int) -> tuple[bytes, bytes]:
    head, middle = _TARGETS[target] + _number(key), _EXPECTED[target]
    return _COMPARE + _number(len(head) + key + len(middle) + value) + head, middle
