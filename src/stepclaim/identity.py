"""Small facts that every store needs: time, ids, whose process this is, and what a borrowed client knows."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from stepclaim._core.context import Context
from stepclaim._core.keys import Keyspace
from stepclaim._etcd.channel import Access
from stepclaim.errors import ConfigurationError, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim.settings import Settings


def context_of(settings: Settings) -> Context:
    """Give a store what all its programs share."""
    return Context(
        Keyspace(settings.prefix),
        settings.owner_name,
        value_limit=settings.value_limit,
        now=partial(datetime.now, UTC),
        new_id=_id_source(),
        lock=threading.Lock(),
    )


def _id_source() -> Callable[[], str]:
    """Give what makes ids that nobody else makes: a random part of its own, and a number."""
    own, numbers = os.urandom(9).hex(), count()
    return lambda: f"{own}{next(numbers):x}"


def seconds(timeout: float) -> float:
    """Check a time-out."""
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise ConfigurationError(f"timeout must be a number of seconds above 0, not {timeout!r}")
    return float(timeout)


def cut(text: str, limit: int) -> str:
    """Keep a traceback's end, which says most, within the limit of a field."""
    kept = text.encode(errors="backslashreplace")
    return (kept if len(kept) <= limit else "…".encode() + kept[3 - limit :]).decode(errors="ignore")


def fork_error(pid: int) -> StoreClosedError:
    """Tell a forked child that the store is its parent's."""
    return StoreClosedError(
        f"this store was opened in process {pid} and came into process {os.getpid()} by fork: connections and leases "
        "can't be shared; open a store of its own in the child"
    )


def borrowed(client: Any) -> tuple[tuple[str, ...], Access]:
    """Take endpoints, TLS credentials and token from an etcd3 client."""
    endpoints = getattr(client, "endpoints", None)
    members = list(endpoints.values()) if isinstance(endpoints, dict) else []
    if not members or not all(hasattr(member, "netloc") and hasattr(member, "credentials") for member in members):
        raise ConfigurationError(
            f"from_client takes an etcd3 client, not {type(client).__name__}: "
            "make one by etcd3.client(...), or use connect"
        )
    token = dict(getattr(client, "metadata", None) or ()).get("token")
    return tuple(_address(member) for member in members), Access(members[0].credentials, token)


def _address(member: Any) -> str:
    """Give host:port, with the brackets around an IPv6 address that etcd3 leaves away."""
    host, _, port = member.netloc.rpartition(":")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
