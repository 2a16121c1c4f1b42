"""The etcd that is measured: durable as it comes, on a real disk, with room for a million keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from stepclaim.embedded import EmbeddedEtcd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

QUOTA = 8 << 30
SETTINGS = "fsync on (as it comes), one member, space quota 8 GiB, all else as it comes"


class Etcd:
    """One server with a data directory of its own. Use as a context manager."""

    def __init__(self, extra_args: Sequence[str] = ()) -> None:
        """Start nothing yet."""
        self._server = EmbeddedEtcd(extra_args=[f"--quota-backend-bytes={QUOTA}", *extra_args], startup_timeout=60)
        self.version = self._server.version

    @property
    def endpoint(self) -> str:
        """Host and port."""
        return self._server.endpoint

    @property
    def address(self) -> dict[str, Any]:
        """Give what a driver connects by."""
        host, _, port = self.endpoint.rpartition(":")
        return {"endpoint": self.endpoint, "host": host, "port": int(port)}

    @property
    def pids(self) -> list[int]:
        """The server's processes."""
        return [self._server.pid]

    def __enter__(self) -> Self:
        """Start."""
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it and remove its data; what stands in it need not be put away in order."""
        self._server.kill()
        self._server.close()
