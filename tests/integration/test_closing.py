"""The end of a store, of its session and of bodies: what runs is waited for or told, and nothing foreign leaves."""

import asyncio
import contextlib
import functools
import gc
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import etcd3
import pytest

from fix_stores import AnyStore
from proxy import EtcdProxy
from servers import AuthEtcd, EtcdServer, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    BackendError,
    ClaimLostError,
    CorruptRecordError,
    EtcdRunStore,
    SessionState,
    StepClaimError,
    StoreClosedError,
)
from stepclaim._core.ops import Later, Txn
from stepclaim.embedded import EmbeddedEtcd
from stepclaim.models import PREREQUISITES_UNMET
from stepclaim.session import boot_time

RUN = "r"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
Open = Callable[..., Awaitable[AnyStore]]


@pytest.fixture
def proxy(etcd: EtcdServer) -> Iterator[EtcdProxy]:
    with EtcdProxy(etcd.endpoint) as between:
        yield between


@pytest.fixture(params=["threads", "asyncio"])
def face(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def open_store(face: str, etcd: EtcdServer, prefix: str, threads: ThreadPoolExecutor) -> AsyncIterator[Open]:
    opened: list[AnyStore] = []

    async def open_one(endpoint: str = etcd.endpoint, **options: Any) -> AnyStore:
        options = {"prefix": prefix, **options}
        if face == "threads":
            raw: Any = await asyncio.to_thread(functools.partial(EtcdRunStore.connect, endpoint, **options))
        else:
            raw = await AsyncEtcdRunStore.connect(endpoint, **options)
        opened.append(AnyStore(raw, threads))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def other(open_store: Open) -> AnyStore:
    return await open_store(owner="other")


class Body:
    """A body of `step` that runs, in a thread or in a task of its own, until it is let go, cancelled, or for good."""

    def __init__(self, store: AnyStore, step_key: str) -> None:
        self.active: Any = None
        self._inside = threading.Event()
        self._go: Any = threading.Event()
        if hasattr(store.raw.step(RUN, "-"), "__aenter__"):
            self._go = asyncio.Event()
            self.ended: asyncio.Future[Any] = asyncio.ensure_future(self._over_asyncio(store.raw, step_key))
        else:
            self.ended = asyncio.ensure_future(asyncio.to_thread(self._over_threads, store.raw, step_key))

    async def _over_asyncio(self, store: AsyncEtcdRunStore, step_key: str) -> str:
        async with store.step(RUN, step_key) as self.active:
            self._inside.set()
            await self._go.wait()
        return "behind the body"

    def _over_threads(self, store: EtcdRunStore, step_key: str) -> str:
        with store.step(RUN, step_key) as self.active:
            self._inside.set()
            self._go.wait(60)
        return "behind the body"

    async def inside(self) -> Any:
        assert await asyncio.to_thread(self._inside.wait, 10)
        return self.active

    def let_go(self) -> None:
        self._go.set()


async def becomes(ask: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    deadline = asyncio.get_running_loop().time() + 15
    while (told := await ask()) != wanted:
        assert asyncio.get_running_loop().time() < deadline, told


# --- closing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lease_ttl", [30, None])
async def test_closing_waits_for_bodies(open_store: Open, other: AnyStore, lease_ttl: float | None) -> None:
    store = await open_store(lease_ttl=lease_ttl, timeout=30)
    session, body = store.session, Body(store, "a")
    active = await body.inside()
    closing = asyncio.ensure_future(store.close())
    await becomes(functools.partial(refuses, store), True)
    assert await other.holds(active.claim) is True
    assert not closing.done()
    assert not active.lost.is_set()
    body.let_go()
    assert await body.ended == "behind the body"
    await asyncio.wait_for(closing, 15)
    assert await other.get_step_statuses(RUN) == {"a": "Succeeded"}
    assert session.state is SessionState.LOST


async def refuses(store: AnyStore) -> bool:
    """Whether the store takes no more claims."""
    try:
        await store.try_claim_step("another", "s")
    except StoreClosedError:
        return True
    await store.release_step_claim("another", "s")
    return False


async def test_closing_tells_the_bodies_that_it_can_not_wait_for(open_store: Open, other: AnyStore) -> None:
    store = await open_store(timeout=1.0)
    session, body = store.session, Body(store, "a")
    active = await body.inside()
    begun = time.monotonic()
    await store.close()
    assert 0.9 < time.monotonic() - begun < 8
    assert session.state is SessionState.LOST
    assert session.expires_in() == 0
    await asyncio.sleep(0)  # the event loop's turn
    assert active.lost.is_set()
    assert await other.get_claim(RUN, "a") is None
    body.let_go()
    with pytest.raises((ClaimLostError, StoreClosedError)):
        await body.ended
    assert await other.get_step_statuses(RUN) == {"a": "Running"}


async def test_a_second_close_waits_for_the_first(open_store: Open, etcd: EtcdServer, prefix: str) -> None:
    store = await open_store(timeout=30)
    body = Body(store, "a")
    await body.inside()
    first, second = asyncio.ensure_future(store.close()), asyncio.ensure_future(store.close())
    await becomes(functools.partial(refuses, store), True)
    assert not first.done()
    assert not second.done()
    body.let_go()
    await asyncio.wait_for(second, 15)
    assert etcd.etcdctl("get", "--prefix", f"{prefix}/sessions/", "--keys-only").split() == []
    await asyncio.wait_for(first, 15)
    await body.ended
    await store.close()


async def test_a_close_that_is_cancelled_is_carried_through(etcd: EtcdServer, prefix: str) -> None:
    store = await AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert etcd.etcdctl("get", "--prefix", f"{prefix}/sessions/", "--keys-only").split() == []


async def watch(store: Any, **options: Any) -> str:
    """Watch a run to the end, under either face."""
    watcher = store.watch_run(RUN, **options)
    if hasattr(watcher, "__aiter__"):
        async for _ in watcher:
            pass
    else:
        await asyncio.to_thread(list, watcher)
    return "ended"


async def ended(work: asyncio.Future[Any]) -> Any:
    """Give what a task came to: its answer or its error; a cancellation that nobody asked for is one, too."""
    done, _ = await asyncio.wait([work], timeout=20)
    assert done, "it still waits"
    if work.cancelled():
        return asyncio.CancelledError()
    return work.exception() or work.result()


@pytest.mark.parametrize("reached", [True, False])
async def test_closing_ends_those_who_wait(open_store: Open, other: AnyStore, proxy: EtcdProxy, reached: bool) -> None:
    claim = await other.claim_step(RUN, "a")
    assert claim is not None
    store = await open_store(proxy.endpoint, timeout=2.0)
    proxy.reset_calls()
    if not reached:
        proxy.blackhole(True)
    waiting = asyncio.ensure_future(store.wait_for_step(RUN, "a", timeout=60))
    watching = asyncio.ensure_future(watch(store.raw))
    if reached:
        await asyncio.to_thread(eventually, lambda: proxy.count("Watch") >= 2)
        assert all(call.answered.wait(10) for call in tuple(proxy.calls) if call.method == "Watch")
    else:
        await asyncio.to_thread(eventually, lambda: len(store.raw._calls) == 2)
    begun = time.monotonic()
    await store.close()
    assert time.monotonic() - begun < 10
    proxy.blackhole(False)
    told = StoreClosedError if reached else StepClaimError  # what was asked in vain may say so first
    assert isinstance(await ended(waiting), told)
    end = await ended(watching)
    assert end == "ended" or isinstance(end, told)


async def test_calls_under_way_end_with_an_error_of_the_package(
    open_store: Open, other: AnyStore, proxy: EtcdProxy
) -> None:
    """Nothing gets through, and what the store is asked takes longer than its closing."""
    await other.start_run("f", "F", RUN, "manual")
    store = await open_store(proxy.endpoint, timeout=1.0, attempt_timeout=30)
    proxy.blackhole(True)
    calls = [
        asyncio.ensure_future(call)
        for call in (
            store.wait_for_step(RUN, "a", timeout=60),
            store.wait_for_step(RUN, "b", timeout=60),
            watch(store.raw, timeout=60),
            watch(store.raw, timeout=60, after_revision=1),
            store.get_claim(RUN, "a"),
            store.get_run(RUN),
            store.record_step_start(RUN, "c", "T"),
            store.retry_step(RUN, "c"),
        )
    ]
    await asyncio.to_thread(eventually, lambda: len(store.raw._calls) == len(calls) - 1)  # all but the second watch
    await store.close()
    ends = [await ended(call) for call in calls]
    proxy.blackhole(False)
    assert [end for end in ends if end != "ended" and not isinstance(end, StepClaimError)] == []


async def test_a_call_whose_channel_is_closed_beneath_it_is_not_a_cancelled_task(etcd: EtcdServer, prefix: str) -> None:
    """GRPC ends such a call in asyncio as if the task had been cancelled; whoever awaits it was not."""
    with EtcdProxy(etcd.endpoint) as between:
        store = await AsyncEtcdRunStore.connect(between.endpoint, prefix=prefix, timeout=5.0, attempt_timeout=30)
        between.blackhole(True)
        calls = [
            asyncio.ensure_future(call)
            for call in (store.get_claim(RUN, "a"), store.get_run(RUN), store.record_step_start(RUN, "c", "T"))
        ]
        await asyncio.sleep(0)
        client = store._client
        assert client is not None
        await client.close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [StoreClosedError] * len(calls)
        between.blackhole(False)
        between.cut_all()
        await store.close()


async def test_a_closed_store_says_so_whatever_it_is_asked(open_store: Open) -> None:
    store = await open_store()
    claim = await store.claim_step(RUN, "a")
    await store.close()
    for call in (
        lambda: store.claim_step(RUN, "b"),
        lambda: store.complete_step(claim, "Succeeded"),
        lambda: store.holds(claim),
        lambda: store.get_run(RUN),
        lambda: store.wait_for_step(RUN, "b", timeout=5),
        lambda: watch(store.raw),
        lambda: watch(store.raw, after_revision=1),
        lambda: store.delete_run(RUN),
        lambda: Body(store, "b").ended,
    ):
        with pytest.raises(StoreClosedError):
            await call()
    with pytest.raises(StoreClosedError):
        _ = store.raw.session


# --- the session's end ----------------------------------------------------------------------------------------------


def revoke(etcd: EtcdServer, store: AnyStore) -> None:
    etcd.etcdctl("lease", "revoke", f"{store.raw.session.lease_id:x}")


async def test_a_callback_may_close_the_store(open_store: Open, etcd: EtcdServer) -> None:
    store = await open_store(timeout=5)
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def close(_: Any) -> None:
        closing = store.raw.close()
        if closing is None:
            loop.call_soon_threadsafe(closed.set)
        else:
            tasks.append(asyncio.ensure_future(closing))
            tasks[0].add_done_callback(lambda _: closed.set())

    tasks: list[asyncio.Future[None]] = []
    store.session.on_lost(close)
    revoke(etcd, store)
    with contextlib.suppress(StoreClosedError):
        await store.try_claim_step(RUN, "a")  # this is how it hears of it
    await asyncio.wait_for(closed.wait(), 20)
    with pytest.raises(StoreClosedError):
        await store.try_claim_step(RUN, "b")


async def test_a_callback_may_claim_with_the_store(open_store: Open, etcd: EtcdServer) -> None:
    store = await open_store(timeout=10)
    loop = asyncio.get_running_loop()
    won: asyncio.Future[bool] = loop.create_future()

    def claim(_: Any) -> None:
        claiming = store.raw.try_claim_step(RUN, "of the callback")
        if isinstance(claiming, bool):
            loop.call_soon_threadsafe(won.set_result, claiming)
        else:
            tasks.append(asyncio.ensure_future(claiming))
            tasks[0].add_done_callback(lambda task: won.set_result(task.result()))

    tasks: list[asyncio.Future[bool]] = []
    store.session.on_lost(claim)
    revoke(etcd, store)
    begun = time.monotonic()
    assert await store.try_claim_step(RUN, "a") is True
    assert await asyncio.wait_for(won, 20) is True
    assert time.monotonic() - begun < 9  # nobody waited for a deadline
    assert store.session.state is SessionState.ACTIVE


def doubt_the_lease(store: Any) -> None:
    """Let the local deadline pass while etcd has the lease for long."""
    keeper = store._keeper
    with keeper._condition:
        keeper._clock.deadline = boot_time()
        keeper._condition.notify_all()


async def test_a_claim_that_is_lost_by_the_local_deadline_ends_the_block(etcd: EtcdServer, prefix: str) -> None:
    async with (
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=60) as store,
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as other,
    ):
        before, behind = store.session, False
        with pytest.raises(ClaimLostError):  # noqa: PT012 - what does not run is what is tested
            async with store.step(RUN, "a") as active:
                assert active is not None
                doubt_the_lease(store)
                await asyncio.wait_for(asyncio.Event().wait(), 20)
            behind = True
        assert behind is False
        assert active is not None
        assert active.lost.is_set()
        assert before.state is SessionState.LOST
        assert await other.get_claim(RUN, "a") is None
        assert await other.get_step_statuses(RUN) == {"a": "Pending"}
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert await store.claim_step(RUN, "b") is not None


@pytest.mark.parametrize("how", ["swallows", "fails", "ends late"])
async def test_a_body_that_gets_over_the_loss_breaks_no_timeout_around_it(
    etcd: EtcdServer, prefix: str, how: str
) -> None:
    async with (
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as store,
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as other,
    ):

        async def body() -> None:
            async with store.step(RUN, "a"):
                await other.release_step_claim(RUN, "a")
                try:
                    await asyncio.wait_for(asyncio.Event().wait(), 20)
                except asyncio.CancelledError:
                    if how == "fails":
                        raise RuntimeError("clean-up failed") from None
                    if how == "ends late":
                        await asyncio.sleep(0.05)

        async def work() -> None:
            task = asyncio.current_task()
            assert task is not None
            with pytest.raises(TimeoutError):  # noqa: PT012 - of the time-out, not of the body
                async with asyncio.timeout(30) as limit:
                    with pytest.raises(ClaimLostError):
                        await body()
                    assert task.cancelling() == 0
                    limit.reschedule(asyncio.get_running_loop().time() + 0.1)
                    await asyncio.Event().wait()
            assert task.cancelling() == 0

        await asyncio.wait_for(asyncio.create_task(work()), 60)


async def test_a_cancellation_from_outside_stays_one_when_the_claim_is_lost_too(etcd: EtcdServer, prefix: str) -> None:
    async with (
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as store,
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as other,
    ):
        inside = asyncio.Event()

        async def work() -> None:
            async with store.step(RUN, "a"):
                await other.release_step_claim(RUN, "a")
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await other.get_claim(RUN, "a") is None


# --- what is carried through in the background ----------------------------------------------------------------------


def refused_for_ever(asked: list[float]) -> Any:
    asked.append(time.monotonic())
    raise BackendError("no room", code="UNKNOWN")
    yield Txn(compares=(), success=())


async def test_what_stays_refused_in_the_background_stops_neither_renewals_nor_a_new_session(
    open_store: Open, etcd: EtcdServer
) -> None:
    store = await open_store(lease_ttl=2)
    claim = await store.claim_step(RUN, "a")
    asked: list[float] = []
    store.raw._keeper.later(Later(functools.partial(refused_for_ever, asked)))
    ends = time.monotonic() + 3.5
    await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
    assert len(asked) > 1
    assert await store.holds(claim) is True
    assert store.session.state is SessionState.ACTIVE
    before = store.session
    revoke(etcd, store)
    assert await store.try_claim_step(RUN, "b") is True
    assert store.session is not before


async def test_a_completion_that_a_full_etcd_refuses_harms_no_other_claim(prefix: str) -> None:
    with EmbeddedEtcd(extra_args=["--quota-backend-bytes=4194304"]) as server, EtcdProxy(server.endpoint) as proxy:
        async with AsyncEtcdRunStore.connect(proxy.endpoint, prefix=prefix, lease_ttl=3) as store:
            healthy, claim = await store.claim_step(RUN, "healthy"), await store.claim_step(RUN, "a")
            assert healthy is not None
            assert claim is not None
            fault = proxy.hold_request("Txn", 1)
            completing = asyncio.create_task(store.complete_step(claim, "Succeeded", output_json="1"))
            await asyncio.to_thread(eventually, fault.happened.is_set)
            await asyncio.to_thread(fill, server)
            completing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await completing
            ends = time.monotonic() + 4.5
            await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
            assert store.session.state is SessionState.ACTIVE
            assert await store.holds(healthy) is True


def fill(server: EmbeddedEtcd) -> None:
    host, _, port = server.endpoint.rpartition(":")
    with etcd3.client(host=host, port=int(port)) as client, pytest.raises(Exception, match="space exceeded"):  # noqa: PT012
        for number in range(100):
            client.put(f"/fill/{number}", b"x" * 500_000)


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["LeaseGrant", "Txn"])
@pytest.mark.parametrize("fault", ["silence", "hold"])
async def test_an_opening_that_is_cancelled_leaves_nothing_behind(
    etcd: EtcdServer, proxy: EtcdProxy, prefix: str, caplog: pytest.LogCaptureFixture, at: str, fault: str
) -> None:
    before = session_threads()
    order = proxy.hold_request(at, 1) if fault == "hold" else proxy.drop_reply(at, 1, "silence")
    opening = asyncio.create_task(opened(proxy.endpoint, prefix=prefix, attempt_timeout=0.4))
    await asyncio.to_thread(eventually, order.happened.is_set)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    ends = time.monotonic() + 1.0  # by then the thread that opens has gone on
    await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
    await asyncio.to_thread(eventually, lambda: session_threads() <= before, 15)
    await asyncio.to_thread(
        eventually, lambda: not etcd.etcdctl("get", "--prefix", f"{prefix}/sessions/", "--keys-only").split(), 15
    )
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_an_opening_that_is_cancelled_and_fails_later_makes_no_noise(
    proxy: EtcdProxy, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.blackhole(True)
    before = session_threads()
    opening = asyncio.create_task(opened(proxy.endpoint, prefix=prefix, timeout=1.0))
    await asyncio.to_thread(eventually, lambda: proxy._connections)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    ends = time.monotonic() + 1.5
    await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
    assert session_threads() <= before
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("at", ["LeaseGrant", "Txn", "nothing"])
async def test_an_opening_that_is_cancelled_as_its_loop_ends_leaves_nothing_behind(
    etcd: EtcdServer, proxy: EtcdProxy, prefix: str, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    """Nobody is left in the loop to close what the thread opens, or to hear that it could not be opened."""
    before = session_threads()
    begun = proxy.drop_reply(at, 1, "silence").happened if at != "nothing" else None
    if begun is None:
        proxy.blackhole(True)

    async def cancelled() -> None:
        opening = asyncio.create_task(opened(proxy.endpoint, prefix=prefix, attempt_timeout=0.4, timeout=3.0))
        await asyncio.to_thread(eventually, lambda: begun.is_set() if begun else proxy._connections)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)

    await asyncio.to_thread(lambda: asyncio.run(cancelled()))
    await asyncio.to_thread(eventually, lambda: session_threads() <= before, 15)
    await asyncio.to_thread(
        eventually, lambda: not etcd.etcdctl("get", "--prefix", f"{prefix}/sessions/", "--keys-only").split(), 15
    )
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def opened(endpoint: str, **options: Any) -> AsyncEtcdRunStore:
    return await AsyncEtcdRunStore.connect(endpoint, **options)


def session_threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "stepclaim-session"}


# --- deadlines and strangers ----------------------------------------------------------------------------------------


async def test_a_deadline_holds_for_a_call_that_must_log_in_first(
    auth_etcd: AuthEtcd, threads: ThreadPoolExecutor, face: str
) -> None:
    """The login takes most of the time, and then etcd is silent."""
    limit = 2.0
    with EtcdProxy(auth_etcd.endpoint) as proxy:
        options: dict[str, Any] = {
            "user": auth_etcd.user,
            "password": auth_etcd.password,
            "prefix": f"{auth_etcd.prefix}x",
            "timeout": limit,
            "attempt_timeout": 30,
        }
        if face == "threads":
            raw: Any = await asyncio.to_thread(lambda: EtcdRunStore.connect(proxy.endpoint, session=False, **options))
        else:
            raw = await AsyncEtcdRunStore.connect(proxy.endpoint, session=False, **options)
        store = AnyStore(raw, threads)
        raw._client.members.needs_login = True
        login = proxy.hold_request("Authenticate", 1)
        proxy.drop_reply("Range", 1, "silence")
        begun = time.monotonic()
        reading = asyncio.ensure_future(store.get_claim(RUN, "a"))
        await asyncio.to_thread(eventually, login.happened.is_set)
        ends = begun + limit * 0.7
        await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
        await asyncio.to_thread(proxy.let_go)
        with pytest.raises(StepClaimError):
            await reading
        assert time.monotonic() - begun < limit * 1.5
        await store.close()


STRAYS = [
    "runs/stray",
    "runs/r/run/stray",
    "runs/r/stray",
    "runs/r/claims",
    "runs/r/payloads/a/zz",
    "runs/r/payloads/a",
    "runs/r/attempts/a/zz",
    "runs/r/attempts/reset/zz",
    "runs/r/attempts/a",
    "runs/r/steps/%ff",
    "runs//run",
    "runs//claims/a",
    "runs/",
    "active/",
    "active/%",
    "idempotency/x",
    "runs/r/idempotency/x",
]


STRAYS_THAT_ARE_NO_TEXT = [b"runs/r/claims/\xff", b"runs/r/steps/\xff", b"runs/\xff/run", b"active/\xff"]


@pytest.mark.parametrize("stray", [*map(str.encode, STRAYS), *STRAYS_THAT_ARE_NO_TEXT])
async def test_a_stray_key_is_ignored_or_told_as_one_that_can_not_be_read(
    open_store: Open, etcd: EtcdServer, prefix: str, stray: bytes
) -> None:
    store = await open_store()
    await store.record_skipped_step(RUN, "reset", "T", PREREQUISITES_UNMET)
    await store.reset_cascade_skipped_dependents(RUN, ["reset"])
    await store.start_run("f", "F", RUN, "manual")
    await store.record_step_start(RUN, "a", "T", "1")
    host, _, port = etcd.endpoint.rpartition(":")
    with etcd3.client(host=host, port=int(port)) as client:
        client.put(prefix.encode() + b"/" + stray, b'{"v":1}')
    wrong = []
    for name, call in {
        "get_claims": store.get_claims,
        "get_claims of the run": lambda: store.get_claims(RUN),
        "get_claimed_step_keys": lambda: store.get_claimed_step_keys(RUN),
        "get_runs": store.get_runs,
        "get_active_runs": store.get_active_runs,
        "get_run": lambda: store.get_run(RUN),
        "get_step_statuses": lambda: store.get_step_statuses(RUN),
        "orphaned_steps": lambda: store.orphaned_steps(RUN),
        "get_dispatched_step_keys": lambda: store.get_dispatched_step_keys(RUN),
        "watch_run": lambda: watch(store.raw, timeout=0.1),
        "watch_run from the first": lambda: watch(store.raw, timeout=0.1, after_revision=0),
        "record_step_start": lambda: store.record_step_start(RUN, "reset", "T"),
        "claim_step": lambda: store.claim_step(RUN, "a"),
        "purge_runs": lambda: store.purge_runs(LONG_AGO),
        "delete_run": lambda: store.delete_run(RUN),
    }.items():
        try:
            await call()
        except CorruptRecordError:
            continue
        except Exception as error:  # noqa: BLE001 - told below, all at once
            wrong.append((name, type(error).__name__, str(error)))
    assert wrong == []
