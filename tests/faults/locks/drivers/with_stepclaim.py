"""Our own store on threads: a lock's name is a run's id, and its one step is what is claimed."""

from __future__ import annotations

import json
import sys
from typing import Any

import etcd3

from faults.locks.drivers.stage import play
from stepclaim import EtcdRunStore, StepClaim

STEP = "step"


class StoreHolder:
    """`claim_step`, and `complete_step` as the write, which is the release, too."""

    claim: StepClaim

    def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> None:
        own: dict[str, Any] = {} if timeout is None else {"attempt_timeout": timeout}
        self.at = host, port
        self.store = EtcdRunStore.connect(f"{host}:{port}", lease_ttl=ttl, **own)
        self.name = ""

    def prepare(self, name: str) -> None:
        pass

    def acquire(self, name: str) -> bool:
        self.name = name
        claim = self.store.claim_step(name, STEP)
        if claim is not None:
            self.claim = claim
        return claim is not None

    def look(self) -> bool:
        return self.store.holds(self.claim)

    def write(self, name: str, value: str) -> None:
        assert name == self.name
        self.store.complete_step(self.claim, "Succeeded", output_json=json.dumps(value))

    def guarded(self, name: str, value: str) -> bool:
        """Write a key of the user's own, in a transaction with the claim's guard."""
        with etcd3.client(host=self.at[0], port=self.at[1], timeout=5) as client:
            put = client.transactions.put(f"/values/{name}", value)
            return bool(client.transaction(compare=[self.claim.guard()], success=[put], failure=[])[0])

    def release(self) -> bool:
        return self.store.release_claim(self.claim)

    def close(self) -> None:
        self.store.close()


class EngineHolder(StoreHolder):
    """`try_claim_step`, and the published interface's records as the write."""

    def acquire(self, name: str) -> bool:
        self.name = name
        return self.store.try_claim_step(name, STEP)

    def look(self) -> bool:
        info = self.store.get_claim(self.name, STEP)
        return info is not None and info.state == "held" and info.owner == self.store.session.owner

    def write(self, name: str, value: str) -> None:
        self.store.record_step_start(name, STEP, "write")
        self.store.record_step_complete(name, STEP, "Succeeded", output_json=json.dumps(value))

    def guarded(self, name: str, value: str) -> bool:
        self.write(name, value)  # the guard is in it
        return True

    def release(self) -> bool:
        self.store.release_step_claim(self.name, STEP)
        return True


class BesideHolder(StoreHolder):
    """`claim_step`, and a plain put of a key of the user's own, beside the store and unguarded."""

    def write(self, name: str, value: str) -> None:
        with etcd3.client(host=self.at[0], port=self.at[1], timeout=5) as client:
            client.put(f"/values/{name}", value)


if __name__ == "__main__":
    play({"store": StoreHolder, "engine": EngineHolder, "beside": BesideHolder}[sys.argv[1]]())
