"""redis-py's Lock, for threads and for asyncio; and the command beneath it, SET NX PX, pipelined."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import redis  # type: ignore[import-not-found]
import redis.asyncio  # type: ignore[import-not-found]

from benchmarks.drivers.serving import serve
from benchmarks.drivers.sharing import Sharing
from benchmarks.drivers.slices import Tasks, Threads

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address

TTL = 3600.0


class RedisLock:
    """For threads: a step is claimed by a lock that is never released."""

    def open(self, address: Address, callers: int) -> None:
        """Make a pool of connections, one a caller."""
        self._client = redis.Redis(host=address["host"], port=address["port"], max_connections=callers + 1)

    def begin(self, run: str) -> None:
        """Note the run."""
        self._run = run

    def claim(self, caller: int, step: str) -> bool:
        """Try the lock once."""
        del caller
        return bool(self._client.lock(f"{self._run}/{step}", timeout=TTL).acquire(blocking=False))

    def end(self) -> None:
        """Leave the locks."""

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


class AsyncRedisLock:
    """For tasks."""

    async def open(self, address: Address, callers: int) -> None:
        """Make a pool of connections, one a caller."""
        self._client = redis.asyncio.Redis(host=address["host"], port=address["port"], max_connections=callers + 1)

    async def begin(self, run: str) -> None:
        """Note the run."""
        self._run = run

    async def claim(self, caller: int, step: str) -> bool:
        """Try the lock once."""
        del caller
        return bool(await self._client.lock(f"{self._run}/{step}", timeout=TTL).acquire(blocking=False))

    async def end(self) -> None:
        """Leave the locks."""

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()


class RedisPipelined(AsyncRedisLock):
    """What Lock sends to claim, sent for all callers together; no Lock can be had that way."""

    async def begin(self, run: str) -> None:
        """Note the run."""
        self._run = run
        self._sharing = Sharing(self._send)

    async def claim(self, caller: int, step: str) -> bool:
        """Claim with whoever waits."""
        del caller
        return await self._sharing.call(step)

    async def _send(self, steps: list[str]) -> list[bool]:
        pipeline = self._client.pipeline(transaction=False)
        for step in steps:
            pipeline.set(f"{self._run}/{step}", "0123456789abcdef0123456789abcdef", nx=True, px=int(TTL * 1000))
        return [bool(answer) for answer in await pipeline.execute()]


if __name__ == "__main__":
    way = sys.argv[1]
    if way == "threads":
        serve(Threads(RedisLock()).commands())
    else:
        serve(Tasks(RedisPipelined() if way == "pipelined" else AsyncRedisLock()).commands())
