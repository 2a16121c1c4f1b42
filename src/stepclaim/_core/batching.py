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
    if op.fence is None:  # else it compares no range, and where it fails it looks at what it compares
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
    return kind(op, claim_of(op), weight, size, now, not (put_once or get), keys)


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
        self.claims: dict[bytes, Pending] = {}
        """The claims that its members make, or look for."""
        self._touched: set[bytes] = set()
        """All keys that members write or look at."""
        self._heaviest = 0
        self._bytes = 0

    def take(self, entry: Pending) -> bool:
        """Take a transaction in, unless it has to wait for the next one."""
        key = entry.claim
        if key is not None:
            first = self.claims.get(key)
            if first is not None:
                if first.followers is None:
                    first.followers = []
                first.followers.append(entry)
                return True
            if entry.look:
                if key in self._touched or self.full:
                    return False
                self.claims[key] = entry
                self._touched.add(key)
                self.members.append(entry)
                return True
        heaviest = max(self._heaviest, entry.weight)
        if self._count + 1 + heaviest > self._most or self._bytes + entry.size > MOST_BYTES:
            return False
        if isinstance(entry.op, Range):
            self.reads.append(entry)
            return True
        if not self._touched.isdisjoint(entry.keys):
            return False
        if key is not None:
            fence = entry.op.fence
            if self.fence is None:
                self.fence = fence
            elif fence is not self.fence and fence != self.fence:
                return False
            self.claims[key] = entry
        self._touched.update(entry.keys)
        self._heaviest = heaviest
        self._bytes += entry.size
        self.members.append(entry)
        return True

    def without_writers(self) -> list[Any]:
        """Give the reads back if nobody who writes takes them along: they make no transaction that only reads."""
        if not all(each.look for each in self.members):
            return []
        reads, self.reads = self.reads, []
        return reads

    @property
    def full(self) -> bool:
        """Whether not even the lightest transaction has room."""
        return self._count + max(self._heaviest, 1) >= self._most

    @property
    def _count(self) -> int:
        return len(self.members) + len(self.reads)

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
            if reply is not None and reply.succeeded and entry.followers is None:  # what most are told
                entry.reply = reply
                done.append(entry)
                if claim is not None:
                    standing.append(claim)
                continue
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
