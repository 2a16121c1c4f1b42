"""The four stores behind one awaitable face, so that one suite holds for all of them."""

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from servers import EtcdServer
from stepclaim import AsyncEtcdRunStore, EtcdRunStore
from stepclaim.testing import AsyncInMemoryRunStore, InMemoryBackend, InMemoryRunStore

KINDS = ("etcd-threads", "etcd-asyncio", "memory-threads", "memory-asyncio")


class AnyStore:
    """A store of either face, awaited either way; `raw` is the store itself."""

    def __init__(self, raw: Any, threads: ThreadPoolExecutor) -> None:
        self.raw = raw
        self._threads = threads

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.raw, name)
        if not callable(member) or inspect.iscoroutinefunction(member):
            return member

        @functools.wraps(member)
        async def call(*args: Any, **keywords: Any) -> Any:
            work = functools.partial(member, *args, **keywords)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

        return call


OpenStore = Callable[..., Awaitable[AnyStore]]


@pytest.fixture(scope="session")
def threads() -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as the largest gate has callers."""
    with ThreadPoolExecutor(72) as pool:
        yield pool


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Name the store that is under test."""
    name: str = request.param
    return name


@pytest.fixture
async def open_store(kind: str, etcd: EtcdServer, prefix: str, threads: ThreadPoolExecutor) -> AsyncIterator[OpenStore]:
    """Give a function that opens one more store on the same keys, with a client of its own."""
    backend = InMemoryBackend()
    async with AsyncExitStack() as stack:

        async def open_one(**options: Any) -> AnyStore:
            options.setdefault("prefix", prefix)
            if kind == "memory-threads":
                return AnyStore(stack.enter_context(InMemoryRunStore(backend, **options)), threads)
            if kind == "memory-asyncio":
                raw = await stack.enter_async_context(AsyncInMemoryRunStore(backend, **options))
                return AnyStore(raw, threads)
            if kind == "etcd-threads":
                store = await asyncio.to_thread(functools.partial(EtcdRunStore.connect, etcd.endpoint, **options))
                stack.enter_context(store)
                return AnyStore(store, threads)
            opened = await stack.enter_async_context(AsyncEtcdRunStore.connect(etcd.endpoint, **options))
            return AnyStore(opened, threads)

        yield open_one


@pytest.fixture
async def store(open_store: OpenStore) -> AnyStore:
    """Give one store on keys that nobody else has."""
    return await open_store()


async def gated(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Start all calls behind one gate and give their answers."""
    gate = asyncio.Event()

    async def wait(call: Callable[[], Awaitable[Any]]) -> Any:
        await gate.wait()
        return await call()

    tasks = [asyncio.create_task(wait(call)) for call in calls]
    gate.set()
    return await asyncio.gather(*tasks)


@asynccontextmanager
async def body_of(store: AnyStore, *words: Any, **options: Any) -> AsyncIterator[Any]:
    """Run a body under either face; with threads, entering and leaving happen in one thread of their own."""
    manager = store.raw.step(*words, **options)
    if hasattr(manager, "__aenter__"):
        async with manager as active:
            yield active
        return
    active = await asyncio.to_thread(manager.__enter__)
    try:
        yield active
    except BaseException as error:
        if not await asyncio.to_thread(manager.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await asyncio.to_thread(manager.__exit__, None, None, None)
