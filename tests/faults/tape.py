"""A tape of what etcd recorded: a watch on each member from the first revision on, which survives any fault.

Each member is watched past all links and by itself, and what they tell is put together: as long as one watch is
without a gap nothing is missing, whatever is compacted, killed or stopped meanwhile. Every value's version says
whether the one before it is there.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from etcd3 import etcdrpc

from faults.cluster import PREFIX, Admin, Cluster, Member
from faults.history import Fact
from servers import eventually

_FIRST = PREFIX.encode()
_END = _FIRST[:-1] + bytes((_FIRST[-1] + 1,))
_LAST = f"{PREFIX}-end".encode()


class Tape:
    """A context manager; records until `finish`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._facts: dict[tuple[int, str], Fact] = {}
        self._versions: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._calls: dict[str, Any] = {}
        self._threads = [threading.Thread(target=self._follow, args=(each,), daemon=True) for each in cluster.members]
        self.seen = dict.fromkeys((each.name for each in cluster.members), 0)
        """The last revision that each watch has told."""
        self.gaps: dict[str, list[tuple[int, int]]] = {}
        """What each watch missed, by compaction."""

    def __enter__(self) -> Self:
        """Start to watch."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._stopped.set()
        while any(thread.is_alive() for thread in self._threads):
            for call in list(self._calls.values()):
                call.cancel()
            for thread in self._threads:
                thread.join(0.2)

    @property
    def safe(self) -> int:
        """A revision up to which a compaction hides nothing."""
        return max((at for name, at in self.seen.items() if name not in self.gaps), default=0)

    def standing(self) -> dict[str, Fact]:
        """Give each key's last value, as told so far."""
        with self._lock:
            facts = sorted(self._facts.values(), key=lambda fact: fact.revision)
        return {key: fact for key, fact in {fact.key: fact for fact in facts}.items() if fact.value is not None}

    def finish(self, timeout: float = 20.0) -> list[Fact]:
        """Mark the end, wait until it was told, check that nothing is missing, and give all facts in order.

        AssertionError where something is.
        """

        def mark(admin: Admin) -> Any:
            return admin.call(etcdrpc.KVStub, "Put", etcdrpc.PutRequest(key=_LAST, value=b"end"))

        end = self._cluster.anyone(mark).header.revision
        eventually(lambda: self.safe >= end, timeout)

        def read(admin: Admin) -> Any:
            request = etcdrpc.RangeRequest(key=_FIRST, range_end=_END, revision=end, keys_only=True)
            return admin.call(etcdrpc.KVStub, "Range", request, timeout=10)

        standing = {kv.key.decode(): kv.mod_revision for kv in self._cluster.anyone(read).kvs}
        with self._lock:
            facts = sorted(self._facts.values(), key=lambda fact: (fact.revision, fact.key))
            versions = dict(self._versions)
        facts = [fact for fact in facts if fact.revision <= end]
        _check(facts, versions, standing)
        return [fact for fact in facts if fact.key != _LAST.decode()]

    def _follow(self, member: Member) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(grpc.RpcError):
                self._stream(member)
            self._stopped.wait(0.1)

    def _stream(self, member: Member) -> None:
        start = self.seen[member.name] + 1
        create = etcdrpc.WatchCreateRequest(key=_FIRST, range_end=_END, start_revision=start)
        request = etcdrpc.WatchRequest(create_request=create)
        with member.admin.channel() as channel:
            stub = etcdrpc.WatchStub(channel)
            call = stub.Watch(self._asked(request), metadata=member.admin.metadata(channel))
            self._calls[member.name] = call
            try:
                for answer in call:
                    if answer.compact_revision:
                        self.gaps.setdefault(member.name, []).append((start, answer.compact_revision))
                        self.seen[member.name] = answer.compact_revision - 1
                    if answer.canceled:
                        return
                    self._take(member.name, answer)
            finally:
                call.cancel()

    def _asked(self, request: Any) -> Iterator[Any]:
        yield request
        self._stopped.wait()  # an end of what is asked would end the stream

    def _take(self, name: str, answer: Any) -> None:
        now = time.monotonic_ns()
        with self._lock:
            for each in answer.events:
                kv = each.kv
                at = kv.mod_revision, kv.key.decode()
                if at not in self._facts:
                    gone = each.type == each.DELETE
                    value = None if gone else kv.value.decode(errors="backslashreplace")
                    self._facts[at] = Fact(*at, value, kv.create_revision, kv.lease, seen=now)
                    self._versions[at] = kv.version
            if answer.events:
                self.seen[name] = max(self.seen[name], answer.events[-1].kv.mod_revision)


def _check(facts: list[Fact], versions: dict[tuple[int, str], int], standing: dict[str, int]) -> None:
    """Make sure that each value follows on the one before it, and that what stands is the last that was told."""
    last: dict[str, Fact] = {}
    for fact in facts:
        before = last.get(fact.key)
        alive = before is not None and before.value is not None
        if fact.value is None:
            assert alive, f"a watch told of no value before the deletion of {fact.key} at {fact.revision}"
        else:
            version = versions[fact.revision, fact.key]
            expected = versions[before.revision, before.key] + 1 if before is not None and alive else 1
            assert version == expected, (
                f"{fact.key} at {fact.revision} has version {version}, not {expected}: an event is missing"
            )
        last[fact.key] = fact
    told = {key: fact.revision for key, fact in last.items() if fact.value is not None}
    assert told == standing, f"what stands is not what was told last: {sorted(told.items() ^ standing.items())[:6]}"
