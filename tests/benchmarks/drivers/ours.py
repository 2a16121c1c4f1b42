"""stepclaim itself, by its public names: `try_claim_step`, `claim_step`, or a whole step with its completion."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.drivers.cpu import resident_bytes
from benchmarks.drivers.profiling import profiled
from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import Tasks, Threads, WrongAnswerError, checked
from stepclaim import AsyncEtcdRunStore, EtcdRunStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.drivers.slices import Address

TTL = 600.0
SECONDS = 100.0
PREFIX = "/bench"


class Ours:
    """For threads. `what` is try_claim, claim or whole."""

    def __init__(self, what: str) -> None:
        self._what = what

    def open(self, address: Address, callers: int) -> None:
        """Note where etcd is; each slice has a store of its own."""
        del callers
        self._endpoint = address["endpoint"]

    def begin(self, run: str) -> None:
        """Open a store."""
        self._run = run
        self._store = EtcdRunStore.connect(self._endpoint, prefix=PREFIX, lease_ttl=TTL, timeout=SECONDS)

    def claim(self, caller: int, step: str) -> bool:
        """Claim by one of the ways."""
        del caller
        if self._what == "try_claim":
            return self._store.try_claim_step(self._run, step)
        claim = self._store.claim_step(self._run, step)
        if claim is not None and self._what == "whole":
            self._store.complete_step(claim, "Succeeded", output_json='{"sent": true}')
        return claim is not None

    def end(self) -> None:
        """Close the store, which removes the claims that are held."""
        self._store.close()

    def close(self) -> None:
        """Nothing is left."""


class AsyncOurs:
    """For tasks. `what` is try_claim, claim or whole."""

    def __init__(self, what: str) -> None:
        self._what = what

    async def open(self, address: Address, callers: int) -> None:
        """Note where etcd is; each slice has a store of its own."""
        del callers
        self._endpoint = address["endpoint"]

    async def begin(self, run: str) -> None:
        """Open a store."""
        self._run = run
        self.store = await AsyncEtcdRunStore.connect(self._endpoint, prefix=PREFIX, lease_ttl=TTL, timeout=SECONDS)

    async def claim(self, caller: int, step: str) -> bool:
        """Claim by one of the ways."""
        del caller
        if self._what == "try_claim":
            return await self.store.try_claim_step(self._run, step)
        claim = await self.store.claim_step(self._run, step)
        if claim is not None and self._what == "whole":
            await self.store.complete_step(claim, "Succeeded", output_json='{"sent": true}')
        return claim is not None

    async def end(self) -> None:
        """Close the store, which removes the claims that are held."""
        await self.store.close()

    async def close(self) -> None:
        """Nothing is left."""


class Many:
    """What is asked for many steps in one call, and what holding many costs."""

    def __init__(self, claimer: AsyncOurs, tasks: Tasks) -> None:
        self._claimer = claimer
        self._tasks = tasks

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Give what can be asked for beside slices."""
        return {"claim_steps": self._claim_steps, "held": self._held, "profile": self._profile}

    def _profile(self, run: str, callers: int, count: int, seconds: float) -> list[tuple[float, str]]:
        """Profile a slice with so many callers, or with none of them `claim_steps`."""
        if callers:
            slice_of = self._tasks.commands()["slice"]
            return profiled(lambda: slice_of(run=run, callers=callers, seconds=seconds, warm_up=0.2, server_pids=[]))
        return profiled(lambda: self._claim_steps(run, count, seconds))

    def _claim_steps(self, run: str, count: int, seconds: float) -> dict[str, Any]:
        """Claim so many steps by one call, again and again until the time is over."""
        keys = [f"step-{number}" for number in range(count)]

        async def whole() -> dict[str, Any]:
            await self._claimer.begin(run)
            store = self._claimer.store
            took: list[float] = []
            try:
                await store.claim_steps(f"{run}-warm-up", keys[:100])
                cpu = time.process_time()
                while sum(took) < seconds:
                    began = time.perf_counter()
                    won = await store.claim_steps(f"{run}-{len(took)}", keys)
                    took.append(time.perf_counter() - began)
                    if won.keys() != set(keys):
                        raise WrongAnswerError(f"{len(won)} of {count} steps were won")
                cpu = time.process_time() - cpu
                if await store.claim_steps(f"{run}-0", keys[:100]):
                    raise WrongAnswerError("steps were won twice")
            finally:
                await self._claimer.end()
            claims = count * len(took)
            return {"claims_s": claims / sum(took), "client_us": cpu / claims * 1e6, "call_ms": took[-1] * 1000}

        told: dict[str, Any] = self._tasks.run(whole())
        return told

    def _held(self, run: str, count: int) -> dict[str, Any]:
        """Tell how much the memory of this process grows by holding so many claims."""

        async def whole() -> dict[str, Any]:
            await self._claimer.begin(run)
            try:
                await self._claim_all([f"warm-up-{number}" for number in range(640)])
                before = resident_bytes()
                await self._claim_all([f"step-{number}" for number in range(count)])
                return {"claims": count, "before_bytes": before, "after_bytes": resident_bytes()}
            finally:
                await self._claimer.end()

        told: dict[str, Any] = self._tasks.run(whole())
        return told

    async def _claim_all(self, steps: list[str]) -> None:
        left = iter(steps)

        async def call() -> None:
            for step in left:
                checked(await self._claimer.claim(0, step), True, step)

        await asyncio.gather(*(call() for _ in range(64)))


def main() -> None:
    """Serve `threads` or `tasks`, with try_claim, claim or whole."""
    mode, what = sys.argv[1:3]
    if mode == "threads":
        serve(Threads(Ours(what)).commands())
    else:
        claimer = AsyncOurs(what)
        tasks = Tasks(claimer)
        serve({**tasks.commands(), **Many(claimer, tasks).commands()})


if __name__ == "__main__":
    main()
