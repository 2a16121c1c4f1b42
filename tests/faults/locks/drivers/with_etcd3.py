"""python-etcd3's `Lock`."""

from __future__ import annotations

from typing import Any

import etcd3

from faults.locks.drivers.stage import play


class Etcd3Holder:
    """A plain client with one endpoint."""

    name = ""
    lock: Any = None

    def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        self.ttl = ttl
        self.client = etcd3.client(host=host, port=port, timeout=timeout)

    def prepare(self, name: str) -> None:
        pass

    def acquire(self, name: str) -> bool:
        if name != self.name:
            self.name, self.lock = name, self.client.lock(name, ttl=self.ttl)
        return bool(self.lock.acquire(timeout=0))

    def look(self) -> bool:
        return bool(self.lock.is_acquired())

    def write(self, name: str, value: str) -> None:
        self.client.put(f"/values/{name}", value)

    def guarded(self, name: str, value: str) -> bool:
        make = self.client.transactions
        mine = make.value(self.lock.key) == self.lock.uuid
        done, _ = self.client.transaction(compare=[mine], success=[make.put(f"/values/{name}", value)], failure=[])
        return bool(done)

    def release(self) -> bool:
        return bool(self.lock.release())

    def close(self) -> None:
        self.client.close()


if __name__ == "__main__":
    play(Etcd3Holder())
