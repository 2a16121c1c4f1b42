"""redis-py's `Lock`."""

from __future__ import annotations

from typing import Any

import redis  # type: ignore[import-not-found]

from faults.locks.drivers.stage import play

_GUARDED = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('set', KEYS[2], ARGV[2])
return 1
"""


class RedisHolder:
    """A plain client with the retries that it comes with."""

    name = ""
    lock: Any = None

    def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        self.ttl = ttl
        careful: dict[str, Any] = {}
        if timeout is not None:
            careful = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        self.client = redis.Redis(host=host, port=port, **careful)

    def prepare(self, name: str) -> None:
        pass

    def acquire(self, name: str) -> bool:
        if name != self.name:
            self.name, self.lock = name, self.client.lock(f"locks:{name}", timeout=self.ttl)
        return bool(self.lock.acquire(blocking=False))

    def look(self) -> bool:
        return bool(self.lock.owned())

    def write(self, name: str, value: str) -> None:
        self.client.set(f"values:{name}", value)

    def guarded(self, name: str, value: str) -> bool:
        token = self.lock.local.token
        return bool(self.client.eval(_GUARDED, 2, f"locks:{name}", f"values:{name}", token, value))

    def release(self) -> bool:
        self.lock.release()  # raises LockNotOwnedError if it is not this holder's
        return True

    def close(self) -> None:
        self.client.close()


if __name__ == "__main__":
    play(RedisHolder())
