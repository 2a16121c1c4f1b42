"""aetcd's `Lock`, on asyncio."""

from __future__ import annotations

from typing import Any

import aetcd  # type: ignore[import-not-found]

from faults.locks.drivers.stage import play


class AetcdHolder:
    """A plain client."""

    name = ""
    lock: Any = None

    async def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        self.ttl = ttl
        self.client = aetcd.Client(host=host, port=port, timeout=timeout)
        await self.client.connect()

    def prepare(self, name: str) -> None:
        pass

    async def acquire(self, name: str) -> bool:
        if name != self.name:
            self.name, self.lock = name, self.client.lock(f"/locks/{name}".encode(), ttl=self.ttl)
        return bool(await self.lock.acquire(timeout=0))

    async def look(self) -> bool:
        return bool(await self.lock.is_acquired())

    async def write(self, name: str, value: str) -> None:
        await self.client.put(f"/values/{name}".encode(), value.encode())

    async def guarded(self, name: str, value: str) -> bool:
        make = self.client.transactions
        put = make.put(f"/values/{name}".encode(), value.encode())
        mine = make.value(self.lock.key) == self.lock.uuid
        done, _ = await self.client.transaction(compare=[mine], success=[put], failure=[])
        return bool(done)

    async def release(self) -> bool:
        return bool(await self.lock.release())

    async def close(self) -> None:
        await self.client.close()


if __name__ == "__main__":
    play(AetcdHolder())
