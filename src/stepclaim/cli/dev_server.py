"""An embedded etcd that stays until it is told to go, and how to reach it."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

from stepclaim.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim.embedded import EmbeddedEtcd


def etcdctl(server: EmbeddedEtcd) -> str:
    """Name the etcdctl that belongs to a server, with its endpoint, ready to be pasted."""
    beside = server.binary.with_name("etcdctl")
    return f"{beside if beside.exists() else 'etcdctl'} --endpoints={server.endpoint}"


def lines(server: EmbeddedEtcd) -> list[str]:
    """Tell how to reach the server."""
    return [
        f"etcd {server.version} is ready on {server.endpoint}, its data in {server.data_dir}",
        "",
        "# point workers and stepclaim's commands at it",
        f"export STEPCLAIM_ENDPOINTS={server.endpoint}",
        "# look at the keys",
        f"{etcdctl(server)} get --prefix /stepclaim/",
        "",
        "Ctrl-C ends it.",
    ]


def stay(server: EmbeddedEtcd, tell: Callable[[str], None]) -> None:
    """Wait for Ctrl-C or SIGTERM; raises `UnavailableError` if the server ends before."""
    ended = threading.Event()
    before = {name: signal.signal(name, lambda *_: ended.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    tell(f"etcd stays on {server.endpoint} until Ctrl-C")
    try:
        while not ended.wait(1.0):
            # looks without collecting the process, which the server itself will want to do
            if os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                raise UnavailableError(f"etcd ended by itself; the end of its log:\n{server.log_tail(5)}")
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
