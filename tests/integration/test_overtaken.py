"""Replies that are lost while others write: a call tells its own write from theirs, or says that it can't.

Each test keeps one transaction of one store from being answered (it was carried out) or from arriving (it was not),
lets another store write, and only then lets the first try again.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from fix_stores import AnyStore, OpenStore
from proxy import EtcdProxy
from servers import EtcdServer, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    BackendError,
    ClaimLostError,
    CorruptRecordError,
    DeadlineExceededError,
    OutcomeUnknownError,
    SessionState,
)
from stepclaim.models import PREREQUISITES_UNMET

RUN = "r"
KINDS = ("lost", "held")
"""The transaction was carried out and its reply is lost; or it is held on its way, and arrives when all is over."""


@asynccontextmanager
async def overtaken(
    proxy: EtcdProxy, call: Coroutine[Any, Any, Any], nth: int = 1, kind: str = "lost"
) -> AsyncIterator[asyncio.Task[Any]]:
    """Begin a call and keep its nth transaction back; it can't try again before the block has ended."""
    fault = proxy.hold_request("Txn", nth) if kind == "held" else proxy.drop_reply("Txn", nth, "silence")
    task = asyncio.ensure_future(call)

    def shut_the_way() -> None:
        assert fault.happened.wait(10)
        proxy.blackhole(True)

    await asyncio.to_thread(shut_the_way)
    try:
        yield task
    finally:
        proxy.blackhole(False)


async def let_go(proxy: EtcdProxy, kind: str) -> None:
    if kind == "held":
        await asyncio.to_thread(proxy.let_go)


async def attempts(store: AnyStore, step_key: str = "a") -> list[tuple[int, str, str | None]]:
    await store.start_run("f", "F", RUN, "manual")
    (step,) = (each for each in (await store.get_run(RUN)).steps if each.step_key == step_key)
    return [(each.attempt, str(each.status), each.output_json or each.input_json) for each in step.attempts]


# --- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1])
async def test_a_start_makes_one_attempt(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, kind: str, before: int
) -> None:
    for number in range(before):
        assert await other.record_step_start(RUN, "a", "T", f"earlier {number}") == number + 1
    nth = 1 if not before else 2  # where there is a row, the first proposal shows it
    async with overtaken(proxy, store.record_step_start(RUN, "a", "T", "mine"), nth, kind) as starting:
        theirs = await other.record_step_start(RUN, "a", "T", "theirs")
    mine = await starting
    await let_go(proxy, kind)
    numbers = {mine: "mine", theirs: "theirs"}
    assert mine < theirs if kind == "lost" else theirs < mine
    assert [(number, text) for number, _, text in await attempts(other)][before:] == sorted(numbers.items())


@pytest.mark.parametrize("kind", KINDS)
async def test_a_holders_start_makes_one_attempt(store: AnyStore, other: AnyStore, proxy: EtcdProxy, kind: str) -> None:
    await store.try_claim_step(RUN, "a")
    async with overtaken(proxy, store.record_step_start(RUN, "a", "T", "mine"), kind=kind) as starting:
        await other.release_step_claim(RUN, "a")
        theirs = await other.claim_step(RUN, "a", input_json="theirs")
    if kind == "lost":
        assert await starting == 1
    else:
        with pytest.raises(ClaimLostError):
            await starting
    await let_go(proxy, kind)
    assert await other.holds(theirs) is True
    mine = [(1, "Running", "mine")] if kind == "lost" else []
    assert await attempts(other) == [*mine, (theirs.attempt, "Running", "theirs")]


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claimed", [True, False])
async def test_a_result_never_counts_for_the_next_attempt_too(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, claimed: bool
) -> None:
    if claimed:
        await store.claim_step(RUN, "a")
    else:
        await other.record_step_start(RUN, "a", "T")
    nth = 1 if claimed else 2  # without a claim it looks first
    async with overtaken(proxy, store.record_step_complete(RUN, "a", "Succeeded", '"old"'), nth) as finishing:
        await other.retry_step(RUN, "a")
        await other.record_step_start(RUN, "a", "T", "new")
    await finishing
    assert await attempts(other) == [(1, "Succeeded", '"old"'), (2, "Running", "new")]
    assert await other.get_step_statuses(RUN) == {"a": "Running"}


async def test_a_holders_result_that_never_arrived_is_refused(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    await store.claim_step(RUN, "a", input_json="mine")
    async with overtaken(proxy, store.record_step_complete(RUN, "a", "Succeeded", '"old"'), 1, "held") as finishing:
        await other.retry_step(RUN, "a")
        await other.claim_step(RUN, "a", input_json="new")
    with pytest.raises(ClaimLostError):
        await finishing
    await let_go(proxy, "held")
    assert await attempts(other) == [(1, "Running", "mine"), (2, "Running", "new")]


async def test_a_result_whose_trace_is_gone_is_told_as_unknown(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    await other.record_step_start(RUN, "a", "T")
    async with overtaken(proxy, store.record_step_complete(RUN, "a", "Failed", error="x"), 2) as finishing:
        await other.delete_run(RUN)
        await other.record_step_start(RUN, "a", "T", "new")
    with pytest.raises(OutcomeUnknownError, match="others have written since"):
        await finishing
    assert await attempts(other) == [(1, "Running", "new")]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_skip_does_not_undo_a_reset(store: AnyStore, other: AnyStore, proxy: EtcdProxy, kind: str) -> None:
    skipping = store.record_skipped_step(RUN, "a", "T", PREREQUISITES_UNMET)
    async with overtaken(proxy, skipping, kind=kind) as skipped:
        await other.reset_cascade_skipped_dependents(RUN, ["a"])
    await skipped
    await let_go(proxy, kind)
    if kind == "lost":
        assert await other.get_step_statuses(RUN) == {}
        assert (await other.claim_step(RUN, "a")).attempt == 2
    else:  # there was nothing to reset yet
        assert await other.get_step_statuses(RUN) == {"a": "Skipped"}


async def test_a_skip_that_was_overtaken_leaves_the_next_attempt_alone(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    async with overtaken(proxy, store.record_skipped_step(RUN, "a", "T", PREREQUISITES_UNMET)) as skipped:
        await other.reset_cascade_skipped_dependents(RUN, ["a"])
        theirs = await other.claim_step(RUN, "a", input_json="theirs")
    await skipped
    assert await other.holds(theirs) is True
    assert await attempts(other) == [(1, "Skipped", None), (2, "Running", "theirs")]


@pytest.mark.parametrize("meanwhile", ["retried", "taken", "nothing"])
async def test_a_completion_gives_its_dispatches_whatever_came_after(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, meanwhile: str
) -> None:
    await other.try_record_dispatch(RUN, "theirs")
    claim = await store.claim_step(RUN, "a")
    completing = store.complete_step(claim, "Succeeded", output_json="1", dispatch=["n1", "theirs", "n2"])
    async with overtaken(proxy, completing) as completed:
        if meanwhile != "nothing":
            await other.retry_step(RUN, "a")
        if meanwhile == "taken":
            theirs = await other.claim_step(RUN, "a")
    assert await completed == {"n1", "n2"}
    assert await other.get_dispatched_step_keys(RUN) == {"n1", "theirs", "n2"}
    if meanwhile == "taken":
        assert await other.holds(theirs) is True


async def test_a_completion_that_never_arrived_dispatches_nothing(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    claim = await store.claim_step(RUN, "a")
    completing = store.complete_step(claim, "Succeeded", dispatch=["n1", "n2"])
    async with overtaken(proxy, completing, kind="held") as completed:
        await other.retry_step(RUN, "a")
    with pytest.raises(ClaimLostError):
        await completed
    await let_go(proxy, "held")
    assert await other.get_dispatched_step_keys(RUN) == frozenset()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_deferral_that_was_overtaken(store: AnyStore, other: AnyStore, proxy: EtcdProxy, kind: str) -> None:
    claim = await store.claim_step(RUN, "a")
    async with overtaken(proxy, store.defer_step(claim, reason="later"), kind=kind) as deferring:
        if kind == "held":
            await other.release_step_claim(RUN, "a")
        theirs = await other.claim_step(RUN, "a", input_json="theirs")
    if kind == "lost":
        await deferring
    else:
        with pytest.raises(ClaimLostError):
            await deferring
    await let_go(proxy, kind)
    assert await other.holds(theirs) is True
    first = "Pending" if kind == "lost" else "Running"
    assert await attempts(other) == [(1, first, None), (2, "Running", "theirs")]


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["claim and start", "claim only", "start only"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_retry_never_takes_the_next_holders_claim(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, kind: str, how: str
) -> None:
    await other.complete_step(await other.claim_step(RUN, "a"), "Failed", error="x")
    async with overtaken(proxy, store.retry_step(RUN, "a"), 2, kind) as retrying:
        if kind == "held":
            await other.retry_step(RUN, "a")
        if how != "start only":
            assert await other.try_claim_step(RUN, "a") is True
        if how != "claim only":
            assert await other.record_step_start(RUN, "a", "T", "theirs") == 2
    standing = await other.get_claim(RUN, "a")
    await retrying
    await let_go(proxy, kind)
    assert await other.get_claim(RUN, "a") == standing
    theirs = [] if how == "claim only" else [(2, "Running", "theirs")]
    assert await attempts(other) == [(1, "Failed", None), *theirs]


async def test_a_retry_of_a_step_without_an_attempt_takes_only_the_claim_that_it_saw(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    await other.try_claim_step(RUN, "a")
    async with overtaken(proxy, store.retry_step(RUN, "a"), 2) as retrying:
        assert await other.try_claim_step(RUN, "a") is True
        theirs = await other.get_claim(RUN, "a")
    await retrying
    assert await other.get_claim(RUN, "a") == theirs


@pytest.mark.parametrize("nth", [1, 2])
async def test_a_retry_takes_place_whichever_reply_was_lost(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, nth: int
) -> None:
    await other.start_run("f", "F", RUN, "manual")
    await other.complete_step(await other.claim_step(RUN, "a"), "Failed", error="x")
    await other.complete_run(RUN, "Failed")
    fault = proxy.drop_reply("Txn", nth)
    await store.retry_step(RUN, "a")
    assert fault.happened.is_set()
    assert await other.get_claim(RUN, "a") is None
    assert await other.get_step_statuses(RUN) == {"a": "Running"}
    assert await other.get_run_status(RUN) == "Running"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["runs", "completed by another"])
async def test_a_completed_run_that_was_retried_is_not_completed_again(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, then: str
) -> None:
    await other.start_run("f", "F", RUN, "manual")
    await other.complete_step(await other.claim_step(RUN, "a"), "Failed", error="x")
    async with overtaken(proxy, store.complete_run(RUN, "Failed")) as completing:
        await other.retry_step(RUN, "a")
        if then != "runs":
            assert await other.complete_run(RUN, "Cancelled") is True
    try:
        assert await completing is True
    except OutcomeUnknownError as unknown:
        assert "can't be told" in str(unknown)  # noqa: PT017 - either answer is right
    assert await other.get_run_status(RUN) == ("Running" if then == "runs" else "Cancelled")
    assert len(await other.get_active_runs()) == (then == "runs")


async def test_of_two_completions_the_one_that_never_arrived_is_told_so(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    await other.start_run("f", "F", RUN, "manual")
    async with overtaken(proxy, store.complete_run(RUN, "Failed"), kind="held") as completing:
        assert await other.complete_run(RUN, "Succeeded") is True
    assert await completing is False
    await let_go(proxy, "held")
    assert await other.get_run_status(RUN) == "Succeeded"


@pytest.mark.parametrize("call", ["request_cancel", "mark_timed_out"])
@pytest.mark.parametrize("meanwhile", ["configured", "the other asked", "asked again"])
async def test_the_first_who_asks_is_told_so_whatever_was_written_since(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, call: str, meanwhile: str
) -> None:
    async with overtaken(proxy, getattr(store, call)(RUN, "mine")) as asking:
        if meanwhile == "configured":
            await other.configure_run(RUN, "f", "manual")
        elif meanwhile == "asked again":
            assert await getattr(other, call)(RUN, "theirs") is False
            await other.configure_run(RUN, "f", "manual")
        else:
            await (other.mark_timed_out if call == "request_cancel" else other.request_cancel)(RUN, "theirs")
    assert await asking is True
    assert (await other.get_run_control(RUN)).cancel_reason == "mine"


@pytest.mark.parametrize("call", ["request_cancel", "mark_timed_out"])
async def test_who_asks_second_is_told_so(store: AnyStore, other: AnyStore, proxy: EtcdProxy, call: str) -> None:
    async with overtaken(proxy, getattr(store, call)(RUN, "mine"), kind="held") as asking:
        assert await getattr(other, call)(RUN, "theirs") is True
        await other.configure_run(RUN, "f", "manual")
    assert await asking is False
    await let_go(proxy, "held")
    assert (await other.get_run_control(RUN)).cancel_reason == "theirs"


# --- several claims --------------------------------------------------------------------------------------------------


async def held(store: AnyStore, number: int) -> None:
    """Wait until so many claims are held."""
    deadline = asyncio.get_running_loop().time() + 15
    while len(await store.get_claimed_step_keys(RUN)) != number:
        assert asyncio.get_running_loop().time() < deadline


async def test_claiming_several_releases_what_was_won_before_one_failed(
    store: AnyStore, other: AnyStore, etcd: EtcdServer, prefix: str
) -> None:
    etcd.etcdctl("put", f"{prefix}/runs/{RUN}/claims/c", "garbage")
    with pytest.raises(CorruptRecordError):
        await store.claim_steps(RUN, ["a", "b", "c", "d"])
    etcd.etcdctl("del", f"{prefix}/runs/{RUN}/claims/c")
    await held(other, 0)
    assert set(await other.claim_steps(RUN, ["a", "b", "c", "d"])) == {"a", "b", "c", "d"}


async def test_claiming_several_releases_what_was_won_before_one_stayed_in_doubt(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    store = await open_store(timeout=2.0, lease_ttl=None)
    several = [f"s{number}" for number in range(1100)]  # eight shared transactions side by side, then a ninth
    async with overtaken(proxy, store.claim_steps(RUN, several), 9) as claiming:
        await held(other, 1100)
        with pytest.raises(OutcomeUnknownError):
            await claiming
    await held(other, 0)


@pytest.mark.parametrize(("number", "lost"), [(4, 1), (300, 1), (300, 3)])
async def test_claiming_several_releases_all_when_its_task_is_cancelled(
    etcd: EtcdServer, proxy: EtcdProxy, prefix: str, number: int, lost: int
) -> None:
    """Also what is on its way beside the one that is waited for, and what was won before."""
    async with (
        AsyncEtcdRunStore.connect(proxy.endpoint, prefix=prefix) as store,
        AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as other,
    ):
        fault = proxy.drop_reply("Txn", lost, "silence")
        claiming = asyncio.create_task(store.claim_steps(RUN, [f"s{each}" for each in range(number)]))
        await asyncio.to_thread(eventually, fault.happened.is_set)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        await held(AnyStore(other, None), 0)  # type: ignore[arg-type]
        assert len(await other.claim_steps(RUN, [f"s{each}" for each in range(number)])) == number


# --- reads -----------------------------------------------------------------------------------------------------------


async def test_a_read_is_never_in_doubt(open_store: OpenStore, other: AnyStore, proxy: EtcdProxy) -> None:
    store = await open_store(timeout=1.5)
    await other.start_run("f", "F", RUN, "manual")
    for nth in range(1, 12):
        proxy.drop_reply("Txn", nth, "silence")
    with pytest.raises(DeadlineExceededError):
        await store.get_active_runs()


# --- answers that say nothing ----------------------------------------------------------------------------------------


class Muddle(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Passes all calls on to etcd; answers `spoiled` transactions with an error once etcd has carried them out.

    With `crowded` it refuses all transactions that follow, and etcd sees nothing of them.
    """

    def __init__(self, endpoint: str) -> None:
        self.spoiled = 0
        self.crowded = False
        self.answer = grpc.StatusCode.INTERNAL, "transport: something broke"
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(endpoint)

    def service(self, details: Any) -> Any:
        method = details.method
        if method.endswith("LeaseKeepAlive"):
            pass_on = self._channel.stream_stream(method, bytes, bytes)
            return grpc.stream_stream_rpc_method_handler(lambda requests, _: pass_on(requests), bytes, bytes)

        def answer(request: bytes, context: Any) -> Any:
            if method.endswith("/Txn") and self.crowded and not self.spoiled:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests")
            reply = self._channel.unary_unary(method, bytes, bytes)(request, timeout=5)
            with self._lock:
                spoil = method.endswith("/Txn") and self.spoiled > 0
                self.spoiled -= spoil
            if spoil:
                context.abort(*self.answer)
            return reply

        return grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)

    def close(self) -> None:
        self._channel.close()


@pytest.fixture
def muddle(etcd: EtcdServer) -> Iterator[tuple[Muddle, str]]:
    """Give a server between, and its endpoint; ask for it before stores, so that it outlives them."""
    between = Muddle(etcd.endpoint)
    with ThreadPoolExecutor(16) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((between,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield between, f"127.0.0.1:{port}"
        server.stop(0).wait()
    between.close()


MUDDLED = [
    (grpc.StatusCode.INTERNAL, "transport: something broke"),
    (grpc.StatusCode.UNKNOWN, "context deadline exceeded"),
    (grpc.StatusCode.UNKNOWN, "who knows"),
]


@pytest.mark.parametrize("answer", MUDDLED, ids=["internal", "late", "unknown"])
@pytest.mark.parametrize("lease_ttl", [30, None])
async def test_an_error_after_the_commit_leaves_no_claim_that_nobody_knows_of(
    muddle: tuple[Muddle, str], open_store: OpenStore, other: AnyStore, answer: Any, lease_ttl: float | None
) -> None:
    between, endpoint = muddle
    store = await open_store(endpoint, lease_ttl=lease_ttl)
    between.answer = answer
    between.spoiled = 1
    claim = await store.claim_step(RUN, "a")
    assert between.spoiled == 0
    assert await other.holds(claim) is True
    between.spoiled = 2
    try:
        claim = await store.claim_step(RUN, "b")
    except OutcomeUnknownError as unknown:
        assert unknown.definite is False  # noqa: PT017 - either answer is right
        deadline = asyncio.get_running_loop().time() + 15
        while await other.get_claim(RUN, "b") is not None:
            assert asyncio.get_running_loop().time() < deadline
    else:
        assert await other.holds(claim) is True
    assert store.session.state is SessionState.ACTIVE


@pytest.mark.parametrize("name", ["try_claim_step", "claim_step"])
async def test_the_claim_that_fills_etcds_space_is_granted_all_the_same(
    muddle: tuple[Muddle, str], open_store: OpenStore, other: AnyStore, name: str
) -> None:
    """It is carried out, and answered with an error."""
    between, endpoint = muddle
    store = await open_store(endpoint)
    between.answer = grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded"
    between.spoiled = 1
    assert await getattr(store, name)(RUN, "a")
    assert between.spoiled == 0
    info = await other.get_claim(RUN, "a")
    assert info is not None
    assert info.owner == store.session.owner
    await store.record_step_complete(RUN, "a", "Succeeded")


@pytest.mark.parametrize("answer", MUDDLED, ids=["internal", "late", "unknown"])
async def test_an_error_after_the_commit_of_a_write_is_told_as_unknown(
    muddle: tuple[Muddle, str], open_store: OpenStore, other: AnyStore, answer: Any
) -> None:
    between, endpoint = muddle
    store = await open_store(endpoint)
    claim = await store.claim_step(RUN, "a")
    between.answer = answer
    calls: list[tuple[Callable[[], Awaitable[Any]], Any]] = [
        (lambda: store.try_record_dispatch(RUN, "d"), True),
        (lambda: store.complete_step(claim, "Succeeded", dispatch=["n"]), {"n"}),
    ]
    for call, what in calls:
        between.spoiled = 1
        try:
            assert await call() == what
        except OutcomeUnknownError as unknown:
            assert unknown.definite is False  # noqa: PT017 - either answer is right
    assert await other.get_dispatched_step_keys(RUN) == {"d", "n"}
    assert await store.complete_step(claim, "Succeeded", dispatch=["n"]) == {"n"}


@pytest.mark.parametrize("call", ["dispatch", "complete", "complete, then retried"])
async def test_a_refusal_after_a_lost_reply_does_not_say_that_nothing_was_written(
    muddle: tuple[Muddle, str], open_store: OpenStore, other: AnyStore, call: str
) -> None:
    between, endpoint = muddle
    store = await open_store(endpoint, timeout=2.0)
    claim = await store.claim_step(RUN, "a")
    between.answer = grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out"
    between.crowded = True
    between.spoiled = 1
    writing = asyncio.ensure_future(
        store.try_record_dispatch(RUN, "d")
        if call == "dispatch"
        else store.complete_step(claim, "Succeeded", dispatch=["d"])
    )
    await asyncio.to_thread(eventually, lambda: between.spoiled == 0)
    if call == "complete, then retried":
        await other.retry_step(RUN, "a")
    try:
        assert await writing in (True, {"d"})
    except BackendError as told:
        assert told.definite is False, told  # noqa: PT017 - either answer is right
    between.crowded = False
    assert await other.get_dispatched_step_keys(RUN) == {"d"}
