"""When each revision was: linearizable reads past all links, all the time.

What an answer's revision covers was there when it came, and what it does not cover was not there when it was asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Self

import grpc
from etcd3 import etcdrpc

from faults.history import Reading

if TYPE_CHECKING:
    from types import TracebackType

    from faults.cluster import Cluster, Member

_EVERY = 0.025
_REQUEST = etcdrpc.RangeRequest(key=b"\0", limit=1, keys_only=True)


class Readings:
    """A context manager; reads until it ends, from one member as long as that answers."""

    def __init__(self, cluster: Cluster) -> None:
        self._members = itertools.cycle(cluster.members)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.taken: list[Reading] = []

    def __enter__(self) -> Self:
        """Start to read."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._ended.set()
        self._thread.join(10)

    def _read(self) -> None:
        for member in self._members:
            with contextlib.suppress(grpc.RpcError):
                self._from(member)
            if self._ended.wait(_EVERY):
                return

    def _from(self, member: Member) -> None:
        with member.admin.channel() as channel:
            metadata = member.admin.metadata(channel)
            read = etcdrpc.KVStub(channel).Range
            while not self._ended.is_set():
                asked = time.monotonic_ns()
                revision = read(_REQUEST, timeout=1, metadata=metadata).header.revision
                self.taken.append(Reading(asked, time.monotonic_ns(), revision))
                self._ended.wait(_EVERY)
