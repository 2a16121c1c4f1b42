"""The measure of all: etcd's own messages over gRPC, one transaction a claim, nothing around it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
from etcd3 import etcdrpc

from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import Tasks, Threads

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address

SECONDS = 20
TTL = 3600
VALUE = (
    b'{"v":1,"state":"held","owner":"bench","session":"bench-000000000000","attempt_id":"0123456789abcdef0123456789ab'
    b'cdef","attempt":1,"claimed_at":"2026-01-01T00:00:00.000000Z"}'
)
"""As long as stepclaim's own, and like it."""


def claim_request(key: bytes, lease: int) -> Any:
    """Make the transaction: put the key with the lease if there is none, else tell what stands there."""
    compare = etcdrpc.Compare(result=etcdrpc.Compare.EQUAL, target=etcdrpc.Compare.CREATE, key=key, create_revision=0)
    put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=VALUE, lease=lease))
    get = etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key))
    return etcdrpc.TxnRequest(compare=[compare], success=[put], failure=[get])


class Stub:
    """For threads."""

    def open(self, address: Address, callers: int) -> None:
        """Connect."""
        del callers
        self._channel = grpc.insecure_channel(address["endpoint"])
        self._txn = etcdrpc.KVStub(self._channel).Txn
        self._leases = etcdrpc.LeaseStub(self._channel)

    def begin(self, run: str) -> None:
        """Grant a lease."""
        self._prefix = f"/bare/runs/{run}/claims/"
        self._lease = self._leases.LeaseGrant(etcdrpc.LeaseGrantRequest(TTL=TTL), timeout=SECONDS).ID

    def claim(self, caller: int, step: str) -> bool:
        """Send the transaction."""
        del caller
        request = claim_request((self._prefix + step).encode(), self._lease)
        return bool(self._txn(request, timeout=SECONDS).succeeded)

    def end(self) -> None:
        """Revoke the lease, which removes the claims."""
        self._leases.LeaseRevoke(etcdrpc.LeaseRevokeRequest(ID=self._lease), timeout=SECONDS)

    def close(self) -> None:
        """Disconnect."""
        self._channel.close()


class AsyncStub:
    """For tasks."""

    async def open(self, address: Address, callers: int) -> None:
        """Connect."""
        del callers
        self._channel = grpc.aio.insecure_channel(address["endpoint"])
        self._txn = etcdrpc.KVStub(self._channel).Txn
        self._leases = etcdrpc.LeaseStub(self._channel)

    async def begin(self, run: str) -> None:
        """Grant a lease."""
        self._prefix = f"/bare/runs/{run}/claims/"
        granted = await self._leases.LeaseGrant(etcdrpc.LeaseGrantRequest(TTL=TTL), timeout=SECONDS)
        self._lease = granted.ID

    async def claim(self, caller: int, step: str) -> bool:
        """Send the transaction."""
        del caller
        request = claim_request((self._prefix + step).encode(), self._lease)
        return bool((await self._txn(request, timeout=SECONDS)).succeeded)

    async def end(self) -> None:
        """Revoke the lease, which removes the claims."""
        await self._leases.LeaseRevoke(etcdrpc.LeaseRevokeRequest(ID=self._lease), timeout=SECONDS)

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()


if __name__ == "__main__":
    serve((Threads(Stub()) if sys.argv[1] == "threads" else Tasks(AsyncStub())).commands())
