"""What each call costs, counted at the wire."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from etcd3 import etcdrpc

from fix_stores import AnyStore
from proxy import EtcdProxy
from stepclaim import AsyncEtcdRunStore, EtcdRunStore

RUN = "r"


@pytest.fixture(params=["threads", "asyncio"])
async def store(
    request: pytest.FixtureRequest, proxy: EtcdProxy, prefix: str, threads: ThreadPoolExecutor
) -> AsyncIterator[AnyStore]:
    if request.param == "threads":
        raw: Any = await asyncio.to_thread(lambda: EtcdRunStore.connect(proxy.endpoint, prefix=prefix, lease_ttl=60))
    else:
        raw = await AsyncEtcdRunStore.connect(proxy.endpoint, prefix=prefix, lease_ttl=60)
    proxy.reset_calls()
    each = AnyStore(raw, threads)
    yield each
    await each.close()


def spent(proxy: EtcdProxy) -> list[str]:
    """Name the calls since the last look."""
    methods = [call.method for call in proxy.calls]
    proxy.reset_calls()
    return methods


async def test_a_whole_step_costs_two(store: AnyStore, proxy: EtcdProxy) -> None:
    claim = await store.claim_step(RUN, "a", step_type="T", input_json="{}", job_id="j")
    request = etcdrpc.TxnRequest.FromString(proxy.calls[0].request)
    assert spent(proxy) == ["Txn"]
    assert {compare.key.rsplit(b"/", 2)[-2] for compare in request.compare} == {
        b"claims", b"steps", b"a", b"sessions"
    }  # fmt: skip
    claims = [op.request_put for op in request.success if b"/claims/" in op.request_put.key]
    assert [put.lease for put in claims] == [claim.lease_id]
    await store.complete_step(claim, "Succeeded", output_json="{}")
    assert spent(proxy) == ["Txn"]


async def test_the_engines_way_costs_three(store: AnyStore, proxy: EtcdProxy) -> None:
    assert await store.try_claim_step(RUN, "a")
    assert spent(proxy) == ["Txn"]
    await store.record_step_start(RUN, "a", "T", "{}")
    assert spent(proxy) == ["Txn"]
    await store.record_step_complete(RUN, "a", "Succeeded", "{}")
    assert spent(proxy) == ["Txn"]


async def test_a_refused_claim_costs_one_and_writes_nothing(store: AnyStore, proxy: EtcdProxy) -> None:
    await store.try_claim_step(RUN, "a")
    proxy.reset_calls()
    assert await store.try_claim_step(RUN, "a") is False
    assert await store.claim_step(RUN, "a") is None
    assert spent(proxy) == ["Txn", "Txn"]


async def test_other_calls(store: AnyStore, proxy: EtcdProxy) -> None:
    claim = await store.claim_step(RUN, "a")
    spent(proxy)
    await store.defer_step(claim)
    assert spent(proxy) == ["Txn"]
    await store.record_skipped_step(RUN, "b", "T", "r")
    assert spent(proxy) == ["Txn"]
    await store.start_run("f", "F", RUN, "manual")
    assert spent(proxy) == ["Txn"]
    await store.try_record_dispatch(RUN, "a")
    assert spent(proxy) == ["Txn"]
    await store.get_step_statuses(RUN)
    assert spent(proxy) == ["Range"]
    await store.complete_run(RUN, "Succeeded")
    assert spent(proxy) == ["Range", "Txn"]
    again = await store.claim_step(RUN, "a")
    assert (again.attempt, spent(proxy)) == (2, ["Txn", "Txn"])
    assert await store.release_claim(again)
    assert spent(proxy) == ["Txn"]
