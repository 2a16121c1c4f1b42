"""kazoo's `Lock`; also reads for the judge what ZooKeeper holds."""

from __future__ import annotations

import sys
from typing import Any

from kazoo.client import KazooClient, KazooState  # type: ignore[import-not-found]

from faults.locks.drivers.stage import play


class KazooHolder:
    """A client whose session is the lock's TTL; by itself kazoo asks for one of 10 s."""

    name = ""
    lock: Any = None

    def __init__(self, *, retries: bool) -> None:
        self.retries = retries

    def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        hosts = f"{host}:{port}"
        self.client = KazooClient(hosts) if timeout is None else KazooClient(hosts, timeout=float(ttl))
        self.told_lost = False
        self.client.add_listener(self._hear)
        self.client.start()

    def _hear(self, state: str) -> None:
        self.told_lost |= state == KazooState.LOST  # as kazoo's manual tells a lock's user to listen

    def prepare(self, name: str) -> None:
        self.client.ensure_path(f"/values/{name}")

    def acquire(self, name: str) -> bool:
        if name != self.name:
            self.name, self.lock = name, self.client.Lock(f"/locks/{name}")
            self.told_lost = False
        return bool(self.lock.acquire(blocking=False))

    def look(self) -> bool:
        return bool(self.lock.is_acquired and self.client.connected and not self.told_lost)

    def write(self, name: str, value: str) -> None:
        path, data = f"/values/{name}", value.encode()
        if self.retries:
            self.client.retry(self.client.set, path, data)
        else:
            self.client.set(path, data)

    def guarded(self, name: str, value: str) -> bool:
        together = self.client.transaction()
        together.check(f"{self.lock.path}/{self.lock.node}", 0)
        together.set_data(f"/values/{name}", value.encode())
        return not any(isinstance(each, Exception) for each in together.commit())

    def release(self) -> bool:
        return bool(self.lock.release())

    def close(self) -> None:
        self.client.stop()
        self.client.close()

    def children(self, name: str) -> list[str]:
        path = f"/locks/{name}"
        found = self.client.get_children(path) if self.client.exists(path) else []
        return sorted(found, key=lambda child: str(child)[-10:])

    def read(self, name: str) -> str:
        data, _ = self.client.get(f"/values/{name}")
        return str(data.decode())


if __name__ == "__main__":
    play(KazooHolder(retries=sys.argv[1:] == ["retry"]))
