"""A peer's whole turn: its environment, its server, every life, every stop."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from faults.locks import backends, stopping
from faults.locks.environments import CannotRunError, environment
from faults.locks.replies import Life, Replies

if TYPE_CHECKING:
    from collections.abc import Callable

    from faults.locks.peers import Peer


@dataclass
class Turn:
    """What was seen of a peer, or why it could not run."""

    peer: Peer
    server: str = ""
    missing: str = ""
    lives: list[Life] = field(default_factory=list)
    stops: list[stopping.Late] = field(default_factory=list)


def play(peer: Peer, tell: Callable[[str], None]) -> Turn:
    """Play all of it; the server and every process that was started end with it."""
    turn = Turn(peer)
    with tempfile.TemporaryDirectory(prefix=f"stepclaim-locks-{peer.name}-") as folder:
        try:
            _play(turn, Path(folder), lambda what: tell(f"{peer.title}: {what}"))
        except (CannotRunError, AssertionError) as why:
            turn.missing = str(why)
    return turn


def _play(turn: Turn, folder: Path, tell: Callable[[str], None]) -> None:
    peer, python = turn.peer, environment(turn.peer.pins)
    with _server(peer, folder, python) as backend, (folder / "callers.log").open("ab") as log:
        turn.server = backend.version
        if not peer.late_only:
            with contextlib.closing(Replies(peer, backend, python, log)) as replies:
                for life in replies.all():
                    turn.lives.append(life)
                    what = "nothing" if life.reply is None else f"{life.reply.method} of {life.reply.phase}"
                    tell(f"{what} dropped" + (f" by {life.how}" if life.how else ""))
        for late in stopping.all_ways(peer, backend, python, log):
            turn.stops.append(late)
            tell(f"the holder: {late.way}")


def _server(peer: Peer, folder: Path, python: Path) -> contextlib.AbstractContextManager[backends.Backend]:
    if peer.server == "redis":
        return backends.run_redis(folder)
    if peer.server == "zookeeper":
        return backends.run_zookeeper(folder, python)
    return backends.run_etcd()
