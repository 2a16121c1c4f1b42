"""kazoo's Lock on ZooKeeper."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from kazoo.client import KazooClient  # type: ignore[import-not-found]

from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import Threads

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address


class KazooLock:
    """A step is claimed by a lock that is never released; it ends with the session."""

    def open(self, address: Address, callers: int) -> None:
        """Connect."""
        del callers
        logging.getLogger("kazoo").addHandler(logging.NullHandler())
        self._client = KazooClient(hosts=address["hosts"], timeout=30.0)
        self._client.start()

    def begin(self, run: str) -> None:
        """Make the run's folder."""
        self._folder = f"/bench/{run}"
        self._client.ensure_path(self._folder)

    def claim(self, caller: int, step: str) -> bool:
        """Try the lock once."""
        del caller
        return bool(self._client.Lock(f"{self._folder}/{step}").acquire(blocking=False))

    def end(self) -> None:
        """Leave the locks."""

    def close(self) -> None:
        """Disconnect."""
        self._client.stop()
        self._client.close()


if __name__ == "__main__":
    serve(Threads(KazooLock()).commands())
