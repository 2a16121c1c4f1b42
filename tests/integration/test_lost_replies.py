"""Replies that are lost after the commit, requests that arrive late, callers that go away: the outcome stays true.

Each test breaks a store that guesses: through a proxy that knows gRPC's calls, the answer of one call at a time is
dropped, or a request is held until long after its caller was told something.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import pytest

from fix_stores import AnyStore, OpenStore
from proxy import EtcdProxy
from servers import EtcdServer, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    ClaimLostError,
    DeadlineExceededError,
    OutcomeUnknownError,
    SessionState,
)
from stepclaim._core import ops
from stepclaim._core import steps as steps_module
from stepclaim._core.ops import (
    Begin,
    Fence,
    Finish,
    Get,
    Program,
    Put,
    Range,
    SessionView,
    Txn,
    read_key,
    read_prefix,
)

if TYPE_CHECKING:
    from collections.abc import Callable

RUN = "r"
HOWS = ("cut", "silence")


def keys(etcd: EtcdServer, prefix: str) -> list[str]:
    return etcd.etcdctl("get", "--prefix", prefix, "--keys-only").split()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("nth", [1, 2])
async def test_a_claim_recognises_its_own_win(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"], nth: int
) -> None:
    faults = [proxy.drop_reply("Txn", each, how) for each in range(1, nth + 1)]
    claim = await store.claim_step(RUN, "a", input_json="1")
    assert all(fault.happened.is_set() for fault in faults)
    info = await other.get_claim(RUN, "a")
    assert (info.fencing_token, info.owner) == (claim.fencing_token, claim.owner)
    assert await store.holds(claim) is True
    await store.complete_step(claim, "Succeeded")
    assert await other.get_step_statuses(RUN) == {"a": "Succeeded"}


@pytest.mark.parametrize("how", HOWS)
async def test_try_claim_recognises_its_own_win(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"]
) -> None:
    proxy.drop_reply("Txn", 1, how)
    assert await store.try_claim_step(RUN, "a") is True
    assert await store.try_claim_step(RUN, "a") is False
    assert await other.try_claim_step(RUN, "a") is False


@pytest.mark.parametrize("how", HOWS)
async def test_a_lost_race_stays_lost(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"]
) -> None:
    theirs = await other.claim_step(RUN, "a")
    proxy.drop_reply("Txn", 1, how)
    assert await store.claim_step(RUN, "a") is None
    assert await other.holds(theirs) is True


async def test_a_claim_that_comes_late_finds_the_door_shut(store: AnyStore, other: AnyStore, proxy: EtcdProxy) -> None:
    """The first request hangs; the second wins, is released; then the first arrives at last."""
    fault = proxy.hold_request("Txn", 1)
    assert await store.try_claim_step(RUN, "a") is True
    assert fault.happened.is_set()
    await store.release_step_claim(RUN, "a")
    await asyncio.to_thread(proxy.let_go)
    assert await other.get_claim(RUN, "a") is None
    assert (await other.claim_step(RUN, "a")).attempt == 1


async def test_a_late_claim_after_a_lost_race_finds_the_door_shut(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    fault = proxy.hold_request("Txn", 1)
    trying = asyncio.create_task(store.claim_step(RUN, "a"))
    await asyncio.to_thread(eventually, fault.happened.is_set)
    assert await other.try_claim_step(RUN, "a") is True
    assert await trying is None
    await other.release_step_claim(RUN, "a")
    await asyncio.to_thread(proxy.let_go)
    assert await other.get_claim(RUN, "a") is None


async def test_a_claim_whose_outcome_stays_unknown_leaves_nothing(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy, etcd: EtcdServer, prefix: str
) -> None:
    """The claim is granted, its reply lost, and then nothing gets through until the deadline."""
    store = await open_store(timeout=1.5, lease_ttl=60)
    fault = proxy.drop_reply("Txn", 1, "silence")
    trying = asyncio.create_task(store.claim_step(RUN, "a"))
    await asyncio.to_thread(eventually, fault.happened.is_set)
    assert await other.get_claim(RUN, "a") is not None
    proxy.blackhole(True)
    proxy.cut_all()
    began = asyncio.get_running_loop().time()
    with pytest.raises(OutcomeUnknownError, match="claim again"):
        await trying
    assert asyncio.get_running_loop().time() - began < 2.5
    proxy.blackhole(False)
    proxy.cut_all()
    await asyncio.to_thread(
        eventually, lambda: not any("/claims/" in key for key in keys(etcd, prefix)), 10.0, interval=0.1
    )
    assert (await store.claim_step(RUN, "a")).attempt == 2


async def test_an_unknown_claim_in_at_most_once_mode_is_undone_too(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    store = await open_store(timeout=1.5, lease_ttl=None)
    fault = proxy.drop_reply("Txn", 1, "silence")
    trying = asyncio.create_task(store.try_claim_step(RUN, "a"))
    await asyncio.to_thread(eventually, fault.happened.is_set)
    proxy.blackhole(True)
    proxy.cut_all()
    with pytest.raises(OutcomeUnknownError):
        await trying
    proxy.blackhole(False)
    proxy.cut_all()
    deadline = asyncio.get_running_loop().time() + 10
    while await other.get_claim(RUN, "a") is not None:
        assert asyncio.get_running_loop().time() < deadline
    assert await store.try_claim_step(RUN, "a") is True


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("nth", [1, 2])
async def test_completion(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"], nth: int
) -> None:
    claim = await store.claim_step(RUN, "a")
    for each in range(1, nth + 1):
        proxy.drop_reply("Txn", each, how)
    await store.complete_step(claim, "Succeeded", output_json="1")
    info = await other.get_claim(RUN, "a")
    assert (info.state, info.status) == ("sealed", "Succeeded")
    with pytest.raises(ClaimLostError):
        await store.complete_step(claim, "Failed")


async def test_a_completion_that_was_lost_before_others_went_on_is_told_as_done(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    """Committed, the reply lost, then the step is released and claimed anew before the retry: it did take place."""
    claim = await store.claim_step(RUN, "a")
    fault = proxy.drop_reply("Txn", 1, "silence")
    finishing = asyncio.create_task(store.complete_step(claim, "Succeeded", output_json="1"))
    await asyncio.to_thread(eventually, fault.happened.is_set)
    await other.release_step_claim(RUN, "a")
    theirs = await other.claim_step(RUN, "a")
    await finishing
    assert await other.holds(theirs) is True
    await other.start_run("f", "F", RUN, "manual")
    attempts = (await other.get_run(RUN)).steps[0].attempts
    assert [(each.status, each.output_json) for each in attempts] == [("Succeeded", "1"), ("Running", None)]


async def test_a_completion_that_never_arrived_is_told_as_lost(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    claim = await store.claim_step(RUN, "a")
    fault = proxy.hold_request("Txn", 1)
    finishing = asyncio.create_task(store.complete_step(claim, "Succeeded", output_json="1"))
    await asyncio.to_thread(eventually, fault.happened.is_set)
    await other.release_step_claim(RUN, "a")
    theirs = await other.claim_step(RUN, "a")
    with pytest.raises(ClaimLostError):
        await finishing
    await asyncio.to_thread(proxy.let_go)
    assert await other.holds(theirs) is True
    assert await other.get_step_statuses(RUN) == {"a": "Running"}


@pytest.mark.parametrize("how", HOWS)
async def test_deferral(store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"]) -> None:
    claim = await store.claim_step(RUN, "a")
    proxy.drop_reply("Txn", 1, how)
    await store.defer_step(claim, reason="later")
    assert await other.get_step_statuses(RUN) == {"a": "Pending"}
    assert await other.get_claim(RUN, "a") is None


@pytest.mark.parametrize("how", HOWS)
async def test_releases(store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"]) -> None:
    claim = await store.claim_step(RUN, "a")
    proxy.drop_reply("Txn", 1, how)
    try:
        assert await store.release_claim(claim) is True
    except OutcomeUnknownError as unknown:
        assert "gone" in str(unknown)  # noqa: PT017 - either answer is right
    assert await other.get_claim(RUN, "a") is None
    await store.try_claim_step(RUN, "b")
    proxy.drop_reply("Txn", 1, how)
    await store.release_step_claim(RUN, "b")
    assert await other.get_claim(RUN, "b") is None


async def test_a_late_release_never_removes_the_next_holders_claim(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    await store.try_claim_step(RUN, "a")
    proxy.hold_request("Txn", 1)
    await store.release_step_claim(RUN, "a")
    theirs = await other.claim_step(RUN, "a")
    await asyncio.to_thread(proxy.let_go)
    assert await other.holds(theirs) is True


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("claimed", [True, False])
async def test_starts_are_numbered_once(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"], claimed: bool
) -> None:
    if claimed:
        await store.try_claim_step(RUN, "a")
    for attempt in (1, 2):
        proxy.drop_reply("Txn", 1, how)
        assert await store.record_step_start(RUN, "a", "T", str(attempt)) == attempt
    await other.start_run("f", "F", RUN, "manual")
    step = (await other.get_run(RUN)).steps[0]
    assert [(each.attempt, each.input_json) for each in step.attempts] == [(1, "1"), (2, "2")]


@pytest.mark.parametrize("how", HOWS)
async def test_skips(store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"]) -> None:
    proxy.drop_reply("Txn", 1, how)
    await store.record_skipped_step(RUN, "a", "T", "reason", "{}")
    await other.start_run("f", "F", RUN, "manual")
    step = (await other.get_run(RUN)).steps[0]
    assert (step.status, step.error, step.attempt_count) == ("Skipped", "reason", 1)
    assert await other.try_claim_step(RUN, "a") is False


@pytest.mark.parametrize("how", HOWS)
async def test_runs_and_dispatches(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, how: Literal["cut", "silence"]
) -> None:
    proxy.drop_reply("Txn", 1, how)
    started = await store.start_run("f", "F", RUN, "manual")
    assert (await other.get_run(RUN)) == started
    proxy.drop_reply("Txn", 1, how)
    assert await store.try_record_dispatch(RUN, "a") is True
    proxy.drop_reply("Txn", 1, how)
    assert await store.complete_run(RUN, "Succeeded") is True
    assert await other.complete_run(RUN, "Failed") is False


async def test_a_write_that_stays_in_doubt_says_so_by_its_deadline(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy
) -> None:
    store = await open_store(timeout=1.5)
    claim = await store.claim_step(RUN, "a")
    fault = proxy.drop_reply("Txn", 1, "silence")
    finishing = asyncio.create_task(store.complete_step(claim, "Succeeded"))
    await asyncio.to_thread(eventually, fault.happened.is_set)
    proxy.blackhole(True)
    proxy.cut_all()
    with pytest.raises(OutcomeUnknownError):
        await asyncio.wait_for(finishing, 3.0)
    proxy.blackhole(False)
    assert await other.get_step_statuses(RUN) == {"a": "Succeeded"}
    await store.complete_step(claim, "Succeeded")


async def test_a_task_that_is_cancelled_in_its_claim_leaves_none(
    etcd: EtcdServer, proxy: EtcdProxy, prefix: str
) -> None:
    async with AsyncEtcdRunStore.connect(proxy.endpoint, prefix=prefix, lease_ttl=60) as store:
        for fault in (proxy.hold_request, proxy.drop_reply):
            order = fault("Txn", 1) if fault is proxy.hold_request else proxy.drop_reply("Txn", 1, "silence")
            trying = asyncio.create_task(store.claim_step(RUN, "a"))
            await asyncio.to_thread(eventually, order.happened.is_set)
            trying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await trying
            await asyncio.to_thread(
                eventually, lambda: not any("/claims/" in key for key in keys(etcd, prefix)), 10.0, interval=0.1
            )
            # the door shuts soon, in the background: a late arrival must then find it shut
            await asyncio.to_thread(eventually, lambda: not store._keeper._undone)  # type: ignore[union-attr]
            if fault is proxy.hold_request:
                await asyncio.to_thread(proxy.let_go)
            assert await store.get_claim(RUN, "a") is None
        assert store.session.state is SessionState.ACTIVE


async def test_a_release_that_was_cancelled_is_carried_through_once_etcd_can_be_reached_again(
    etcd: EtcdServer, proxy: EtcdProxy, prefix: str
) -> None:
    """Refused connections are certain to have had no effect; that is no reason to give the release up."""
    async with AsyncEtcdRunStore.connect(proxy.endpoint, prefix=prefix, lease_ttl=60) as store:
        claim = await store.claim_step(RUN, "a")
        assert claim is not None
        proxy.reset_calls()
        order = proxy.hold_request("Txn", 1)
        releasing = asyncio.create_task(store.release_claim(claim))
        await asyncio.to_thread(eventually, order.happened.is_set)
        proxy.refuse(True)
        proxy.cut_all()
        releasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await releasing
        refused_until = asyncio.get_running_loop().time() + 4.0  # longer than one try in the background
        while asyncio.get_running_loop().time() < refused_until:
            assert any("/claims/" in key for key in await asyncio.to_thread(keys, etcd, prefix))
        proxy.refuse(False)
        await asyncio.to_thread(
            eventually, lambda: not any("/claims/" in key for key in keys(etcd, prefix)), 10.0, interval=0.1
        )
        assert store.session.state is SessionState.ACTIVE


# --- reads that are under way while others are read ------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("nth", [2, 3])
async def test_a_page_whose_answer_is_lost_is_asked_for_again(
    open_store: OpenStore,
    other: AnyStore,
    proxy: EtcdProxy,
    how: Literal["cut", "silence"],
    nth: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps_module, "_FIRST_PAGE", 100)
    monkeypatch.setattr(ops, "SMALL_PAGE", 100)
    store = await open_store(attempt_timeout=0.5, timeout=20.0)
    steps = [f"s{number}" for number in range(300)]
    assert len(await other.claim_steps(RUN, steps)) == len(steps)
    proxy.reset_calls()
    fault = proxy.drop_reply("Range", nth, how)
    assert await store.get_step_statuses(RUN) == dict.fromkeys(steps, "Running")
    assert fault.happened.is_set()
    assert proxy.count("Range") == 4, "three pages, and one of them again"


# --- deadlines that have passed --------------------------------------------------------------------------------------


def _ahead(key: bytes) -> "Program[Any]":
    begun = yield Begin(Range(key=key, range_end=b""))
    return (yield Finish(begun))


@pytest.mark.parametrize(
    "program",
    [
        read_key,
        lambda key: read_key(key, shared=False),
        lambda key: read_prefix(key + b"/", shared=True),
        _ahead,
        lambda key: iter(Txn(compares=(), success=(Get(key),))),
        lambda key: iter(Txn(compares=(), success=(Put(key, b"never"),))),
        lambda key: iter(Fence(session=SessionView("s", "o", key, b"never", 0, 0, 1, 1))),
    ],
    ids=["a key", "a key alone", "a prefix", "ahead", "a look", "a write", "a fence"],
)
async def test_it_is_told_as_such_and_nothing_is_sent(
    store: AnyStore, proxy: EtcdProxy, prefix: str, program: "Callable[[bytes], Program[Any]]"
) -> None:
    """Whatever a program asks for then: its caller sees one error of our own."""
    proxy.reset_calls()

    async def run() -> Any:
        asked = program(f"{prefix}/x".encode())
        if isinstance(store.raw, AsyncEtcdRunStore):
            return await store.raw._run(asked, 1e-9)
        return await asyncio.to_thread(store.raw._run, asked, 1e-9)

    with pytest.raises(DeadlineExceededError):
        await run()
    assert proxy.count("Txn") == 0
