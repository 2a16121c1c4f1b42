"""etcd3gw's Lock: a lease and a transaction a lock, over etcd's HTTP gateway."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import etcd3gw  # type: ignore[import-not-found]

from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import Threads

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address

TTL = 3600


class Etcd3gwLock:
    """A step is claimed by a lock that is never released. A client, and with it a connection, for each thread."""

    def open(self, address: Address, callers: int) -> None:
        """Note where etcd is."""
        del callers
        self._address = address
        self._own = threading.local()

    def begin(self, run: str) -> None:
        """Note the run."""
        self._run = run

    def claim(self, caller: int, step: str) -> bool:
        """Try the lock once."""
        del caller
        client = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = etcd3gw.client(host=self._address["host"], port=self._address["port"])
        return bool(client.lock(f"{self._run}/{step}", ttl=TTL).acquire())

    def end(self) -> None:
        """Leave the locks: the server is thrown away after the case."""

    def close(self) -> None:
        """Nothing is left but what the threads had."""


if __name__ == "__main__":
    serve(Threads(Etcd3gwLock()).commands())
