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


def fork_error(pid: int) -> StoreClosedError:
    """Tell a forked child that the store is its parent's."""
    return StoreClosedError(
        f"this store was opened in process {pid} and came into process {os.getpid()} by fork: connections and leases "
        "can't be shared; open a store of its own in the child"
    )


def borrowed(client: Any) -> tuple[tuple[str, ...], Access]:
    """Take endpoints, TLS credentials and token from an etcd3 client."""
    endpoints = getattr(client, "endpoints", None)
    if not isinstance(endpoints, dict) or not endpoints:
        raise ConfigurationError(f"from_client takes an etcd3 client, not {type(client).__name__}: {client!r}")
    members = list(endpoints.values())
    token = dict(getattr(client, "metadata", None) or ()).get("token")
    return tuple(f"{member.host}:{member.port}" for member in members), Access(members[0].credentials, token)
