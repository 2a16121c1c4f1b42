"""python-etcd3's Lock: a lease and a transaction a lock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import etcd3

from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import Threads

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address

TTL = 3600


class Etcd3Lock:
    """A step is claimed by a lock that is never released; its lease outlives the measurement."""

    def open(self, address: Address, callers: int) -> None:
        """Connect."""
        del callers
        self._client = etcd3.client(host=address["host"], port=address["port"])

    def begin(self, run: str) -> None:
        """Note the run."""
        self._run = run

    def claim(self, caller: int, step: str) -> bool:
        """Try the lock once."""
        del caller
        return bool(self._client.lock(f"{self._run}/{step}", ttl=TTL).acquire(timeout=0))

    def end(self) -> None:
        """Leave the locks: the server is thrown away after the case."""

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


if __name__ == "__main__":
    serve(Threads(Etcd3Lock()).commands())
