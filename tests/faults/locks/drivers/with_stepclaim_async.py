"""Our own store on asyncio: `claim_step`, and `complete_step` as the write, which is the release, too."""

from __future__ import annotations

import json
from typing import Any

import etcd3

from faults.locks.drivers.stage import play
from stepclaim import AsyncEtcdRunStore, StepClaim

STEP = "step"


class AsyncStoreHolder:
    """The other face of `StoreHolder`."""

    claim: StepClaim

    async def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        own: dict[str, Any] = {} if timeout is None else {"attempt_timeout": timeout}
        self.at = host, port
        self.store = await AsyncEtcdRunStore.connect(f"{host}:{port}", lease_ttl=ttl, **own)

    def prepare(self, name: str) -> None:
        pass

    async def acquire(self, name: str) -> bool:
        claim = await self.store.claim_step(name, STEP)
        if claim is not None:
            self.claim = claim
        return claim is not None

    async def look(self) -> bool:
        return await self.store.holds(self.claim)

    async def write(self, name: str, value: str) -> None:
        assert name == self.claim.run_id
        await self.store.complete_step(self.claim, "Succeeded", output_json=json.dumps(value))

    def guarded(self, name: str, value: str) -> bool:
        """Write a key of the user's own, in a transaction with the claim's guard."""
        with etcd3.client(host=self.at[0], port=self.at[1], timeout=5) as client:
            put = client.transactions.put(f"/values/{name}", value)
            return bool(client.transaction(compare=[self.claim.guard()], success=[put], failure=[])[0])

    async def release(self) -> bool:
        return await self.store.release_claim(self.claim)

    async def close(self) -> None:
        await self.store.close()


if __name__ == "__main__":
    play(AsyncStoreHolder())
