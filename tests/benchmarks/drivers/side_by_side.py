"""stepclaim and the bare stub in one process, call by call in turns: what one call costs, and no round between them."""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import grpc
from etcd3 import etcdrpc

from benchmarks.drivers.serving import serve
from benchmarks.drivers.slices import WrongAnswerError, checked
from benchmarks.drivers.stub import AsyncStub, Stub
from stepclaim import AsyncEtcdRunStore, EtcdRunStore

if TYPE_CHECKING:
    from collections.abc import Callable

TTL = 600.0
PREFIX = "/bench"
PAGE = 5000
"""Keys a page of the bare read: of the sizes that were tried the one that was fastest."""
_runner = asyncio.Runner()


def _medians(**samples: list[float]) -> dict[str, float]:
    return {f"{name}_ms": statistics.median(times) * 1000 for name, times in samples.items()}


def alone_sync(endpoint: str, run: str, calls: int, warm_up: int) -> dict[str, float]:
    """Time lone calls of both faces for threads, taking turns, the first one in turns, too."""
    times: dict[str, list[float]] = {"ours": [], "stub": []}
    stub = Stub()
    stub.open({"endpoint": endpoint}, 1)
    stub.begin(run)
    with EtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:
        ways: list[tuple[str, Callable[[str], bool]]] = [
            ("ours", lambda step: store.try_claim_step(run, step)),
            ("stub", lambda step: stub.claim(0, step)),
        ]
        for number in range(warm_up + calls):
            step = f"step-{number}"
            ways.reverse()
            for name, claim in ways:
                began = time.perf_counter()
                won = claim(step)
                took = time.perf_counter() - began
                checked(won, True, step)
                if number >= warm_up:
                    times[name].append(took)
    stub.end()
    stub.close()
    return _medians(**times)


def alone_async(endpoint: str, run: str, calls: int, warm_up: int) -> dict[str, float]:
    """Time lone calls on asyncio likewise."""
    times: dict[str, list[float]] = {"ours": [], "stub": []}

    async def whole() -> None:
        stub = AsyncStub()
        await stub.open({"endpoint": endpoint}, 1)
        await stub.begin(run)
        async with AsyncEtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:

            async def one(name: str, step: str) -> None:
                began = time.perf_counter()
                won = await (store.try_claim_step(run, step) if name == "ours" else stub.claim(0, step))
                took = time.perf_counter() - began
                checked(won, True, step)
                times[name].append(took)

            for number in range(warm_up + calls):
                for name in ("ours", "stub") if number % 2 else ("stub", "ours"):
                    await one(name, f"step-{number}")
        await stub.end()
        await stub.close()

    _runner.run(whole())
    return _medians(**{name: taken[warm_up:] for name, taken in times.items()})


def prepare_statuses(endpoint: str, run: str, steps: int) -> None:
    """Record a run with so many steps, each completed."""

    async def whole() -> None:
        async with AsyncEtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:
            left = iter(range(steps))

            async def call() -> None:
                for number in left:
                    claim = await store.claim_step(run, f"step-{number}")
                    if claim is None:
                        raise WrongAnswerError(f"step-{number} was refused")
                    await store.complete_step(claim, "Succeeded")

            await asyncio.gather(*(call() for _ in range(64)))

    _runner.run(whole())


def statuses(endpoint: str, run: str, steps: int, calls: int) -> dict[str, float]:
    """Time `get_step_statuses` against reading the same keys in pages with the stub and doing nothing with them."""
    times: dict[str, list[float]] = {"ours": [], "stub": []}
    with (
        EtcdRunStore.connect(endpoint, prefix=PREFIX, session=False) as store,
        grpc.insecure_channel(endpoint, [("grpc.max_receive_message_length", -1)]) as channel,
    ):
        read = etcdrpc.KVStub(channel).Range
        first = f"{PREFIX}/runs/{run}/steps/".encode()
        end = first[:-1] + b"0"

        def ours() -> int:
            return len(store.get_step_statuses(run))

        def paged() -> int:
            key, revision, found = first, 0, 0
            while True:
                page = read(etcdrpc.RangeRequest(key=key, range_end=end, limit=PAGE, revision=revision), timeout=20)
                revision = revision or page.header.revision
                found += len(page.kvs)
                if not page.more:
                    return found
                key = page.kvs[-1].key + b"\0"

        ways: list[tuple[str, Callable[[], int]]] = [("ours", ours), ("stub", paged)]
        for number in range(calls + 1):
            ways.reverse()
            for name, look in ways:
                gc.collect()  # what one way leaves behind is not the other's to clear up
                began = time.perf_counter()
                found = look()
                took = time.perf_counter() - began
                if found != steps:
                    raise WrongAnswerError(f"{name} found {found} of {steps} steps")
                if number:
                    times[name].append(took)
    return _medians(**times)


def first_claims(endpoints: dict[str, str], run: str, rounds: int, later: int) -> dict[str, dict[str, float]]:
    """Open a new store on each server in turn, make its first claim and some later ones, and time each."""
    opened: dict[str, list[float]] = {name: [] for name in endpoints}
    first: dict[str, list[float]] = {name: [] for name in endpoints}
    after: dict[str, list[float]] = {name: [] for name in endpoints}
    order = list(endpoints)
    for number in range(rounds + 1):
        order.append(order.pop(0))
        stores = {}
        for name in order:
            began = time.perf_counter()
            stores[name] = EtcdRunStore.connect(endpoints[name], prefix=PREFIX, lease_ttl=TTL)
            middle = time.perf_counter()
            checked(stores[name].try_claim_step(f"{run}-{number}", "first"), True, "first")
            ended = time.perf_counter()
            if number:
                opened[name].append(middle - began)
                first[name].append(ended - middle)
        for step in range(later):
            for name in order:
                began = time.perf_counter()
                checked(stores[name].try_claim_step(f"{run}-{number}", f"{step}"), True, f"{step}")
                if number:
                    after[name].append(time.perf_counter() - began)
        for store in stores.values():
            store.close()
    return {name: _medians(open=opened[name], first=first[name], later=after[name]) for name in endpoints}


def identical(endpoint: str, run: str, face: str, callers: int) -> dict[str, int]:
    """Have so many callers of one process claim one and the same step at the same moment; one must win."""
    if face == "stub":
        return {"won": _runner.run(_identical_stub(endpoint, run, callers))}
    if face == "tasks":
        return {"won": _runner.run(_identical_tasks(endpoint, run, callers))}
    won: list[bool] = []
    barrier = threading.Barrier(callers)

    def call() -> None:
        barrier.wait()
        won.append(store.try_claim_step(run, "the-one"))

    with EtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:
        threads = [threading.Thread(target=call) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {"won": sum(won), "answered": len(won)}


async def _identical_tasks(endpoint: str, run: str, callers: int) -> int:
    async with AsyncEtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:
        return sum(await asyncio.gather(*(store.try_claim_step(run, "the-one") for _ in range(callers))))


async def _identical_stub(endpoint: str, run: str, callers: int) -> int:
    stub = AsyncStub()
    await stub.open({"endpoint": endpoint}, callers)
    await stub.begin(run)
    won = sum(await asyncio.gather(*(stub.claim(caller, "the-one") for caller in range(callers))))
    await stub.end()
    await stub.close()
    return won


def fill(endpoint: str, keys: int) -> None:
    """Put so many sealed claims of other runs into the store, 100 a transaction, many transactions at a time."""
    value = b'{"v":1,"state":"sealed","owner":"bench","session":"bench-000000000000","attempt_id":"' + b"0" * 32 + b'"}'

    async def whole() -> None:
        async with grpc.aio.insecure_channel(endpoint) as channel:
            txn = etcdrpc.KVStub(channel).Txn
            left = iter(range(0, keys, 100))

            async def call() -> None:
                for start in left:
                    puts = [
                        etcdrpc.RequestOp(
                            request_put=etcdrpc.PutRequest(
                                key=f"{PREFIX}/runs/{start:08d}/claims/step-{number}".encode(), value=value
                            )
                        )
                        for number in range(min(100, keys - start))
                    ]
                    await txn(etcdrpc.TxnRequest(success=puts), timeout=60)

            await asyncio.gather(*(call() for _ in range(16)))

    _runner.run(whole())


def count_keys(endpoint: str) -> int:
    """Count the keys in a store."""
    with grpc.insecure_channel(endpoint) as channel:
        request = etcdrpc.RangeRequest(key=b"\0", range_end=b"\0", count_only=True)
        return int(etcdrpc.KVStub(channel).Range(request, timeout=60).count)


if __name__ == "__main__":
    commands: tuple[Callable[..., Any], ...] = (
        alone_sync, alone_async, prepare_statuses, statuses, first_claims, identical, fill, count_keys,
    )  # fmt: skip
    serve({command.__name__: command for command in commands})
