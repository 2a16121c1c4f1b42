"""Who else takes part, and the environments that they are installed in, each by pinned versions."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_GRPC = ("grpcio==1.85.1", "protobuf==7.36.2")


@dataclass(frozen=True)
class Peer:
    """A participant with a client of its own."""

    name: str
    title: str
    backend: str
    script: str
    arguments: tuple[str, ...]
    packages: tuple[str, ...]
    """Their pinned versions; peers with the same ones share an environment."""
    one: bool = True
    """Whether it takes part where there is one caller."""
    many: bool = True
    """Whether it takes part where there are many."""


_REDIS = ("redis[hiredis]==8.1.0",)
_PSYCOPG = ("psycopg[binary]==3.3.9",)

PEERS = (
    Peer("etcd3_lock", "python-etcd3's Lock, threads", "etcd", "etcd3_lock", (), ("cslab-etcd3==0.12.1", *_GRPC)),
    Peer("aetcd_lock", "aetcd's Lock, asyncio", "etcd", "aetcd_lock", (), ("aetcd==1.0.0", *_GRPC)),
    Peer("etcd3gw_lock", "etcd3gw's Lock, threads", "etcd", "etcd3gw_lock", (), ("etcd3gw==2.7.0",)),
    Peer("kazoo_lock", "kazoo's Lock, threads", "zookeeper", "kazoo_lock", (), ("kazoo==2.11.0",)),
    Peer("redis_lock", "redis-py's Lock", "redis", "redis_lock", ("threads",), _REDIS, many=False),
    Peer("redis_lock", "redis-py's Lock", "redis", "redis_lock", ("tasks",), _REDIS, one=False),
    Peer("redis_pipelined", "redis-py's SET NX, pipelined", "redis", "redis_lock", ("pipelined",), _REDIS, one=False),
    Peer("postgres", "PostgreSQL, upstream's INSERT, threads", "postgres", "postgres", ("threads",), _PSYCOPG),
    Peer(
        "postgres_pipelined", "PostgreSQL, INSERTs pipelined, asyncio", "postgres", "postgres", ("tasks",), _PSYCOPG,
        one=False,
    ),
)  # fmt: skip


def environments() -> Path:
    """Tell where they are kept."""
    return Path.home() / ".cache" / "stepclaim-tests" / "peers"


def python_of(peer: Peer, tell: Callable[[str], None]) -> str:
    """Give the interpreter that has a peer's client; install it first where it is not there.

    Raises subprocess.CalledProcessError with pip's output if that fails.
    """
    wanted = "\n".join(peer.packages)
    mark = hashlib.sha256(f"{sys.version}\n{wanted}".encode()).hexdigest()[:8]
    folder = environments() / f"bench-{peer.script.partition('_')[0]}-{mark}"
    done = folder / "installed"
    environments().mkdir(parents=True, exist_ok=True)
    with (environments() / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be at it
        if not done.exists():
            tell(f"installing {', '.join(peer.packages)}")
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            subprocess.run([*pip, *peer.packages], check=True, capture_output=True, text=True, timeout=600, env=quiet)
            done.write_text(wanted + "\n", encoding="utf-8")
    return str(folder / "bin" / "python")
