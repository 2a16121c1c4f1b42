"""Which transactions may share one, and what each of them is told: the rules of group commit.

A shared transaction nests one transaction a call, each with its own compares, so that calls succeed and fail by
themselves. No key is touched by two members. Claims of one step that are made at the same time are one member: one may
win, and the others are told of it. A claim that was queued while its step was being claimed looks before it writes.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from stepclaim._core.ops import Get, KeyValue, Put, PutOnce, Range, Txn, TxnReply

if TYPE_CHECKING:
    from stepclaim._core.ops import SessionView

MOST_OPERATIONS = 128
"""etcd's limit to a transaction: each level has the larger of its compares and its branches, and levels add up."""

MOST_BYTES = 1_000_000
"""etcd refuses a request of 1.5 MiB."""

LARGEST_MEMBER = 100_000

MOST_KEYS = 100
"""A read of more goes by itself."""

_OVERHEAD = 100


class Pending(Struct, eq=False):
    """A call's transaction, or a read, that waits to be sent, and what became of it."""

    op: Any
    """A Txn or a Range."""
    claim: bytes | None
    """The claim key that it would create."""
    weight: int
    size: int
    since: float
    only_writes: bool
    """Where it succeeds there is nothing to read in its answer."""
    keys: Sequence[bytes] = ()
    """All that it writes or looks at."""
    look: bool = False
    """It only reads the claim key, because somebody seems to have it."""
    looked: bool = False
    followers: list[Pending] | None = None
    """The same claim by other callers, made while this one waited: they lose to whoever has it now."""
    reply: Any = None
    error: Exception | None = None
    """Without a reply and an error it is to be sent alone."""


P = TypeVar("P", bound=Pending)


def claim_of(op: Txn) -> bytes | None:
    """Name the claim key that a transaction would create."""
    return op.compares[0].key if op.fence is not None else None


def pending(op: Txn, now: float, kind: type[P]) -> P | None:
    """Measure a transaction; None for one that has to go alone."""
    if op.fence is not None:
        return _pending_claim(op, now, kind)
    keys = [each.key for each in op.compares]
    size = 0
    put_once = get = False
    for action in op.success:
        keys.append(action.key)
        if isinstance(action, Put):
            size += len(action.value)
        elif isinstance(action, Get):
            get = True
        elif isinstance(action, PutOnce):
            put_once = True
            size += len(action.value)
        elif action.range_end:
            return None
    for each in op.compares:
        if each.range_end:
            return None
    for action in op.failure:
        if not isinstance(action, Get):
            return None
        keys.append(action.key)
    size += sum(map(len, keys)) + _OVERHEAD * len(keys)
    weight = max(len(op.compares), len(op.success), len(op.failure)) + put_once
    if weight > MOST_OPERATIONS // 2 or size > LARGEST_MEMBER:
        return None
    return kind(op, None, weight, size, now, not (put_once or get), keys)


def _pending_claim(op: Txn, now: float, kind: type[P]) -> P | None:
    """Measure a claim, which compares no range, only puts, and where it fails looks at what it compares."""
    compares, success = op.compares, op.success
    claim, size = compares[0].key, 0
    keys = [claim] if len(compares) == 1 else [each.key for each in compares]
    for put in success:
        assert type(put) is Put
        if put.key != claim:
            keys.append(put.key)
        size += len(put.value)
    size += (len(compares) + len(success) + len(op.failure)) * (len(claim) + _OVERHEAD)
    if size > LARGEST_MEMBER:
        return None
    weight = len(compares)
    return kind(op, claim, max(len(success), weight), size, now, True, keys)


def reading(op: Range, now: float, kind: type[P]) -> P:
    """Give a read a place among transactions: a small one, for etcd does nothing else meanwhile."""
    if op.range_end and not 0 < op.limit <= MOST_KEYS:
        op = replace(op, limit=MOST_KEYS)
    return kind(op, None, 1, 0, now, False)


class Batch:
    """Members of one shared transaction."""

    def __init__(self, most: int = MOST_OPERATIONS) -> None:
        self.members: list[Pending] = []
        self.reads: list[Any] = []
        """Those who only read what stood before it: they go ahead of all members, and not without one that writes."""
        self.fence: SessionView | None = None
        self.standing: frozenset[bytes] = frozenset()
        """The claims that are known to stand, once the answer is there."""
        self._most = most
        self.room = most - 1
        """How many more it takes of those that are no heavier than its heaviest."""
        self.claims: list[bytes] = []
        """The claims that its members make, or look for."""
        self._by_key: dict[bytes, Pending] = {}
        """All keys that members write or look at, and by which."""
        self.whole = False
        """It is asked as one transaction that does all or nothing. Where it did nothing its members wait once more."""
        self.clean = True
        """Everyone got what they asked for, once the answer is there."""
        self._only_writes = True
        self._heaviest = 1
        self._weight = 1
        self._bytes = 0

    def take(self, entry: Pending) -> bool:
        """Take a transaction in, unless it has to wait for the next one."""
        claim, by_key, keys = entry.claim, self._by_key, entry.keys
        if claim is not None:
            first = by_key.get(claim)
            if first is not None:
                if first.claim != claim:
                    return False
                if first.followers is None:
                    first.followers = []
                first.followers.append(entry)
                return True
            if entry.look:
                if self.room < 1:
                    return False
                self.room -= 1
                self._only_writes = False
                self.claims.append(claim)
                by_key[claim] = entry
                self.members.append(entry)
                return True
            fence = entry.op.fence
            if fence is not self.fence and self.fence is not None and fence != self.fence:
                return False
        weight = entry.weight
        room = self.room if weight <= self._heaviest else self.room - weight + self._heaviest
        if room < 1 or self._bytes + entry.size > MOST_BYTES:
            return False
        if (claim is None or len(keys) > 1) and not by_key.keys().isdisjoint(keys):
            return False
        self.room = room - 1
        self._weight += weight
        self._bytes += entry.size
        self._heaviest = max(self._heaviest, weight)
        if claim is not None:
            self.fence = fence
            self.claims.append(claim)
        elif isinstance(entry.op, Range):
            self.reads.append(entry)
            return True
        if not entry.only_writes:
            self._only_writes = False
        for key in keys:
            by_key[key] = entry
        self.members.append(entry)
        return True

    def as_one(self) -> None:
        """Have it asked as one transaction, if it is one: which costs etcd and the client less."""
        self.whole = self._only_writes and self._weight <= self._most and len(self.members) > 1

    def without_writers(self) -> list[Any]:
        """Give the reads back if nobody who writes takes them along: they make no transaction that only reads."""
        if not all(each.look for each in self.members):
            return []
        reads, self.reads = self.reads, []
        return reads

    @property
    def everyone(self) -> list[Pending]:
        """All who wait for this."""
        return [*self.reads, *(each for member in self.members for each in (member, *(member.followers or ())))]

    def settle(self, replies: Sequence[TxnReply | None]) -> tuple[list[Pending], list[Pending]]:
        """Give each its reply; gives back those who have one, and those who have to wait for another transaction."""
        done: list[Pending] = []
        again: list[Pending] = []
        standing: list[bytes] = []
        for entry, reply in zip(self.members, replies, strict=True):
            claim = entry.claim
            if reply is not None and entry.followers is None and not entry.look:  # what most are told
                entry.reply = reply
                done.append(entry)
                if not reply.succeeded:
                    self.clean = False
                if claim is not None and (reply.succeeded or (reply.found and reply.found[0] is not None)):
                    standing.append(claim)
                continue
            self.clean = False
            stands = claim is not None and reply is not None and (reply.succeeded or any(reply.found[:1]))
            if claim is not None and stands:
                standing.append(claim)
            if entry.look:
                entry.looked = True
                entry.reply = reply if stands else None
            else:
                entry.reply = reply
            (again if entry.reply is None else done).append(entry)
            if entry.followers is None:
                continue
            for other in entry.followers:
                if reply is not None and stands:
                    other.reply = _lost(entry, reply)
                elif reply is not None and other.op.fence == self.fence and _asks_the_same(entry, other):
                    other.reply = reply
                (again if other.reply is None else done).append(other)
            entry.followers = None
        self.standing = frozenset(standing)
        return done, again


def _asks_the_same(entry: Pending, other: Pending) -> bool:
    return not entry.look and other.op.compares == entry.op.compares and other.op.failure == entry.op.failure


def _lost(winner: Pending, reply: TxnReply) -> TxnReply:
    """Tell the others who made the same claim what they would have read."""
    if not reply.succeeded:
        return TxnReply(succeeded=False, revision=reply.revision, found=reply.found[:1])
    written = winner.op.success[0]
    assert isinstance(written, Put)
    claim = KeyValue(written.key, written.value, reply.revision, reply.revision, written.lease)
    return TxnReply(succeeded=False, revision=reply.revision, found=(claim,))
