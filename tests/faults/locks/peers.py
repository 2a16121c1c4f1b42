"""Who is compared, in which version, and how each is configured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from faults.locks.wire import Http, Jute, Resp

if TYPE_CHECKING:
    from faults.locks.wire import Wire

TTL = 2
"""Seconds that every lock lives without its holder: etcd grants no less with an election time-out of 1 s."""
PATIENCE = 1.0
"""Seconds after which a careful caller's client gives up a silent connection."""


@dataclass(frozen=True)
class Peer:
    """One lock. `shipped` says what the library does on silence by itself, where that is not what it is told here."""

    name: str
    title: str
    pins: tuple[str, ...]
    driver: tuple[str, ...]
    server: str
    configured: str
    shipped: str = ""
    wire: Wire | None = None
    """None is gRPC."""
    write_releases: bool = False
    """The write is the release, too."""
    late_only: bool = False
    """Only the second table has it."""


_GRPC = ("grpcio==1.85.1", "protobuf==7.36.2")
_TRY = "tried once, without waiting"

PEERS = (
    Peer(
        "etcd3",
        "python-etcd3 Lock",
        ("cslab-etcd3==0.12.1", *_GRPC),
        ("with_etcd3",),
        "etcd",
        f"`etcd3.client(timeout={PATIENCE:g})`, `lock(name, ttl={TTL})`, `acquire(timeout=0)`: {_TRY}",
        "`timeout=None`",
    ),
    Peer(
        "aetcd",
        "aetcd Lock",
        ("aetcd==1.0.0", *_GRPC),
        ("with_aetcd",),
        "etcd",
        f"`aetcd.Client(timeout={PATIENCE:g})`, `lock(key, ttl={TTL})`, `acquire(timeout=0)`: {_TRY}",
        "`timeout=None`",
    ),
    Peer(
        "etcd3gw",
        "etcd3gw Lock",
        ("etcd3gw==2.7.0", "requests==2.34.2", "urllib3==2.8.0"),
        ("with_etcd3gw",),
        "etcd",
        f"`Etcd3Client(timeout={PATIENCE:g})`, `lock(id, ttl={TTL})`, `acquire()`, which never waits",
        "`timeout=None`",
        Http(),
    ),
    Peer(
        "redis",
        "redis-py Lock",
        ("redis==8.1.0",),
        ("with_redis",),
        "redis",
        f"`Redis(socket_timeout={PATIENCE:g}, socket_connect_timeout={PATIENCE:g})` with its own retries (10), "
        f"`lock(name, timeout={TTL})`, `acquire(blocking=False)`",
        "`socket_timeout` of 5 s",
        Resp(),
    ),
    Peer(
        "kazoo",
        "kazoo Lock",
        ("kazoo==2.11.0",),
        ("with_kazoo",),
        "zookeeper",
        f"`KazooClient(timeout={TTL})`, which is the session's length and the lock's TTL; "
        "`Lock(path).acquire(blocking=False)`; writes by `client.set`",
        "a session of 10 s",
        Jute(),
    ),
    Peer(
        "kazoo-retry",
        "kazoo Lock, retry",
        ("kazoo==2.11.0",),
        ("with_kazoo", "retry"),
        "zookeeper",
        "as before, but writes by `client.retry(client.set, ...)`, as kazoo's manual has it for lost connections",
        late_only=True,
    ),
    Peer(
        "stepclaim",
        "stepclaim, threads",
        (),
        ("with_stepclaim", "store"),
        "etcd",
        f"`EtcdRunStore.connect(lease_ttl={TTL})`, `claim_step` and `complete_step`; time-outs as they are",
        write_releases=True,
    ),
    Peer(
        "stepclaim-try",
        "stepclaim, engine",
        (),
        ("with_stepclaim", "engine"),
        "etcd",
        f"`EtcdRunStore.connect(lease_ttl={TTL})`, `try_claim_step`, `record_step_start`, `record_step_complete`",
        write_releases=True,
    ),
    Peer(
        "stepclaim-async",
        "stepclaim, asyncio",
        (),
        ("with_stepclaim_async",),
        "etcd",
        f"`AsyncEtcdRunStore.connect(lease_ttl={TTL})`, `claim_step` and `complete_step`; time-outs as they are",
        write_releases=True,
    ),
    Peer(
        "stepclaim-beside",
        "stepclaim, put beside",
        (),
        ("with_stepclaim", "beside"),
        "etcd",
        "as the first, but what is protected is a key of the user's own, written by a plain put beside the store",
        late_only=True,
    ),
)
