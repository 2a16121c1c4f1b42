"""A store behind the proxy on either face, and another that goes past it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fix_stores import AnyStore, OpenStore
from proxy import EtcdProxy
from servers import EtcdServer
from stepclaim import AsyncEtcdRunStore, EtcdRunStore


@pytest.fixture
def proxy(etcd: EtcdServer) -> Iterator[EtcdProxy]:
    """Stand between a store and the shared etcd."""
    with EtcdProxy(etcd.endpoint) as between:
        yield between


@pytest.fixture(params=["threads", "asyncio"])
async def open_store(
    request: pytest.FixtureRequest, proxy: EtcdProxy, prefix: str, threads: ThreadPoolExecutor
) -> AsyncIterator[OpenStore]:
    """Give a function that opens a store behind the proxy, or at the endpoint that it is given."""
    opened: list[AnyStore] = []

    async def open_one(endpoint: str = proxy.endpoint, **options: Any) -> AnyStore:
        options = {"prefix": prefix, "attempt_timeout": 0.4, **options}
        if request.param == "threads":
            raw: Any = await asyncio.to_thread(lambda: EtcdRunStore.connect(endpoint, **options))
        else:
            raw = await AsyncEtcdRunStore.connect(endpoint, **options)
        opened.append(AnyStore(raw, threads))
        return opened[-1]

    yield open_one
    proxy.blackhole(False)
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: OpenStore) -> AnyStore:
    """Give a store behind the proxy."""
    return await open_store()


@pytest.fixture
async def other(open_store: OpenStore, etcd: EtcdServer) -> AnyStore:
    """Give a store that goes to etcd without the proxy."""
    return await open_store(etcd.endpoint, owner="other")
