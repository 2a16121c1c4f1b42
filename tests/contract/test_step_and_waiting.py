"""`step(...)`, `wait_for_step` and `watch_run`, on all four stores."""

import asyncio
import json
import threading
from typing import Any

import pytest

from fix_stores import AnyStore, OpenStore, body_of
from servers import eventually
from stepclaim import ClaimLostError, ClaimTimeoutError, ConfigurationError, StepStatus
from stepclaim.events import (
    ClaimEnded,
    ClaimSealed,
    ClaimTaken,
    ControlChanged,
    DispatchEnded,
    RunChanged,
    RunEvent,
    RunRemoved,
    StepChanged,
    StepDispatched,
    StepReset,
)

RUN = "r"


async def only_step(store: AnyStore) -> Any:
    await store.start_run("f", "F", RUN, "manual")
    (step,) = (await store.get_run(RUN)).steps
    return step


async def test_a_body_that_ends_has_succeeded(store: AnyStore) -> None:
    async with body_of(store, RUN, "a", step_type="T", input_json="1", job_id="j") as active:
        assert (active.run_id, active.step_key, active.attempt) == (RUN, "a", 1)
        assert not active.lost.is_set()
        active.output_json = "2"
    step = await only_step(store)
    assert (step.status, step.step_type, step.input_json, step.output_json) == ("Succeeded", "T", "1", "2")
    async with body_of(store, RUN, "a") as refused:
        assert refused is None


async def test_an_exception_fails_the_step_with_its_traceback(store: AnyStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with body_of(store, RUN, "a"):
            json.loads("1") / 0
    step = await only_step(store)
    assert step.status == "Failed"
    assert "Traceback (most recent call last)" in step.error
    assert "ZeroDivisionError: division by zero" in step.error
    assert await store.try_claim_step(RUN, "a") is False


async def test_a_long_traceback_is_cut_not_refused(open_store: OpenStore) -> None:
    store = await open_store(value_limit=300)
    with pytest.raises(RuntimeError):
        async with body_of(store, RUN, "a"):
            raise RuntimeError("ä" * 1000)
    step = await only_step(store)
    assert step.error.endswith("ä\n")
    assert len(step.error.encode()) <= 300


async def test_a_body_can_say_otherwise(store: AnyStore) -> None:
    async with body_of(store, RUN, "a") as active:
        active.fail("no", output_json="3")
    step = await only_step(store)
    assert (step.status, step.error, step.output_json) == ("Failed", "no", "3")
    async with body_of(store, RUN, "b") as active:
        active.defer("approval", dispatch=True)
    assert (await store.get_step_statuses(RUN))["b"] == "Pending"
    assert await store.get_claim(RUN, "b") is None
    assert await store.get_dispatched_step_keys(RUN) == {"b"}


async def test_a_lost_claim_is_told_and_the_result_refused(open_store: OpenStore) -> None:
    one, two = await open_store(owner="one"), await open_store(owner="two")

    async def take() -> Any:
        await two.release_step_claim(RUN, "a")
        return await two.claim_step(RUN, "a")

    with pytest.raises(ClaimLostError, match="no longer holds"):  # noqa: PT012 - the body is what is tested
        async with body_of(one, RUN, "a") as active:
            taking = asyncio.create_task(take())
            if isinstance(active.lost, threading.Event):
                assert await asyncio.to_thread(active.lost.wait, 10)
            else:
                await asyncio.Event().wait()  # only cancellation ends this
    assert await two.holds(await taking) is True
    assert await two.get_step_statuses(RUN) == {"a": "Running"}
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_cancelled_body_leaves_nothing_held(store: AnyStore) -> None:
    inside = asyncio.Event()

    async def body() -> None:
        async with body_of(store, RUN, "a"):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.get_claim(RUN, "a") is None
    assert await store.get_step_statuses(RUN) == {"a": StepStatus.PENDING}
    assert (await store.claim_step(RUN, "a")).attempt == 2


async def test_waiting_for_a_step(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    first = await one.claim_step(RUN, "a")
    with pytest.raises(ClaimTimeoutError) as late:
        await two.wait_for_step(RUN, "a", timeout=0.3)
    assert isinstance(late.value, TimeoutError)
    waiting = asyncio.create_task(two.wait_for_step(RUN, "a", timeout=20, step_type="T"))
    await asyncio.sleep(0)
    assert await one.holds(first)
    await one.release_claim(first)
    second = await waiting
    assert (second.attempt, await two.holds(second)) == (2, True)
    third = await two.wait_for_step(RUN, "free", timeout=1)
    assert third.attempt == 1
    for bad in (0, -1, None, "1", float("inf"), True):
        with pytest.raises(ConfigurationError, match="timeout"):
            await two.wait_for_step(RUN, "a", timeout=bad)


async def test_of_many_that_wait_each_gets_its_turn(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(3)]
    inside = 0
    tokens: list[int] = []

    async def turn(store: AnyStore) -> None:
        nonlocal inside
        claim = await store.wait_for_step(RUN, "a", timeout=30)
        inside += 1
        assert inside == 1
        assert await store.holds(claim)
        tokens.append(claim.fencing_token)
        inside -= 1
        await store.release_claim(claim)

    await asyncio.gather(*(turn(store) for store in stores for _ in range(4)))
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 12


async def watched(store: AnyStore, *, after: int | None, seen: list[RunEvent]) -> None:
    """Collect events up to the last act, under either face."""
    events: Any = store.raw.watch_run(RUN, after_revision=after, timeout=30)
    if hasattr(events, "__aiter__"):
        async for event in events:
            seen.append(event)
            if is_last(event):
                break
        await events.aclose()
        return

    def collect() -> None:
        for event in events:
            seen.append(event)
            if is_last(event):
                break
        events.close()

    await asyncio.to_thread(collect)


def is_last(event: RunEvent) -> bool:
    """Tell the last act."""
    return isinstance(event, RunRemoved) or (isinstance(event, StepDispatched) and event.step_key == "last")


async def act(store: AnyStore) -> None:
    """Do some of everything."""
    await store.start_run("f", "F", RUN, "manual")
    await store.try_record_dispatch(RUN, "a")
    claim = await store.claim_step(RUN, "a", input_json="1")
    await store.complete_step(claim, "Failed", error="x", dispatch=["b"])
    await store.record_skipped_step(RUN, "c", "T", "Prerequisite status did not satisfy runAfter conditions.")
    await store.retry_step(RUN, "a")
    await store.reset_cascade_skipped_dependents(RUN, ["c"])
    await store.request_cancel(RUN)
    await store.release_dispatch(RUN, "b")
    claim = await store.claim_step(RUN, "a")
    await store.release_claim(claim)
    await store.complete_run(RUN, "Cancelled")
    await store.try_record_dispatch(RUN, "last")


async def test_watching_tells_everything_once_in_order(open_store: OpenStore) -> None:
    actor, watcher = await open_store(), await open_store()
    live: list[RunEvent] = []
    watching = asyncio.create_task(watched(watcher, after=0, seen=live))
    await act(actor)
    behind: list[RunEvent] = []
    await watched(watcher, after=0, seen=behind)
    kinds = [type(event) for event in behind]
    assert {
        RunChanged, StepDispatched, ClaimTaken, StepChanged, ClaimSealed, ClaimEnded, StepReset, ControlChanged,
        DispatchEnded,
    } <= set(kinds)  # fmt: skip
    revisions = [event.revision for event in behind]
    assert revisions == sorted(revisions)
    assert len({(event.revision, type(event), getattr(event, "step_key", "")) for event in behind}) == len(behind)
    statuses = [event.status for event in behind if isinstance(event, StepChanged) and event.step_key == "a"]
    assert statuses == ["Running", "Failed", "Running", "Running"]
    for place, event in enumerate(behind[:-1]):
        if place % 5 == 0 or event.resume != event.revision:
            resumed: list[RunEvent] = []
            await watched(watcher, after=event.resume, seen=resumed)
            rest = [each for each in behind if each.revision > event.resume]
            assert resumed == rest
            assert rest[-(len(behind) - place - 1) :] == behind[place + 1 :]
    await watching
    assert live == behind


async def test_watching_begins_with_what_stands(open_store: OpenStore) -> None:
    actor, watcher = await open_store(), await open_store()
    await actor.start_run("f", "F", RUN, "manual")
    claim = await actor.claim_step(RUN, "a")
    seen: list[RunEvent] = []
    watching = asyncio.create_task(watched(watcher, after=None, seen=seen))
    await asyncio.to_thread(eventually, lambda: seen or watching.done())  # from the list on nothing may be missed
    await actor.complete_step(claim, "Succeeded")
    await actor.delete_run(RUN)
    await watching
    assert [type(event) for event in seen[:3]] == [RunChanged, ClaimTaken, StepChanged]
    assert {type(event) for event in seen[3:5]} == {ClaimSealed, StepChanged}
    assert isinstance(seen[-1], RunRemoved)
    assert [event.revision for event in seen] == sorted(event.revision for event in seen)
    with pytest.raises(ConfigurationError):
        await watched(watcher, after=-1, seen=[])
