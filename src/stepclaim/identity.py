"""Small facts that every store on etcd needs: time, ids, whose process this is, and what a borrowed client knows."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from stepclaim._etcd.channel import Access
from stepclaim.errors import ConfigurationError, StoreClosedError


def utc_now() -> datetime:
    """Give the time that goes into records."""
    return datetime.now(UTC)


def new_id() -> str:
    """Give an id that no process gives twice, also after a fork."""
    return os.urandom(9).hex()


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
