"""What a store holds and remembers: nothing longer than it should, nothing that others have taken since."""

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest

from fix_stores import AnyStore, OpenStore, body_of
from servers import EtcdServer
from stepclaim import ClaimLostError, EtcdRunStore, StepClaimError
from stepclaim._core import again, claims, context, finishing, retention
from stepclaim._core.ops import Op
from stepclaim.testing import InMemoryBackend, InMemoryRunStore

RUN = "r"
Program = Generator[Op[Any], Any, Any]
SECRETLY = "file \udc80"
"""A lone surrogate, as `os.fsdecode` makes them of bytes that are no text."""


async def step_of(store: AnyStore, step_key: str) -> Any:
    await store.start_run("f", "F", RUN, "manual")
    (step,) = (each for each in (await store.get_run(RUN)).steps if each.step_key == step_key)
    return step


# --- bodies that end in another way ----------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Neither an Exception nor a cancellation."""


@pytest.mark.parametrize("lease_ttl", [30, None])
@pytest.mark.parametrize("kind_of_end", [SystemExit, GeneratorExit, Interrupted])
async def test_an_interrupted_body_leaves_nothing_held(
    open_store: OpenStore, kind_of_end: type[BaseException], lease_ttl: float | None
) -> None:
    store, other = await open_store(lease_ttl=lease_ttl), await open_store()
    with pytest.raises(kind_of_end):
        async with body_of(store, RUN, "a"):
            raise kind_of_end
    assert await other.get_claim(RUN, "a") is None
    assert await other.get_step_statuses(RUN) == {"a": "Pending"}
    assert (await other.claim_step(RUN, "a")).attempt == 2


async def test_a_generator_that_is_closed_leaves_nothing_held(open_store: OpenStore) -> None:
    store, other = await open_store(), await open_store()

    async def over_asyncio() -> AsyncIterator[Any]:
        async with store.raw.step(RUN, "a") as active:
            yield active

    def over_threads() -> Iterator[Any]:
        with store.raw.step(RUN, "a") as active:
            yield active

    if hasattr(store.raw.step(RUN, "-"), "__aenter__"):
        opened: Any = over_asyncio()
        assert await anext(opened) is not None
        await opened.aclose()
    else:
        opened = over_threads()
        assert await asyncio.to_thread(next, opened) is not None
        await asyncio.to_thread(opened.close)
    assert await other.get_claim(RUN, "a") is None
    assert await other.get_step_statuses(RUN) == {"a": "Pending"}


async def test_a_traceback_that_is_no_text_fails_the_step_and_goes_on(store: AnyStore) -> None:
    with pytest.raises(RuntimeError) as gone_on:
        async with body_of(store, RUN, "a"):
            raise RuntimeError(SECRETLY)
    assert str(gone_on.value) == SECRETLY
    step = await step_of(store, "a")
    assert (step.status, (await store.get_claim(RUN, "a")).state) == ("Failed", "sealed")
    assert "RuntimeError: file \\udc80" in step.error
    step.error.encode()


async def test_a_reason_that_is_no_text_leaves_nothing_held(store: AnyStore) -> None:
    with pytest.raises(StepClaimError):
        async with body_of(store, RUN, "a") as active:
            active.fail(SECRETLY)
    assert await gone(store, "a")


async def gone(store: AnyStore, step_key: str) -> bool:
    """Wait until nobody holds the step."""
    deadline = asyncio.get_running_loop().time() + 10
    while await store.get_claim(RUN, step_key) is not None:
        assert asyncio.get_running_loop().time() < deadline
    return True


# --- callers that go away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["etcd-asyncio", "memory-asyncio"])  # a thread can't be cancelled
@pytest.mark.parametrize("call", ["release", "release whatever", "complete", "defer"])
async def test_what_a_cancelled_task_has_begun_is_carried_through(open_store: OpenStore, call: str) -> None:
    store, other = await open_store(), await open_store()
    for turns in range(4):
        key = f"s{turns}"
        claim = await store.claim_step(RUN, key)
        calls: dict[str, Callable[[], Any]] = {
            "release": functools.partial(store.release_claim, claim),
            "release whatever": functools.partial(store.release_step_claim, RUN, key),
            "complete": functools.partial(store.complete_step, claim, "Succeeded"),
            "defer": functools.partial(store.defer_step, claim),
        }
        task = asyncio.create_task(calls[call]())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        ended = await asyncio.gather(task, return_exceptions=True)
        assert ended[0] in (None, True, frozenset()) or isinstance(ended[0], asyncio.CancelledError)
        if turns == 0:
            continue  # it was never begun
        deadline = asyncio.get_running_loop().time() + 10
        while await other.holds(claim):
            assert asyncio.get_running_loop().time() < deadline


# --- what others did since -------------------------------------------------------------------------------------------


async def test_a_result_without_a_start_does_nothing(open_store: OpenStore) -> None:
    store, other = await open_store(), await open_store()
    await other.record_step_start(RUN, "a", "T", "in")
    await other.record_step_complete(RUN, "a", "Failed", error="boom")
    await other.retry_step(RUN, "a")
    before = await step_of(other, "a")
    await store.record_step_complete(RUN, "a", "Succeeded", "1")
    assert await step_of(other, "a") == before
    assert [(each.status, each.error, each.output_json) for each in before.attempts] == [("Failed", "boom", None)]


async def test_a_result_without_a_start_does_nothing_by_the_holder_either(open_store: OpenStore) -> None:
    store, other = await open_store(), await open_store()
    await other.record_step_start(RUN, "a", "T", "in")
    await other.record_step_complete(RUN, "a", "Failed", error="boom")
    await other.retry_step(RUN, "a")
    before = await step_of(other, "a")
    assert await store.try_claim_step(RUN, "a") is True
    await store.record_step_complete(RUN, "a", "Succeeded", "1")
    assert await step_of(other, "a") == before
    assert (await other.get_claim(RUN, "a")).state == "held"
    assert await store.record_step_start(RUN, "a", "T") == 2
    await store.record_step_complete(RUN, "a", "Succeeded", "2")
    attempts = (await step_of(other, "a")).attempts
    assert [(each.status, each.error, each.output_json) for each in attempts] == [
        ("Failed", "boom", None),
        ("Succeeded", None, "2"),
    ]


async def test_why_a_step_was_skipped_by_its_holder_is_shown(store: AnyStore) -> None:
    claim = await store.claim_step(RUN, "a")
    await store.complete_step(claim, "Skipped", error="why", output_json="1")
    step = await step_of(store, "a")
    assert (step.status, step.error, step.output_json) == ("Skipped", "why", "1")
    await store.complete_step(claim, "Skipped", error="why", output_json="1")
    await store.record_step_start(RUN, "b", "T")
    await store.record_step_complete(RUN, "b", "Skipped", error="so")
    assert (await step_of(store, "b")).error == "so"


async def test_a_completion_that_is_told_again_gives_the_same_dispatches(open_store: OpenStore) -> None:
    store, other = await open_store(), await open_store()
    assert await other.try_record_dispatch(RUN, "theirs") is True
    claim = await store.claim_step(RUN, "a")
    told = [
        await each.complete_step(claim, "Succeeded", output_json="1", dispatch=["n", "theirs", "m"])
        for each in (store, store, other)
    ]
    assert told == [{"n", "m"}] * 3
    await other.annotate_dispatch(RUN, "n", "job")
    await other.release_dispatch(RUN, "m")
    assert await other.try_record_dispatch(RUN, "m") is True
    again_told = await store.complete_step(claim, "Succeeded", output_json="1", dispatch=["n", "theirs", "m"])
    assert again_told == {"n"}


# --- what is remembered of claims that others ended -----------------------------------------------------------------


def remembered(store: AnyStore) -> list[context.Holding]:
    holdings: dict[Any, Any] = store.raw._ctx._held
    return [each for taken in holdings.values() for each in (taken.values() if isinstance(taken, dict) else [taken])]


async def test_claims_that_others_ended_do_not_pile_up(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MOST_REMEMBERED", 20)
    store, other = await open_store(), await open_store()
    for number in range(50):
        await store.claim_step(RUN, f"s{number}", input_json="x")
        await other.release_step_claim(RUN, f"s{number}")
    assert len(remembered(store)) <= 20


async def test_claims_of_one_step_that_others_ended_do_not_pile_up(open_store: OpenStore) -> None:
    store, other = await open_store(), await open_store()
    for _ in range(30):
        assert await store.claim_step(RUN, "a", input_json="x") is not None
        await other.release_step_claim(RUN, "a")
    assert len(remembered(store)) <= 2


@pytest.mark.parametrize("kind", ["memory-threads", "memory-asyncio"])
async def test_the_payloads_of_claims_that_others_ended_are_not_kept_all(open_store: OpenStore) -> None:
    """A worker whose claims others end sees none of it: what it keeps to save a read must have a limit in bytes."""
    store, other = await open_store(), await open_store()
    for number in range(200):
        await store.claim_step(RUN, f"s{number}", input_json="x" * 200_000)
        await other.release_step_claim(RUN, f"s{number}")
    kept = [each.payload for each in remembered(store) if each.payload is not None]
    assert sum(len(each.input or "") for each in kept) <= 16_000_000


async def test_a_lost_claim_is_remembered_without_its_payload(open_store: OpenStore) -> None:
    store, other = await open_store(), await open_store()
    claim = await store.claim_step(RUN, "a", input_json="x" * 1000)
    await other.release_step_claim(RUN, "a")
    with pytest.raises(ClaimLostError):
        await store.complete_step(claim, "Succeeded")
    assert not any(each.payload for each in remembered(store))
    with pytest.raises(ClaimLostError):
        await store.record_step_start(RUN, "a", "T")


async def test_steps_that_this_store_ends_are_forgotten(store: AnyStore) -> None:
    for number in range(5):
        await store.complete_step(await store.claim_step(RUN, f"c{number}"), "Succeeded")
        await store.defer_step(await store.claim_step(RUN, f"d{number}"))
        await store.release_claim(await store.claim_step(RUN, f"r{number}"))
        await store.try_claim_step(RUN, f"w{number}")
        await store.release_step_claim(RUN, f"w{number}")
    assert remembered(store) == []


# --- between two operations of one call -----------------------------------------------------------------------------


class Stopped:
    """A program that stops before one of its operations, so that others can come between; then it goes on."""

    def __init__(self, store: Any, program: Program, after: int) -> None:
        self._store = store
        self._program = program
        self._operation: Op[Any] = next(program)
        for _ in range(after):
            self._operation = program.send(self._perform())

    def _perform(self) -> Any:
        return self._store._run(iter(self._operation))

    def finish(self) -> Any:
        try:
            while True:
                self._operation = self._program.send(self._perform())
        except StopIteration as stop:
            return stop.value

    def finish_after(self, meanwhile: Callable[[], None]) -> Any:
        """Carry out one more operation, and let others come between that and what the program makes of it."""
        reply = self._perform()
        meanwhile()
        try:
            self._operation = self._program.send(reply)
        except StopIteration as stop:
            return stop.value
        return self.finish()


@pytest.fixture(params=["etcd", "memory"])
def pair(request: pytest.FixtureRequest, etcd: EtcdServer, prefix: str) -> Iterator[tuple[Any, Any]]:
    """Give two stores for threads on the same keys: one whose calls can be stopped, another that comes between."""
    if request.param == "memory":
        backend = InMemoryBackend()
        with InMemoryRunStore(backend) as store, InMemoryRunStore(backend) as other:
            yield store, other
        return
    with (
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix) as store,
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix) as other,
    ):
        yield store, other


@pytest.mark.parametrize("call", ["retry", "release", "release whatever", "complete", "defer"])
def test_what_one_thread_ends_does_not_forget_what_another_has_taken(pair: tuple[Any, Any], call: str) -> None:
    """One thread's call has done its work but has not come back; another thread of the same store claims anew."""
    store, other = pair
    ctx = store._ctx
    claim = store.claim_step(RUN, "a")
    if call == "retry":
        store.complete_step(claim, "Failed", error="x")
    options: dict[str, tuple[Program, int]] = {
        "retry": (again.retry_step(ctx, RUN, "a"), 1),
        "release": (claims.release_claim(ctx, claim), 0),
        "release whatever": (claims.release_step(ctx, RUN, "a"), 1),
        "complete": (finishing.complete(ctx, claim, "Failed", None, None), 0),
        "defer": (finishing.defer(ctx, claim, None, dispatch=False), 0),
    }
    program, before = options[call]

    def take_anew() -> None:
        if call == "complete":
            other.release_step_claim(RUN, "a")
        assert store.try_claim_step(RUN, "a") is True

    Stopped(store, program, before).finish_after(take_anew)
    store.record_step_start(RUN, "a", "T")
    other.release_step_claim(RUN, "a")
    assert other.try_claim_step(RUN, "a") is True
    assert other.record_step_start(RUN, "a", "T") == 3
    with pytest.raises(ClaimLostError):
        store.record_step_complete(RUN, "a", "Succeeded", '"stale"')
    assert other.get_step_statuses(RUN) == {"a": "Running"}


def test_a_key_that_is_registered_while_its_run_goes_frees_itself_or_stays_with_it(pair: tuple[Any, Any]) -> None:
    for before in itertools.count():
        store, other = pair
        run, key = f"run-{before}", f"key-{before}"
        store.start_run("f", "F", run, "manual")
        try:
            removal = Stopped(store, retention.delete_run(store._ctx, run), before)
        except StopIteration:
            assert before > 1
            break
        registered = other.try_register_idempotency_key("f", "manual", key, run)
        removal.finish()
        if other.find_run_by_idempotency_key("f", "manual", key) is None:
            assert other.start_run("f", "F", f"new-{before}", "manual", idempotency_key=key).run_id == f"new-{before}"
            continue
        assert registered is True  # it came after the removal: the run that it stands for can be removed, too
        assert other.delete_run(run) is True
        assert other.find_run_by_idempotency_key("f", "manual", key) is None


@pytest.mark.parametrize("recorded", [True, False])
def test_a_removal_leaves_the_key_that_another_run_has_taken(pair: tuple[Any, Any], recorded: bool) -> None:
    """Two remove the same run; between the one's look and its removal the key goes over to another run."""
    for before in itertools.count():
        store, other = pair
        old, new, key = f"old-{before}", f"new-{before}", f"key-{before}"
        if recorded:
            store.start_run("f", "F", old, "manual", idempotency_key=key)
        else:
            store.try_register_idempotency_key("f", "manual", key, old)
        try:
            removal = Stopped(store, retention.delete_run(store._ctx, old), before)
        except StopIteration:
            assert before > 1
            break
        other.delete_run(old)
        assert other.start_run("f", "F", new, "manual", idempotency_key=key).run_id == new
        removal.finish()
        assert other.find_run_by_idempotency_key("f", "manual", key) == new
        assert other.start_run("f", "F", "third", "manual", idempotency_key=key).run_id == new
