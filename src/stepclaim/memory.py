"""A small key-value store in memory that keeps etcd's rules for transactions, revisions, watches and leases."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING

from stepclaim._core.ops import (
    Action,
    Compare,
    Delete,
    Event,
    Fence,
    Get,
    KeyValue,
    Put,
    PutOnce,
    Range,
    RangeReply,
    SessionView,
    Txn,
    TxnReply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_UNBATCHED = 128
"""etcd refuses a transaction with more operations."""


class InMemoryBackend:
    """What several stores in memory share, as several workers share one etcd."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kvs: dict[bytes, KeyValue] = {}
        self._revision = 1
        self._leases = 0
        self._history: list[Event] = []
        self._listeners: list[Callable[[], None]] = []

    def grant(self) -> int:
        """Give a new lease."""
        with self._lock:
            self._leases += 1
            return self._leases

    def revoke(self, lease: int) -> None:
        """End a lease: all its keys go, at one revision."""
        with self._lock:
            gone = sorted(key for key, kv in self._kvs.items() if kv.lease == lease)  # as etcd orders its events
            self._revision += bool(gone)
            for key in gone:
                self._write(key, None)
        self._tell()

    def txn(self, op: Txn) -> TxnReply:
        """Carry out one transaction."""
        with self._lock:
            succeeded = all(self._holds(each) for each in op.compares) and self._unfenced(op.fence)
            before = self._revision
            reply = self._apply(op.success if succeeded else op.failure, succeeded=succeeded)
        if reply.revision != before:
            self._tell()
        return reply

    def many(self, ops: Sequence[Txn]) -> list[TxnReply | Exception]:
        """Carry out several transactions as etcd does in a shared one: all conditions first, one revision for all."""
        with self._lock:
            hold = [all(self._holds(each) for each in op.compares) and self._unfenced(op.fence) for op in ops]
            branches = [op.success if held else op.failure for op, held in zip(ops, hold, strict=True)]
            before = self._revision
            self._revision += any(self._writes(each) for branch in branches for each in branch)
            replies: list[TxnReply | Exception] = [
                self._carry_out(branch, succeeded=held) for branch, held in zip(branches, hold, strict=True)
            ]
        if self._revision != before:
            self._tell()
        return replies

    def fence(self, op: Fence) -> TxnReply:
        """Rewrite a session key while it still is that session's."""
        session = op.session
        with self._lock:
            succeeded = self._holds(Compare(session.key, "create", session.create_revision))
            rewrite = (Put(session.key, session.value, session.lease),) if succeeded else ()
            return self._apply((*rewrite, *op.gets), succeeded=succeeded)

    def range(self, op: Range) -> RangeReply:
        """Read keys in their order."""
        with self._lock:
            state = self._kvs if op.revision in (0, self._revision) else self._as_of(op.revision)
            if op.range_end:
                kvs = [state[key] for key in sorted(state) if op.key <= key < op.range_end]
            else:
                kvs = [state[op.key]] if op.key in state else []
            if op.newest_first:
                kvs.sort(key=lambda kv: kv.create_revision, reverse=True)
                kvs = kvs[: op.limit or None]
            return RangeReply(kvs, self._revision, more=False, count=len(kvs))

    def get(self, key: bytes) -> KeyValue | None:
        """Look at one key."""
        with self._lock:
            return self._kvs.get(key)

    def events(self, key: bytes, range_end: bytes, after: int) -> list[Event]:
        """Give what happened to keys after a revision, in its order."""
        with self._lock:
            first = bisect_right(self._history, after, key=lambda event: event.revision)
            return [
                event
                for event in self._history[first:]
                if event.key == key or (range_end and key <= event.key < range_end)
            ]

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call back after each write, from whoever writes, until the function that is given back is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _writes(self, each: Action) -> bool:
        if isinstance(each, PutOnce):
            return each.key not in self._kvs
        return isinstance(each, Put) or (isinstance(each, Delete) and bool(self._named(each)))

    def _named(self, each: Delete) -> list[bytes]:
        if each.range_end:
            return sorted(key for key in self._kvs if each.key <= key < each.range_end)
        return [each.key] if each.key in self._kvs else []

    def _write(self, key: bytes, kv: KeyValue | None) -> None:
        if kv is None:
            del self._kvs[key]
        else:
            self._kvs[key] = kv
        self._history.append(Event(key, kv, self._revision))

    def _as_of(self, revision: int) -> dict[bytes, KeyValue]:
        state: dict[bytes, KeyValue] = {}
        for event in self._history[: bisect_right(self._history, revision, key=lambda event: event.revision)]:
            if event.kv is None:
                state.pop(event.key, None)
            else:
                state[event.key] = event.kv
        return state

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _holds(self, compare: Compare) -> bool:
        if compare.range_end:
            named = [key for key in self._kvs if compare.key <= key < compare.range_end]
            return all(
                self._holds(Compare(key, compare.target, compare.expected, below=compare.below)) for key in named
            )
        kv = self._kvs.get(compare.key)
        if compare.below:
            return isinstance(compare.expected, int) and (kv.mod_revision if kv else 0) < compare.expected
        if compare.target == "value":
            return kv is not None and kv.value == compare.expected
        if kv is None:
            return compare.expected == 0
        return compare.expected == (kv.create_revision if compare.target == "create" else kv.mod_revision)

    def _unfenced(self, session: SessionView | None) -> bool:
        return session is None or self._holds(Compare(session.key, "mod", session.mod_revision))

    def _apply(self, actions: tuple[Action, ...], *, succeeded: bool) -> TxnReply:
        if len(actions) > _UNBATCHED:
            raise ValueError(f"{len(actions)} operations in one transaction: etcd would refuse them")
        self._revision += any(self._writes(each) for each in actions)
        return self._carry_out(actions, succeeded=succeeded)

    def _carry_out(self, actions: tuple[Action, ...], *, succeeded: bool) -> TxnReply:
        found: list[KeyValue | None] = []
        put = tuple(each.key not in self._kvs for each in actions if isinstance(each, PutOnce))
        for each in actions:
            old = self._kvs.get(each.key)
            if isinstance(each, Get):
                found.append(old)
            elif isinstance(each, Delete):
                for key in self._named(each):
                    self._write(key, None)
            elif isinstance(each, PutOnce) and old is not None:
                continue
            else:
                created = old.create_revision if old else self._revision
                lease = each.lease if isinstance(each, Put) else 0
                self._write(each.key, KeyValue(each.key, each.value, created, self._revision, lease))
        return TxnReply(succeeded, self._revision, tuple(found), put=put)
