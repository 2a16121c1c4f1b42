"""Which transactions may share one, and what each of them is told: the rules of group commit.

A shared transaction nests one transaction a call, each with its own compares, so that calls succeed and fail by
themselves. No key is written by one member and touched by another. Claims of one step that are made at the same time
are one member: one may win, and the others are told of it. A claim that was queued while its step was being claimed
looks before it writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepclaim._core.ops import Get, KeyValue, Put, PutOnce, TxnReply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stepclaim._core.ops import SessionView, Txn

MOST_OPERATIONS = 128
"""etcd's limit to a transaction: each level has the larger of its compares and its branches, and levels add up."""

MOST_BYTES = 1_000_000
"""etcd refuses a request of 1.5 MiB."""

LARGEST_MEMBER = 100_000
_OVERHEAD = 100


class Pending:
    """A call's transaction that waits to be sent, and what became of it."""

    __slots__ = (
        "_open",
        "done",
        "error",
        "followers",
        "gate",
        "leads",
        "look",
        "looked",
        "only_writes",
        "op",
        "reply",
        "since",
        "size",
        "weight",
    )

    def __init__(self, op: Txn, weight: int, size: int, since: float, *, only_writes: bool) -> None:
        self.op = op
        self.only_writes = only_writes
        """Where it succeeds there is nothing to read in its answer."""
        self.weight = weight
        self.size = size
        self.since = since
        self.gate: Any = None
        """What its caller waits at."""
        self.done = False
        self.look = False
        """It only reads the claim key, because somebody seems to have it."""
        self.looked = False
        self.followers: list[Pending] = []
        """The same claim by other callers, made while this one waited: they lose to whoever has it now."""
        self.leads = False
        """Its caller is to send what waits."""
        self.reply: TxnReply | None = None
        self.error: Exception | None = None
        """Without a reply and an error it is to be sent alone."""
        self._open = [True]

    def take(self) -> bool:
        """Decide for one party what happens to it: it is sent, or its caller takes it back."""
        try:
            return self._open.pop()
        except IndexError:
            return False

    def reopen(self) -> None:
        """Have it wait again."""
        self._open.append(True)

    @property
    def claim(self) -> bytes | None:
        """The claim key that it would create."""
        return self.op.compares[0].key if self.op.fence is not None else None


def pending(op: Txn, now: float) -> Pending | None:
    """Measure a transaction; None for one that has to go alone."""
    size = 0
    put_once = get = False
    for compare in op.compares:
        if compare.range_end:
            return None
        size += len(compare.key)
    for action in op.success:
        if isinstance(action, Put):
            size += len(action.value)
        elif isinstance(action, PutOnce):
            put_once = True
            size += len(action.value)
        elif isinstance(action, Get):
            get = True
        elif action.range_end:
            return None
        size += len(action.key) + _OVERHEAD
    for action in op.failure:
        if not isinstance(action, Get):
            return None
    weight = max(len(op.compares), len(op.success), len(op.failure)) + put_once
    if weight > MOST_OPERATIONS // 2 or size > LARGEST_MEMBER:
        return None
    return Pending(op, weight, size, now, only_writes=not (put_once or get))


class Batch:
    """Members of one shared transaction."""

    def __init__(self, most: int = MOST_OPERATIONS) -> None:
        self.members: list[Pending] = []
        self.fence: SessionView | None = None
        self.standing: frozenset[bytes] = frozenset()
        """The claims that are known to stand, once the answer is there."""
        self._most = most
        self._claims: dict[bytes, Pending] = {}
        self._written: set[bytes] = set()
        self._touched: set[bytes] = set()
        """All keys that members write or look at."""
        self._heaviest = 0
        self._bytes = 0

    def take(self, entry: Pending) -> bool:
        """Take a transaction in, unless it has to wait for the next one."""
        op = entry.op
        key = entry.claim
        first = self._claims.get(key) if key is not None else None
        if first is not None:
            first.followers.append(entry)
            return True
        if key is not None and entry.look:
            if key in self._written or self.full:
                return False
            self._claims[key] = entry
            self._touched.add(key)
            self.members.append(entry)
            return True
        heaviest = max(self._heaviest, entry.weight)
        if len(self.members) + 1 + heaviest > self._most or self._bytes + entry.size > MOST_BYTES:
            return False
        if op.fence is not None and self.fence is not None and op.fence != self.fence:
            return False
        written = [action.key for action in op.success if not isinstance(action, Get)]
        touched = [each.key for each in (*op.compares, *op.success, *op.failure)]
        if not (self._written.isdisjoint(touched) and self._touched.isdisjoint(written)):
            return False
        if key is not None:
            self._claims[key] = entry
            self.fence = op.fence
        self._written.update(written)
        self._touched.update(touched)
        self._heaviest = heaviest
        self._bytes += entry.size
        self.members.append(entry)
        return True

    @property
    def full(self) -> bool:
        """Whether not even the lightest transaction has room."""
        return len(self.members) + max(self._heaviest, 1) >= self._most

    @property
    def everyone(self) -> list[Pending]:
        """All who wait for this."""
        return [each for member in self.members for each in (member, *member.followers)]

    def settle(self, replies: Sequence[TxnReply | None]) -> tuple[list[Pending], list[Pending]]:
        """Give each its reply; gives back those who have one, and those who have to wait for another transaction."""
        done: list[Pending] = []
        again: list[Pending] = []
        standing: list[bytes] = []
        for entry, reply in zip(self.members, replies, strict=True):
            claim = entry.claim
            stands = claim is not None and reply is not None and (reply.succeeded or any(reply.found[:1]))
            if claim is not None and stands:
                standing.append(claim)
            if entry.look:
                entry.looked = True
                entry.reply = reply if stands else None
            else:
                entry.reply = reply
            (again if entry.reply is None else done).append(entry)
            for other in entry.followers:
                if reply is not None and stands:
                    other.reply = _lost(entry, reply)
                elif reply is not None and other.op.fence == self.fence and _asks_the_same(entry, other):
                    other.reply = reply
                (again if other.reply is None else done).append(other)
            entry.followers = []
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
