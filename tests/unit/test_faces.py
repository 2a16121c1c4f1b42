"""The face for threads and the face for asyncio, compared: names, signatures, docstrings, and what a base promises."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import pytest

from stepclaim import (
    AsyncEtcdRunStore,
    AsyncFlowRunRuntimeStore,
    EtcdRunStore,
    FlowRunRuntimeStore,
    StepStatus,
)
from stepclaim.async_run_store import AsyncRunStore
from stepclaim.run_store import RunStore
from stepclaim.testing import AsyncInMemoryRunStore, InMemoryRunStore

Pair = tuple[type, type]

PAIRS: list[Pair] = [
    (FlowRunRuntimeStore, AsyncFlowRunRuntimeStore),
    (RunStore, AsyncRunStore),
    (EtcdRunStore, AsyncEtcdRunStore),
    (InMemoryRunStore, AsyncInMemoryRunStore),
]

# They only make or tell something in this process, so nobody waits for them: not even on the asyncio face.
NOT_AWAITED = {"step", "watch_run", "connect", "from_client", "lose_session", "session"}

RunId = UUID | str


def members(face: type) -> dict[str, Any]:
    """Give what a face offers its callers, as it was defined: class methods and properties unbound."""
    names = [name for name in dir(face) if not name.startswith("_")]
    return {name: inspect.getattr_static(face, name) for name in names}


def function(member: Any) -> Callable[..., Any]:
    """Give the function behind a method, a class method or a property."""
    if isinstance(member, property):
        assert member.fget is not None
        return member.fget
    found: Callable[..., Any] = getattr(member, "__func__", member)
    return found


def signature(member: Any) -> inspect.Signature:
    """Give a signature; an iterator of one face is an asynchronous iterator of the other."""
    told = inspect.signature(function(member))
    return told.replace(return_annotation=str(told.return_annotation).removeprefix("Async"))


def docstring(member: Any) -> str | None:
    """Give what `help` shows."""
    return inspect.getdoc(member if isinstance(member, property) else function(member))


def methods() -> list[Any]:
    """Every public method of every face, once for the class that defines it."""
    faces = [face for pair in PAIRS for face in pair]
    return [
        pytest.param(member, id=f"{face.__name__}.{name}")
        for face in faces
        for name, member in members(face).items()
        if name in vars(face) and callable(function(member))
    ]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
class TestPair:
    """Every public method and property of one face has its twin on the other."""

    def test_the_same_names(self, pair: Pair) -> None:
        threads, tasks = map(members, pair)
        assert list(tasks) == list(threads)

    def test_the_same_kinds(self, pair: Pair) -> None:
        """A property stays a property, a class method a class method."""
        threads, tasks = map(members, pair)
        for name, member in threads.items():
            assert type(tasks[name]) is type(member), name

    def test_the_same_signatures(self, pair: Pair) -> None:
        """Names, order, kinds, defaults and annotations, the result's included."""
        threads, tasks = map(members, pair)
        for name, member in threads.items():
            assert signature(tasks[name]) == signature(member), name
        assert inspect.signature(pair[1]) == inspect.signature(pair[0])

    def test_the_same_docstrings(self, pair: Pair) -> None:
        threads, tasks = map(members, pair)
        for name, member in threads.items():
            assert docstring(tasks[name]) == docstring(member), name

    def test_one_is_awaited_and_the_other_is_not(self, pair: Pair) -> None:
        threads, tasks = map(members, pair)
        for name, member in threads.items():
            assert not inspect.iscoroutinefunction(function(member)), name
            assert inspect.iscoroutinefunction(function(tasks[name])) is (name not in NOT_AWAITED), name


def test_the_comparison_sees_the_whole_interface() -> None:
    """A comparison of nothing with nothing would pass, too."""
    assert set(members(FlowRunRuntimeStore)) == {
        "try_claim_step",
        "release_step_claim",
        "get_claimed_step_keys",
        "get_step_statuses",
        "record_skipped_step",
        "record_skipped_step_with_trace",
        "get_run_status",
    }
    assert {"claim_step", "complete_step", "connect", "from_client", "session", "close"} <= set(members(EtcdRunStore))
    assert {"claim_step", "complete_step", "lose_session", "session", "close"} <= set(members(InMemoryRunStore))


def test_a_store_opens_and_closes_as_its_face_does() -> None:
    for threads, tasks in PAIRS[2:]:
        assert {"__enter__", "__exit__"} <= set(dir(threads))
        assert {"__aenter__", "__aexit__"} <= set(dir(tasks))
        assert not {"__aenter__", "__aexit__"} & set(dir(threads))
        assert not {"__enter__", "__exit__"} & set(dir(tasks)), "a plain `with` would leave it open"


@pytest.mark.parametrize("member", methods())
def test_a_public_method_says_what_it_does(member: Any) -> None:
    """One line that ends as a sentence does; what follows stands apart from it."""
    said = docstring(member)
    assert said
    summary, *rest = said.splitlines()
    assert summary.rstrip().endswith(".")
    assert not rest or not rest[0].strip()


@pytest.mark.parametrize(("face", "base"), [(pair[n], PAIRS[0][n]) for pair in PAIRS[1:] for n in (0, 1)])
def test_a_store_keeps_the_published_interface(face: type, base: type) -> None:
    assert issubclass(face, base)
    offered = members(face)
    for name, member in members(base).items():
        assert inspect.signature(function(offered[name])) == inspect.signature(function(member)), name


@pytest.mark.parametrize("face", [face for pair in PAIRS[2:] for face in pair])
def test_a_store_lacks_nothing_and_inherits_no_fallback(face: type) -> None:
    assert not inspect.isabstract(face)
    for name in ("release_step_claim", "record_skipped_step_with_trace"):
        assert getattr(face, name) not in {getattr(base, name) for base in PAIRS[0]}, name


async def test_the_stores_are_what_their_bases_say() -> None:
    with InMemoryRunStore() as threads:
        assert isinstance(threads, FlowRunRuntimeStore)
        assert not isinstance(threads, AsyncFlowRunRuntimeStore)
    async with AsyncInMemoryRunStore() as tasks:
        assert isinstance(tasks, AsyncFlowRunRuntimeStore)
        assert not isinstance(tasks, FlowRunRuntimeStore)


class OwnStore(FlowRunRuntimeStore):
    """A user's store with nothing but what it must have; written for four arguments, before there were traces."""

    def __init__(self) -> None:
        self.claimed: set[tuple[RunId, str]] = set()
        self.skipped: list[tuple[RunId, str, str, str | None]] = []

    def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        before = len(self.claimed)
        self.claimed.add((run_id, step_key))
        return len(self.claimed) > before

    def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        return frozenset(step for run, step in self.claimed if run == run_id)

    def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        return {step: StepStatus.SKIPPED for run, step, *_ in self.skipped if run == run_id}

    def record_skipped_step(  # type: ignore[override]  # four arguments: that it works nonetheless is the point
        self, run_id: RunId, step_key: str, step_type: str, reason: str | None
    ) -> None:
        self.skipped.append((run_id, step_key, step_type, reason))

    def get_run_status(self, run_id: RunId) -> str | None:
        return "Running" if self.get_claimed_step_keys(run_id) else None


class OwnAsyncStore(AsyncFlowRunRuntimeStore):
    """The same for asyncio."""

    def __init__(self) -> None:
        self.inner = OwnStore()

    async def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        return self.inner.try_claim_step(run_id, step_key)

    async def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        return self.inner.get_claimed_step_keys(run_id)

    async def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        return self.inner.get_step_statuses(run_id)

    async def record_skipped_step(  # type: ignore[override]  # as above
        self, run_id: RunId, step_key: str, step_type: str, reason: str | None
    ) -> None:
        self.inner.record_skipped_step(run_id, step_key, step_type, reason)

    async def get_run_status(self, run_id: RunId) -> str | None:
        return self.inner.get_run_status(run_id)


def test_a_store_without_release_still_works() -> None:
    store = OwnStore()
    assert store.try_claim_step("r", "a")
    store.release_step_claim("r", "a")
    store.release_step_claim("nobody's", "b")
    assert not store.try_claim_step("r", "a")
    assert store.get_claimed_step_keys("r") == {"a"}


async def test_an_asyncio_store_without_release_still_works() -> None:
    store = OwnAsyncStore()
    assert await store.try_claim_step("r", "a")
    await store.release_step_claim("r", "a")
    await store.release_step_claim("nobody's", "b")
    assert not await store.try_claim_step("r", "a")
    assert await store.get_claimed_step_keys("r") == {"a"}


def test_a_trace_is_dropped_where_a_store_takes_four_arguments() -> None:
    store = OwnStore()
    store.record_skipped_step_with_trace("r", "a", "T", "why", '{"trace": 1}')
    store.record_skipped_step_with_trace("r", "b", "T", None, None)
    assert store.skipped == [("r", "a", "T", "why"), ("r", "b", "T", None)]


async def test_a_trace_is_dropped_where_an_asyncio_store_takes_four_arguments() -> None:
    store = OwnAsyncStore()
    await store.record_skipped_step_with_trace("r", "a", "T", "why", '{"trace": 1}')
    await store.record_skipped_step_with_trace("r", "b", "T", None, None)
    assert store.inner.skipped == [("r", "a", "T", "why"), ("r", "b", "T", None)]


@pytest.mark.parametrize("missing", ["try_claim_step", "get_run_status", "record_skipped_step"])
@pytest.mark.parametrize("own", [OwnStore, OwnAsyncStore])
def test_a_store_that_lacks_a_method_can_not_be_made(own: type, missing: str) -> None:
    base = own.__bases__[0]
    lacking = type("Lacking", (own,), {missing: getattr(base, missing)})
    with pytest.raises(TypeError, match=missing):
        lacking()
