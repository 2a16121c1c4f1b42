"""Calls of one process that share transactions: what goes over the wire, and that each is told the truth.

Most tests keep a first call's request on its way until all others wait behind it: then it is certain what goes
together. What etcd holds and has ever held is read past the store.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import grpc
import pytest
from etcd3 import etcdrpc

from fix_stores import AnyStore, gated
from proxy import EtcdProxy
from servers import AuthEtcd, EtcdServer, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    ClaimLostError,
    OutcomeUnknownError,
    RecordTooLargeError,
    StepClaim,
    StepConflictError,
)
from stepclaim._core.keys import last_segment
from stepclaim.embedded import EmbeddedEtcd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import ThreadPoolExecutor

    from fix_stores import OpenStore

RUN = "r"
CALLERS = 64
HOWS = ("cut", "silence")
PATIENT: dict[str, Any] = {"attempt_timeout": 5.0, "timeout": 30.0, "lease_ttl": 60}
"""For a busy machine: nobody's turn comes too late."""
HASTY = {**PATIENT, "attempt_timeout": 1.0}
"""Where an answer is waited for that does not come."""


@pytest.fixture
async def store(open_store: OpenStore) -> AnyStore:
    """Give a store behind the proxy."""
    return await open_store(**PATIENT)


# --- what etcd holds, and held ---------------------------------------------------------------------------------------


class Truth:
    """Reads etcd past all stores."""

    def __init__(self, endpoint: str, prefix: str, metadata: Any = ()) -> None:
        self._channel = grpc.insecure_channel(endpoint)
        self._prefix = f"{prefix}/runs/".encode()
        self._metadata = metadata
        self._began = self._range().header.revision

    def close(self) -> None:
        self._channel.close()

    def _range(self) -> Any:
        request = etcdrpc.RangeRequest(key=self._prefix, range_end=self._prefix[:-1] + b"0")
        return etcdrpc.KVStub(self._channel).Range(request, timeout=10, metadata=self._metadata)

    def keys(self, part: str) -> dict[str, Any]:
        """Give one part of the run: claims, steps, dispatches."""
        below = self._prefix + f"{RUN}/{part}/".encode()
        return {last_segment(kv.key): kv for kv in self._range().kvs if kv.key.startswith(below)}

    def dump(self) -> dict[bytes, tuple[bytes, int, int, int]]:
        """Give all that stands."""
        return {kv.key: (kv.value, kv.create_revision, kv.mod_revision, kv.lease) for kv in self._range().kvs}

    def writes(self) -> int:
        """Count the transactions that have changed anything since the test began, from etcd's own history."""
        marker = self._prefix + b"~"
        kv = etcdrpc.KVStub(self._channel)
        kv.Put(etcdrpc.PutRequest(key=marker), timeout=10)
        watch = etcdrpc.WatchCreateRequest(
            key=self._prefix, range_end=self._prefix[:-1] + b"0", start_revision=self._began + 1
        )
        answers = etcdrpc.WatchStub(self._channel).Watch(iter([etcdrpc.WatchRequest(create_request=watch)]), timeout=30)
        seen: set[int] = set()
        for answer in answers:
            for event in answer.events:
                if event.kv.key == marker:
                    answers.cancel()
                    kv.DeleteRange(etcdrpc.DeleteRangeRequest(key=marker), timeout=10)
                    self._began = event.kv.mod_revision + 1
                    return len(seen)
                seen.add(event.kv.mod_revision)
        raise AssertionError("etcd ended the watch")


@pytest.fixture
def truth(etcd: EtcdServer, prefix: str) -> Iterator[Truth]:
    made = Truth(etcd.endpoint, prefix)
    yield made
    made.close()


def tokens(claims: Sequence[StepClaim]) -> dict[str, int]:
    return {claim.step_key: claim.fencing_token for claim in claims}


def held(truth: Truth) -> dict[str, int]:
    """Give all claims that stand, by the token that their holders must have."""
    return {name: kv.create_revision for name, kv in truth.keys("claims").items()}


def writing(proxy: EtcdProxy) -> int:
    """Count the transactions that would write if they succeeded, by themselves or in a member."""

    def any_write(request: Any) -> bool:
        kinds = [op.WhichOneof("request") for op in request.success]
        nested = (op.request_txn for op in request.success)
        return not {"request_put", "request_delete_range"}.isdisjoint(kinds) or any(map(any_write, nested))

    requests = [call.request for call in list(proxy.calls) if call.method == "Txn"]
    return sum(any_write(etcdrpc.TxnRequest.FromString(request)) for request in requests)


def fences(proxy: EtcdProxy) -> int:
    """Count the rewritings of a session's key."""
    requests = [call.request for call in list(proxy.calls) if call.method == "Txn"]
    compares = [compare for request in requests for compare in etcdrpc.TxnRequest.FromString(request).compare]
    return sum(b"/sessions/" in compare.key and compare.create_revision > 0 for compare in compares)


# --- calls that gather -----------------------------------------------------------------------------------------------


async def until(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    await asyncio.to_thread(eventually, condition, timeout)


async def queued(store: AnyStore, count: int) -> None:
    """Wait until so many calls wait behind one that is under way."""
    await until(lambda: len(store.raw._client.committer._queue.waiting) == count)


async def gathering(
    proxy: EtcdProxy, store: AnyStore, first: Callable[[], Any], calls: Sequence[Callable[[], Any]]
) -> list[asyncio.Task[Any]]:
    """Hold a first call's request until all others wait behind it, for one flight of all; gives all of them."""
    store.raw._client.committer.flights = 1
    fault = proxy.hold_request("Txn", 1)
    tasks = [asyncio.ensure_future(first())]
    await until(fault.happened.is_set)
    tasks += [asyncio.ensure_future(call()) for call in calls]
    await queued(store, len(calls))
    return tasks


async def together(
    proxy: EtcdProxy, store: AnyStore, first: Callable[[], Any], calls: Sequence[Callable[[], Any]]
) -> list[Any]:
    """Let calls share one transaction, behind a first one, and give what all of them are told."""
    tasks = await gathering(proxy, store, first, calls)
    await asyncio.to_thread(proxy.let_go)
    return await asyncio.gather(*tasks, return_exceptions=True)


def each(call: Callable[..., Any], argument: Any) -> list[Callable[[], Any]]:
    """Make the same call for each of some arguments."""
    return [functools.partial(call, one) for one in argument]


async def claimed(store: AnyStore, keys: Sequence[str]) -> list[StepClaim]:
    claims = await gated([functools.partial(store.claim_step, RUN, key) for key in keys])
    assert None not in claims
    return claims


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["try_claim_step", "claim_step"])
async def test_of_the_same_claims_one_is_written(store: AnyStore, proxy: EtcdProxy, truth: Truth, name: str) -> None:
    """However many want the step: one transaction that writes, and one look for all who came meanwhile."""
    claim = functools.partial(getattr(store, name), RUN, "a")
    proxy.reset_calls()
    told = await together(proxy, store, claim, [claim] * (CALLERS - 1))
    assert sorted(map(bool, told)) == [False] * (CALLERS - 1) + [True]
    assert (writing(proxy), truth.writes()) == (1, 1)
    assert proxy.count("Txn") + proxy.count("Range") == 2
    assert truth.keys("claims")["a"].version == 1
    # and as it comes, without anybody being held back
    proxy.reset_calls()
    told = await gated([functools.partial(getattr(store, name), RUN, "b")] * CALLERS)
    assert sorted(map(bool, told)) == [False] * (CALLERS - 1) + [True]
    assert truth.writes() == 1
    assert writing(proxy) <= CALLERS // 4, "only who comes when nothing is under way tries it by itself"


async def test_the_same_claims_of_a_step_that_somebody_has_cost_one(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, truth: Truth
) -> None:
    theirs = await other.claim_step(RUN, "a")
    truth.writes()
    proxy.reset_calls()
    told = await together(
        proxy, store, functools.partial(store.try_claim_step, RUN, "first"),
        [functools.partial(store.try_claim_step, RUN, "a"), functools.partial(store.claim_step, RUN, "a")] * 30,
    )  # fmt: skip
    assert [bool(one) for one in told] == [True] + [False] * 60
    assert (proxy.count("Txn"), truth.writes()) == (2, 1)
    assert await other.holds(theirs)


async def test_the_same_claims_of_a_step_that_was_begun_before_cost_few(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, truth: Truth
) -> None:
    """None of them knows of the attempt before: what the first is shown is shown to all."""
    await other.defer_step(await other.claim_step(RUN, "a"))
    truth.writes()
    proxy.reset_calls()
    _, *told = await together(
        proxy, store, functools.partial(store.try_claim_step, RUN, "first"),
        [functools.partial(store.claim_step, RUN, "a")] * (CALLERS - 1),
    )  # fmt: skip
    (won,) = [one for one in told if one is not None]
    assert (won.attempt, tokens([won])["a"]) == (2, held(truth)["a"])
    print(proxy.count(), "requests")
    assert truth.writes() == 2
    assert proxy.count() <= 6


KINDS: dict[str, tuple[bool, Callable[[AnyStore, Any], Any], Any]] = {
    "try_claim_step": (False, lambda store, key: store.try_claim_step(RUN, key), True),
    "claim_step": (False, lambda store, key: store.claim_step(RUN, key, step_type="T", input_json="{}"), StepClaim),
    "complete_step": (
        True, lambda store, claim: store.complete_step(claim, "Succeeded", output_json="1"), frozenset()
    ),
    "complete_step with successors": (
        True,
        lambda store, claim: store.complete_step(claim, "Failed", error="e", dispatch=[f"{claim.step_key}.next"]),
        None,
    ),
    "defer_step": (True, lambda store, claim: store.defer_step(claim, dispatch=True), None),
    "release_claim": (True, lambda store, claim: store.release_claim(claim), True),
    "try_record_dispatch": (False, lambda store, key: store.try_record_dispatch(RUN, key), True),
    "record_skipped_step": (False, lambda store, key: store.record_skipped_step(RUN, key, "T", "reason"), None),
}  # fmt: skip
"""Whether it is about a claim, the call, and what is told."""
LEFT = {
    "try_claim_step": ("held", None, False),
    "claim_step": ("held", "Running", False),
    "complete_step": ("sealed", "Succeeded", False),
    "complete_step with successors": ("sealed", "Failed", True),
    "defer_step": (None, "Pending", True),
    "release_claim": (None, "Running", False),
    "try_record_dispatch": (None, None, True),
    "record_skipped_step": ("sealed", "Skipped", False),
}
"""The claim's state, the step's status, and whether there is an entry in the ledger."""


@pytest.mark.parametrize("kind", KINDS)
async def test_different_steps_go_together(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, truth: Truth, kind: str
) -> None:
    """Two transactions for 64 calls: the first, which went alone, and one for all who came while it was under way."""
    with_claim, call, answer = KINDS[kind]
    keys = [f"s{number}" for number in range(CALLERS)]
    subjects: Sequence[Any] = await claimed(store, keys) if with_claim else keys
    truth.writes()
    proxy.reset_calls()
    first, *others = each(functools.partial(call, store), subjects)
    told = await together(proxy, store, first, others)
    assert proxy.count() == proxy.count("Txn") == writing(proxy) == 2
    assert truth.writes() == 2
    if kind == "claim_step":
        assert tokens(told) == held(truth)
        assert await gated(each(other.holds, told)) == [True] * CALLERS
    elif kind == "complete_step with successors":
        assert told == [frozenset({f"{key}.next"}) for key in keys]
    else:
        assert told == [answer] * CALLERS
    claims = {info.step_key: str(info.state) for info in await other.get_claims(RUN)}
    statuses = await other.get_step_statuses(RUN)
    ledger = await other.get_dispatched_step_keys(RUN)
    dispatched = {key.removesuffix(".next") for key in ledger}
    assert [(claims.get(key), statuses.get(key), key in dispatched) for key in keys] == [LEFT[kind]] * CALLERS


async def test_what_many_threads_or_tasks_do_over_and_over_takes_few_requests(
    store: AnyStore, proxy: EtcdProxy, truth: Truth
) -> None:
    """Nobody is held back here: while one transaction is under way the next collects, by itself."""

    async def work(name: str) -> None:
        for turn in range(4):
            claim = await store.claim_step(RUN, f"{name}.{turn}", input_json="{}")
            await store.complete_step(claim, "Succeeded")

    proxy.reset_calls()
    await asyncio.gather(*(work(f"s{number}") for number in range(CALLERS)))
    assert proxy.count() < 2 * 4 * CALLERS / 3
    assert all(kv.version == 2 for kv in truth.keys("steps").values())
    assert len(truth.keys("steps")) == 4 * CALLERS


# --- one batch of everything -----------------------------------------------------------------------------------------


async def test_where_what_was_asked_as_one_is_refused_each_has_its_own_outcome(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, truth: Truth
) -> None:
    """One condition of many does not hold: nothing is done, and then all but that one."""
    mine = dict(zip(("done", "back"), await claimed(store, ("done", "back")), strict=True))
    theirs = await other.claim_step(RUN, "theirs")
    calls: list[Callable[[], Any]] = [
        *(functools.partial(store.claim_step, RUN, f"free {number}") for number in range(10)),
        functools.partial(store.try_claim_step, RUN, "theirs"),
        functools.partial(store.complete_step, mine["done"], "Succeeded", output_json="1"),
        functools.partial(store.release_claim, mine["back"]),
    ]
    truth.writes()
    proxy.reset_calls()
    first, *told = await together(proxy, store, functools.partial(store.try_claim_step, RUN, "first"), calls)
    assert first is True
    assert tokens(told[:10]).items() <= held(truth).items()
    assert told[10:] == [False, frozenset(), True]
    assert (truth.writes(), proxy.count("Txn")) == (2, 3)
    asked = [etcdrpc.TxnRequest.FromString(call.request) for call in proxy.calls if call.method == "Txn"]
    nested = [sum(op.HasField("request_txn") for op in request.success) for request in asked]
    assert nested == [0, 0, len(calls)]
    assert theirs is not None
    assert await other.holds(theirs)
    assert set(held(truth)) == {"first", "theirs", "done", *(f"free {number}" for number in range(10))}


async def test_in_one_transaction_each_has_its_own_outcome(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, truth: Truth
) -> None:
    names = ("done", "lost", "successors", "later", "back", "back too late")
    mine = dict(zip(names, await claimed(store, names), strict=True))
    theirs = await other.claim_step(RUN, "theirs")
    for key in ("lost", "back too late"):
        await other.release_step_claim(RUN, key)
        assert await other.try_claim_step(RUN, key)
    for key in ("entered", "entered, too"):
        await other.try_record_dispatch(RUN, key)
    await other.record_skipped_step(RUN, "skipped", "T", "reason")
    other_claims = await asyncio.gather(*(other.get_claim(RUN, key) for key in ("lost", "back too late", "theirs")))
    expected: list[tuple[Callable[[], Any], Any]] = [
        (functools.partial(store.try_claim_step, RUN, "free"), True),
        (functools.partial(store.try_claim_step, RUN, "theirs"), False),
        (functools.partial(store.claim_step, RUN, "theirs"), None),
        (functools.partial(store.claim_step, RUN, "skipped"), None),
        (functools.partial(store.complete_step, mine["done"], "Succeeded", output_json="1"), frozenset()),
        (functools.partial(store.complete_step, mine["lost"], "Succeeded"), ClaimLostError),
        (
            functools.partial(store.complete_step, mine["successors"], "Failed", dispatch=["entered", "new"]),
            frozenset({"new"}),
        ),
        (functools.partial(store.defer_step, mine["later"], reason="later", dispatch=True), None),
        (functools.partial(store.release_claim, mine["back"]), True),
        (functools.partial(store.release_claim, mine["back too late"]), False),
        (functools.partial(store.try_record_dispatch, RUN, "newer"), True),
        (functools.partial(store.try_record_dispatch, RUN, "entered, too"), False),
        (functools.partial(store.record_skipped_step, RUN, "skip", "T", "reason"), None),
        (functools.partial(store.record_skipped_step, RUN, "lost", "T", "reason"), StepConflictError),
        (functools.partial(store.record_step_start, RUN, "unclaimed", "T"), 1),
    ]
    proxy.reset_calls()
    _, *told = await together(
        proxy, store, functools.partial(store.try_claim_step, RUN, "first"), [call for call, _ in expected]
    )
    shared = etcdrpc.TxnRequest.FromString([call for call in proxy.calls if call.method == "Txn"][1].request)
    # all of them but the second claim of `theirs`, which is told what the first found, and a second write to `lost`
    assert len(shared.success) == len(expected) - 2
    for one, (call, answer) in zip(told, expected, strict=True):
        if isinstance(answer, type):
            assert isinstance(one, answer), (call, one)
        else:
            assert one == answer, (call, one)
    for key, info in zip(("lost", "back too late", "theirs"), other_claims, strict=True):
        assert await other.get_claim(RUN, key) == info, "a refused write changes nothing"
    assert await other.holds(theirs)
    states = {info.step_key: str(info.state) for info in await other.get_claims(RUN)}
    assert states == {
        "first": "held", "free": "held", "theirs": "held", "lost": "held", "back too late": "held",
        "done": "sealed", "successors": "sealed", "skipped": "sealed", "skip": "sealed",
    }  # fmt: skip
    assert await other.get_step_statuses(RUN) == {
        "theirs": "Running", "done": "Succeeded", "lost": "Running", "successors": "Failed", "later": "Pending",
        "back": "Running", "back too late": "Running", "skipped": "Skipped", "skip": "Skipped", "unclaimed": "Running",
    }  # fmt: skip
    assert await other.get_dispatched_step_keys(RUN) == {"entered", "entered, too", "new", "newer", "later"}
    assert truth.keys("dispatches")["entered"].version == 1


# --- what gets lost on the way ---------------------------------------------------------------------------------------


class Mixed:
    """Claims, results, deferrals, releases, entries and skips, eight or more of each, all of different steps."""

    def __init__(self, store: AnyStore) -> None:
        self.store = store

    async def prepare(self) -> list[Callable[[], Any]]:
        """Take the claims that some are about; gives the calls."""
        store = self.store
        self.new = [f"new{number}" for number in range(8)]
        self.started = [f"started{number}" for number in range(15)]
        self.done, self.later, self.back = [
            await claimed(store, [f"{name}{number}" for number in range(8)]) for name in ("done", "later", "back")
        ]
        return [
            *(functools.partial(store.try_claim_step, RUN, key) for key in self.new),
            *(functools.partial(store.claim_step, RUN, key, input_json="1") for key in self.started),
            *(functools.partial(store.complete_step, one, "Succeeded", dispatch=["successor"]) for one in self.done),
            *(functools.partial(store.defer_step, one) for one in self.later),
            *(functools.partial(store.release_claim, one) for one in self.back),
            *(functools.partial(store.try_record_dispatch, RUN, f"entry{number}") for number in range(8)),
            *(functools.partial(store.record_skipped_step, RUN, f"skip{number}", "T", "r") for number in range(8)),
        ]

    async def judge(self, told: list[Any], other: AnyStore, truth: Truth) -> None:
        """Hold what each was told against what etcd holds: all of it took place, and once."""
        parts = iter(told)

        def part(count: int) -> list[Any]:
            return list(itertools.islice(parts, count))

        assert part(8) == [True] * 8
        started = part(15)
        assert tokens(started) == {key: held(truth)[key] for key in self.started}
        assert [one.attempt for one in started] == [1] * 15
        assert sorted(part(8), key=len) == [frozenset()] * 7 + [frozenset({"successor"})]
        assert part(8) == [None] * 8
        for one in part(8):
            assert one is True or (isinstance(one, OutcomeUnknownError) and "gone" in str(one))
        assert part(8) == [True] * 8
        assert part(8) == [None] * 8
        claims = truth.keys("claims")
        assert set(claims) == {"first", *self.new, *self.started, *(one.step_key for one in self.done)} | {
            f"skip{number}" for number in range(8)
        }
        owners = {info.step_key: info.owner for info in await other.get_claims(RUN)}
        assert {owners[key] for key in (*self.new, *self.started)} == {self.store.raw.session.owner}
        rows = truth.keys("steps")
        versions: dict[str, set[int]] = {}
        for name, kv in rows.items():
            versions.setdefault(name.rstrip("0123456789"), set()).add(kv.version)
        assert versions == {"started": {1}, "done": {2}, "later": {2}, "back": {1}, "skip": {1}}, "each written once"
        assert {kv.version for kv in truth.keys("dispatches").values()} == {1}
        statuses = await other.get_step_statuses(RUN)
        assert {statuses[one.step_key] for one in self.done} == {"Succeeded"}
        assert {statuses[one.step_key] for one in self.later} == {"Pending"}


@pytest.mark.parametrize("how", HOWS)
async def test_the_answer_to_all_of_them_is_lost(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy, truth: Truth, how: Literal["cut", "silence"]
) -> None:
    store = await open_store(**HASTY)
    mixed = Mixed(store)
    calls = await mixed.prepare()
    fault = proxy.drop_reply("Txn", 2, how)
    _, *told = await together(proxy, store, functools.partial(store.try_claim_step, RUN, "first"), calls)
    assert fault.happened.is_set()
    assert fault.call is not None
    assert len(etcdrpc.TxnRequest.FromString(fault.call.request).success) >= len(calls) - 7, "it was shared"
    assert fences(proxy) == 1, "once for all of them"
    await mixed.judge(told, other, truth)


@pytest.mark.parametrize("how", HOWS)
async def test_the_request_of_all_of_them_is_lost(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy, truth: Truth, how: str
) -> None:
    """It arrives when all is over, and changes nothing any more."""
    store = await open_store(**HASTY)
    mixed = Mixed(store)
    calls = await mixed.prepare()
    tasks = await gathering(proxy, store, functools.partial(store.try_claim_step, RUN, "first"), calls)
    fault = proxy.hold_request("Txn", 1)
    await asyncio.to_thread(proxy.let_go)
    await until(fault.happened.is_set)
    if how == "cut":
        proxy.cut_all()
    _, *told = await asyncio.gather(*tasks, return_exceptions=True)
    await mixed.judge(told, other, truth)
    before = truth.dump()
    await asyncio.to_thread(proxy.let_go)
    assert truth.dump() == before


@pytest.mark.parametrize("how", HOWS)
async def test_the_answer_to_one_that_others_wait_for_is_lost(
    open_store: OpenStore, other: AnyStore, proxy: EtcdProxy, truth: Truth, how: Literal["cut", "silence"]
) -> None:
    """64 want the same step, and nobody is told who has it: still it is exactly one of them."""
    store = await open_store(**HASTY)
    proxy.drop_reply("Txn", 2, how)
    claim = functools.partial(store.claim_step, RUN, "a")
    _, *told = await together(
        proxy, store, functools.partial(store.try_claim_step, RUN, "first"), [claim] * (CALLERS - 1)
    )
    (won,) = [one for one in told if one is not None]
    assert tokens([won]) == {"a": held(truth)["a"]}
    assert await other.holds(won)
    assert truth.keys("claims")["a"].version == truth.keys("steps")["a"].version == 1


# --- an etcd that takes little ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_operations() -> Iterator[EmbeddedEtcd]:
    """Give an etcd that takes 16 operations in a transaction."""
    with EmbeddedEtcd(extra_args=["--max-txn-ops=16"]) as server:
        yield server


@pytest.fixture(scope="module")
def few_bytes() -> Iterator[EmbeddedEtcd]:
    """Give an etcd that takes 20,000 bytes in a request."""
    with EmbeddedEtcd(extra_args=["--max-request-bytes=20000"]) as server:
        yield server


@pytest.fixture
def before() -> Iterator[Callable[[EtcdServer], EtcdProxy]]:
    """Give a function that puts a proxy before a server."""
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(EtcdProxy(server.endpoint))


async def test_an_etcd_that_takes_few_operations(
    before: Callable[[EtcdServer], EtcdProxy], open_store: OpenStore, few_operations: EmbeddedEtcd, prefix: str
) -> None:
    proxy = before(few_operations)
    store = await open_store(proxy.endpoint, **PATIENT)
    claims = []
    for turn in range(4):
        proxy.reset_calls()
        first, *others = [
            functools.partial(store.claim_step, RUN, f"s{turn}.{number}", input_json=f'"{number}"')
            for number in range(CALLERS)
        ]
        claims += await together(proxy, store, first, others)
    assert proxy.count("Txn") <= 1 + 5, "it has learned that 13 claims of three operations each fit"
    truth = Truth(few_operations.endpoint, prefix)
    assert tokens(claims) == held(truth)
    assert len(claims) == 4 * CALLERS
    # as many successors as it takes alone, while others want to share
    (heavy,) = await claimed(store, ["heavy"])
    successors = [f"next{number}" for number in range(13)]
    others = [functools.partial(store.complete_step, one, "Succeeded") for one in claims[:8]]
    gathered = await gathering(proxy, store, functools.partial(store.try_claim_step, RUN, "first"), others)
    completing = store.complete_step(heavy, "Succeeded", dispatch=successors)
    assert await asyncio.wait_for(completing, PATIENT["attempt_timeout"] * 0.8) == frozenset(successors)
    await asyncio.to_thread(proxy.let_go)
    assert await asyncio.gather(*gathered) == [True] + [frozenset()] * 8
    truth.close()


async def test_an_etcd_that_takes_few_bytes(
    before: Callable[[EtcdServer], EtcdProxy], open_store: OpenStore, few_bytes: EmbeddedEtcd, prefix: str
) -> None:
    """Together they are too large; alone only one is."""
    proxy = before(few_bytes)
    store = await open_store(proxy.endpoint, **PATIENT)
    texts = {f"s{number}": "x" * 2000 for number in range(CALLERS)} | {"s40": "x" * 30_000}
    first, *others = [functools.partial(store.claim_step, RUN, key, input_json=text) for key, text in texts.items()]
    told = dict(zip(texts, await together(proxy, store, first, others), strict=True))
    assert isinstance(told.pop("s40"), RecordTooLargeError)
    truth = Truth(few_bytes.endpoint, prefix)
    assert tokens(list(told.values())) == held(truth)
    assert len(told) == CALLERS - 1
    truth.close()


# --- callers that go away, and sessions that end ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["first", "waiting", "on its way"])
async def test_a_cancelled_task_takes_nobody_with_it_and_leaves_nothing_held(
    proxy: EtcdProxy, prefix: str, truth: Truth, threads: ThreadPoolExecutor, where: str
) -> None:
    async with AsyncEtcdRunStore.connect(proxy.endpoint, prefix=prefix, **PATIENT) as raw:
        store = AnyStore(raw, threads)
        calls = [functools.partial(raw.claim_step, RUN, f"s{number}") for number in range(CALLERS)]
        tasks = await gathering(proxy, store, calls[0], calls[1:])
        gone = 0 if where == "first" else 30
        fault = proxy.hold_request("Txn", 1) if where == "on its way" else None
        if fault is not None:
            await asyncio.to_thread(proxy.let_go)
            await until(fault.happened.is_set)
        tasks[gone].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[gone]
        if where != "first":
            await asyncio.to_thread(proxy.let_go)
        del tasks[gone]
        claims = await asyncio.gather(*tasks)
        assert len(claims) == CALLERS - 1
        await until(lambda: held(truth) == tokens(claims))
        # the door is shut in the background: what may still arrive finds it so
        await until(lambda: not raw._keeper._undone)  # type: ignore[union-attr]
        await asyncio.to_thread(proxy.let_go)
        assert held(truth) == tokens(claims)
        again = await raw.claim_step(RUN, f"s{gone}")
        assert again is not None
        assert held(truth) == tokens([*claims, again])


async def test_the_session_is_replaced_while_all_wait(
    store: AnyStore, other: AnyStore, proxy: EtcdProxy, etcd: EtcdServer, truth: Truth
) -> None:
    old = store.session
    calls = [functools.partial(store.claim_step, RUN, f"s{number}") for number in range(CALLERS)]
    tasks = await gathering(proxy, store, calls[0], calls[1:])
    await asyncio.to_thread(etcd.etcdctl, "lease", "revoke", f"{old.lease_id:x}")
    await asyncio.to_thread(proxy.let_go)
    claims = await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert tokens(claims) == held(truth)
    new = store.session
    assert new.lease_id != old.lease_id
    assert {claim.lease_id for claim in claims} == {kv.lease for kv in truth.keys("claims").values()} == {new.lease_id}
    assert await gated(each(other.holds, claims)) == [True] * CALLERS
    await asyncio.gather(*(store.complete_step(claim, "Succeeded") for claim in claims))
    assert store.session is new, "one session followed, not several"


async def test_the_session_is_replaced_in_the_middle_of_everything(
    store: AnyStore, other: AnyStore, etcd: EtcdServer, truth: Truth
) -> None:
    """Every claim is the new session's, or is found to be lost; nothing is held that nobody was told of."""
    old = store.session
    claims: list[StepClaim] = []

    async def work(name: int) -> None:
        for turn in range(6):
            claim = await store.claim_step(RUN, f"s{name}.{turn}")
            assert claim is not None
            claims.append(claim)

    working = asyncio.gather(*map(work, range(CALLERS)))
    await until(lambda: len(claims) > CALLERS or working.done())
    await asyncio.to_thread(etcd.etcdctl, "lease", "revoke", f"{old.lease_id:x}")
    await asyncio.wait_for(working, 15)
    assert len(claims) == 6 * CALLERS
    standing = held(truth)
    kept = [claim for claim in claims if standing.get(claim.step_key) == claim.fencing_token]
    lost = [claim for claim in claims if claim not in kept]
    assert tokens(kept) == standing
    assert {claim.lease_id for claim in lost} <= {old.lease_id}
    assert {claim.lease_id for claim in kept} <= {store.session.lease_id}
    assert len(lost) > CALLERS, "it was in the middle"
    for claim in lost[:5]:
        assert not await other.holds(claim)
    told = await asyncio.gather(*(store.complete_step(claim, "Succeeded") for claim in claims), return_exceptions=True)
    for claim, one in zip(claims, told, strict=True):
        assert one == frozenset() if claim in kept else isinstance(one, ClaimLostError)


# --- all at once -----------------------------------------------------------------------------------------------------


ENOUGH = 20
"""Claims that were taken and given back, however slow the machine is."""


async def test_of_many_who_take_and_give_back_the_same_steps_one_holds_each(
    store: AnyStore, other: AnyStore, truth: Truth
) -> None:
    loop = asyncio.get_running_loop()
    keys = [f"s{number}" for number in range(4)]
    holder: dict[str, int] = {}
    wins: list[StepClaim] = []
    ends = loop.time() + 1.5

    async def work(caller: int) -> None:
        for key in itertools.islice(itertools.cycle(keys), caller, None):
            if loop.time() > ends and (len(wins) > ENOUGH or loop.time() > ends + 20):
                return
            claim = await store.claim_step(RUN, key)
            if claim is None:
                continue
            assert holder.setdefault(key, caller) == caller, "two have it"
            wins.append(claim)
            shown = await other.get_claim(RUN, key)
            assert shown is not None
            assert shown.fencing_token == claim.fencing_token
            if caller % 2:
                assert await other.holds(claim)
            assert holder.pop(key) == caller
            if caller % 3:
                assert await store.release_claim(claim) is True
            else:
                await store.defer_step(claim)

    await asyncio.gather(*map(work, range(CALLERS)))
    assert held(truth) == {}
    for key in keys:
        of_key = [claim for claim in wins if claim.step_key == key]
        assert [claim.attempt for claim in of_key] == list(range(1, len(of_key) + 1))
        assert len({claim.fencing_token for claim in of_key}) == len(of_key)
    print(f"{len(wins)} claims were taken and given back")
    assert len(wins) > ENOUGH


@pytest.fixture
def allowed(auth_etcd: AuthEtcd, prefix: str) -> str:
    """Return a fresh prefix that the worker may write to."""
    return auth_etcd.prefix.rstrip("/") + prefix


async def test_tokens_that_end_while_calls_gather_and_while_they_are_on_their_way(
    before: Callable[[EtcdServer], EtcdProxy], open_store: OpenStore, auth_etcd: AuthEtcd, allowed: str
) -> None:
    proxy = before(auth_etcd)
    store = await open_store(
        proxy.endpoint, **{**PATIENT, "prefix": allowed, "user": auth_etcd.user, "password": auth_etcd.password}
    )
    session = store.session
    claims: list[StepClaim] = []
    for turn in range(2):
        calls = [functools.partial(store.claim_step, RUN, f"s{turn}.{number}") for number in range(CALLERS)]
        tasks = await gathering(proxy, store, calls[0], calls[1:])
        if turn:  # the shared one is on its way
            fault = proxy.hold_request("Txn", 1)
            await asyncio.to_thread(proxy.let_go)
            await until(fault.happened.is_set)
        await asyncio.to_thread(auth_etcd.forget_tokens)
        await asyncio.to_thread(proxy.let_go)
        claims += await asyncio.gather(*tasks)
    completing = asyncio.gather(*(store.complete_step(claim, "Succeeded") for claim in claims))
    await asyncio.to_thread(auth_etcd.forget_tokens)
    assert set(await completing) == {frozenset()}
    assert len(await store.get_claims(RUN)) == 2 * CALLERS
    assert {claim.fencing_token for claim in await store.get_claims(RUN)} == {claim.fencing_token for claim in claims}
    assert store.session is session
