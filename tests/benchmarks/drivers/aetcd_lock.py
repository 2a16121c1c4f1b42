"""aetcd's Lock: a lease and a transaction a lock, on asyncio."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import aetcd  # type: ignore[import-not-found]

from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import Tasks

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address

TTL = 3600


class AetcdLock:
    """A step is claimed by a lock that is never released; its lease outlives the measurement."""

    async def open(self, address: Address, callers: int) -> None:
        """Connect."""
        del callers
        self._client = aetcd.Client(host=address["host"], port=address["port"])
        await self._client.connect()

    async def begin(self, run: str) -> None:
        """Note the run."""
        self._run = run

    async def claim(self, caller: int, step: str) -> bool:
        """Try the lock once."""
        del caller
        return bool(await aetcd.Lock(self._client, f"{self._run}/{step}".encode(), TTL).acquire(timeout=0))

    async def end(self) -> None:
        """Leave the locks: the server is thrown away after the case."""

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()


if __name__ == "__main__":
    serve(Tasks(AetcdLock()).commands())
