"""etcd3gw's `Lock`, by etcd's JSON gateway."""

from __future__ import annotations

import base64
from typing import Any

from etcd3gw.client import Etcd3Client  # type: ignore[import-not-found]

from faults.locks.drivers.stage import play


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Etcd3gwHolder:
    """A plain client."""

    name = ""
    lock: Any = None

    def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        self.ttl = ttl
        self.client = Etcd3Client(host=host, port=port, timeout=timeout)

    def prepare(self, name: str) -> None:
        pass

    def acquire(self, name: str) -> bool:
        if name != self.name:
            self.name, self.lock = name, self.client.lock(name, ttl=self.ttl)
        return bool(self.lock.acquire())

    def look(self) -> bool:
        return bool(self.lock.is_acquired())

    def write(self, name: str, value: str) -> None:
        self.client.put(f"/values/{name}", value)

    def guarded(self, name: str, value: str) -> bool:
        key, mine = _encode(self.lock.key), _encode(self.lock.uuid)
        put = {"request_put": {"key": _encode(f"/values/{name}"), "value": _encode(value)}}
        compare = {"key": key, "result": "EQUAL", "target": "VALUE", "value": mine}
        return bool(self.client.transaction({"compare": [compare], "success": [put]}).get("succeeded", False))

    def release(self) -> bool:
        return bool(self.lock.release())

    def close(self) -> None:
        self.client.session.close()


if __name__ == "__main__":
    play(Etcd3gwHolder())
