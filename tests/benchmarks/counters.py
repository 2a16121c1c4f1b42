"""What an etcd counts itself: calls, raft's entries, revisions, bytes."""

from __future__ import annotations

import contextlib
import http.client
import re
from dataclasses import dataclass, fields

_LINE = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)
_CALLS = "grpc_server_handled_total"


@dataclass(frozen=True)
class Counters:
    """Totals since the server's start; the difference of two is what went on between them."""

    rpcs: float = 0.0
    """Calls of the key-value and lease services that were answered."""
    txns: float = 0.0
    """Those of them that were transactions."""
    reads: float = 0.0
    """Those of them that were ranges."""
    entries: float = 0.0
    """Raft's entries that were applied: every transaction that may write is one, and one write to the disk's log."""
    revisions: float = 0.0
    """Transactions that did write."""
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    """To and from clients."""

    def __sub__(self, before: Counters) -> Counters:
        """Give what was counted since."""
        return Counters(**{each.name: getattr(self, each.name) - getattr(before, each.name) for each in fields(self)})


def read_counters(endpoint: str) -> Counters:
    """Ask a member; the revision is that of its own store, so that it must have applied all that is asked about."""
    with contextlib.closing(http.client.HTTPConnection(endpoint, timeout=10)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    totals: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        if name == _CALLS and 'grpc_type="unary"' in labels and re.search(r'"etcdserverpb\.(KV|Lease)"', labels):
            method = re.search(r'grpc_method="(\w+)"', labels)
            keys = ["rpcs", method[1] if method else ""]
        else:
            keys = [name]
        for key in keys:
            totals[key] = totals.get(key, 0.0) + float(value)
    return Counters(
        rpcs=totals.get("rpcs", 0.0),
        txns=totals.get("Txn", 0.0),
        reads=totals.get("Range", 0.0),
        entries=totals.get("etcd_server_proposals_applied_total", 0.0),
        revisions=totals.get("etcd_debugging_mvcc_current_revision", 0.0),
        bytes_in=totals.get("etcd_network_client_grpc_received_bytes_total", 0.0),
        bytes_out=totals.get("etcd_network_client_grpc_sent_bytes_total", 0.0),
    )
