"""Group commit by itself: who is sent when, with whom, and that each is told once what became of it.

Both faces stand before a fake etcd whose answers are held, given, lost or refused one by one; transactions in it are
carried out as etcd does.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import linecache
import queue
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from etcd3 import etcdrpc

from servers import eventually
from stepclaim._core.batching import pending
from stepclaim._core.ops import (
    Compare,
    Delete,
    Get,
    Put,
    PutOnce,
    Range,
    RangeReply,
    SessionView,
    Txn,
    TxnReply,
)
from stepclaim._etcd import commit
from stepclaim._etcd import queue as waiting
from stepclaim._etcd.commit import AsyncCommitter, Committer
from stepclaim._etcd.queue import Turn, WaitingThread
from stepclaim._etcd.retry import Failed
from stepclaim._etcd.status import Failure
from stepclaim._etcd.wire import txn_request
from stepclaim.errors import BackendError, StoreClosedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

PATIENCE = 10.0
"""Seconds after which something hangs."""

Told: TypeAlias = TxnReply | BaseException
"""What a caller is told: a reply, or what was raised."""


def session(revision: int = 1) -> SessionView:
    return SessionView("id", "w", b"/session", b"{}", 5, 5, 1, revision)


def claim(key: bytes, value: bytes = b"mine", fence: SessionView | None = None) -> Txn:
    """Make the transaction that `_acquire` makes."""
    return Txn(
        compares=(Compare(key, "create", 0),),
        success=(Put(key, value, 5),),
        failure=(Get(key),),
        fence=fence or session(),
    )


def write(key: bytes, value: bytes = b"result", entries: int = 0) -> Txn:
    """Make a transaction without a fence, such as a completion, with entries of the ledger."""
    more = tuple(PutOnce(key + f"/{number}".encode(), b"") for number in range(entries))
    return Txn(compares=(Compare(key, "mod", 0),), success=(Put(key, value), *more), failure=(Get(key),))


# --- etcd ------------------------------------------------------------------------------------------------------------


class Etcd:
    """Keys in memory, and transactions on them; nested compares see the state before the whole transaction."""

    def __init__(self, most: int = 128) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._revision = 1
        self._kvs: dict[bytes, Any] = {}
        self.refused = 0
        self.written: Counter[bytes] = Counter()
        """How often each value was written."""
        self._put(b"/session", b"{}", 5)

    def range(self, request: Any) -> Any:
        """Read a key."""
        with self._lock:
            return self._get(etcdrpc.RangeRequest.FromString(_bytes(request)))

    def txn(self, request: Any) -> Any:
        """Carry a transaction out, or refuse it as etcd does."""
        parsed = etcdrpc.TxnRequest.FromString(_bytes(request))
        with self._lock:
            if _levels(parsed) > self._most:
                self.refused += 1
                raise refusal("etcd answered INVALID_ARGUMENT: etcdserver: too many operations in txn request")
            path = self._path(parsed)
            self._revision += 1
            return self._apply(parsed, path, set())

    def remove(self, key: bytes) -> None:
        """Let somebody else remove a key."""
        with self._lock:
            self._revision += 1
            del self._kvs[key]

    def put(self, key: bytes, value: bytes) -> int:
        """Let somebody else write a key; gives the revision."""
        with self._lock:
            self._revision += 1
            self._put(key, value, 0)
            return self._revision

    def _path(self, request: Any) -> Any:
        taken = all(map(self._holds, request.compare))
        branch = request.success if taken else request.failure
        return taken, [self._path(op.request_txn) if op.HasField("request_txn") else None for op in branch]

    def _holds(self, compare: Any) -> bool:
        kv = self._kvs.get(compare.key)
        if compare.target == etcdrpc.Compare.VALUE:
            return kv is not None and bool(kv["value"] == compare.value)
        if compare.target == etcdrpc.Compare.CREATE:
            return bool((kv["create_revision"] if kv else 0) == compare.create_revision)
        return bool((kv["mod_revision"] if kv else 0) == compare.mod_revision)

    def _apply(self, request: Any, path: Any, seen: set[bytes]) -> Any:
        taken, below = path
        response = etcdrpc.TxnResponse(succeeded=taken)
        response.header.revision = self._revision
        for op, inner in zip(request.success if taken else request.failure, below, strict=True):
            told = response.responses.add()
            if op.HasField("request_txn"):
                told.response_txn.CopyFrom(self._apply(op.request_txn, inner, seen))
            elif op.HasField("request_range"):
                told.response_range.CopyFrom(self._get(op.request_range))
            elif op.HasField("request_delete_range"):
                told.response_delete_range.deleted = int(self._kvs.pop(op.request_delete_range.key, None) is not None)
            else:
                put = op.request_put
                assert put.key not in seen, "etcd refuses to write a key twice in one transaction"
                seen.add(put.key)
                self._put(put.key, put.value, put.lease)
                told.response_put.SetInParent()
        return response

    def _put(self, key: bytes, value: bytes, lease: int) -> None:
        before = self._kvs.get(key)
        created = before["create_revision"] if before else self._revision
        self._kvs[key] = {
            "key": key, "value": value, "create_revision": created, "mod_revision": self._revision, "lease": lease
        }  # fmt: skip
        self.written[value] += 1

    def _get(self, request: Any) -> Any:
        answer = etcdrpc.RangeResponse()
        answer.header.revision = self._revision
        if request.range_end:
            found = [self._kvs[key] for key in sorted(self._kvs) if request.key <= key < request.range_end]
        else:
            found = [self._kvs[request.key]] if request.key in self._kvs else []
        for kv in found[: request.limit or None]:
            answer.kvs.add(**kv)
        answer.more = 0 < request.limit < len(found)
        return answer


def _bytes(request: Any) -> bytes:
    return request if isinstance(request, bytes) else bytes(request.SerializeToString())


def _levels(request: Any) -> int:
    own = max(len(request.compare), len(request.success), len(request.failure))
    below = [_levels(op.request_txn) for op in (*request.success, *request.failure) if op.HasField("request_txn")]
    return own + max(below, default=0)


def refusal(words: str = "etcd refuses this") -> Failed:
    return Failed(Failure(BackendError(words, code="INVALID_ARGUMENT", definite=True), transient=False, definite=True))


def failure(*, definite: bool = False) -> Failed:
    error = UnavailableError("the connection broke", code="UNAVAILABLE", definite=definite)
    failed = Failed(Failure(error, transient=True, definite=definite, elsewhere=True))
    failed.__cause__ = OSError("reset by peer")
    return failed


# --- the two faces before it -----------------------------------------------------------------------------------------


class Flight:
    """A request on its way, until the test says what becomes of it."""

    def __init__(self, etcd: Etcd, method: Callable[[Any], Any], request: Any, settle: Callable[[Any], None]) -> None:
        self._work = functools.partial(method(etcd), request)
        self._settle = settle
        self.reads = method(SimpleNamespace(txn=False, range=True))
        """It is a read of one key, not a transaction."""
        self.request = _bytes(request)

    @property
    def members(self) -> list[Any]:
        """The operations of a shared transaction: nested ones, or, where it is asked as one, what they write."""
        return list(etcdrpc.TxnRequest.FromString(self.request).success)

    @property
    def written(self) -> list[bytes]:
        """The keys that it writes if all goes well."""
        puts = [op.request_txn.success[0] if op.HasField("request_txn") else op for op in self.members]
        return [op.request_put.key for op in puts if op.HasField("request_put")]

    def answer(self) -> None:
        """Carry it out and give the answer."""
        try:
            self._settle(self._work())
        except BaseException as error:  # noqa: BLE001 - raised by the one who asked
            self._settle(error)

    def lose(self) -> None:
        """Carry it out and lose the answer."""
        self._work()
        self._settle(failure())

    def fail(self, error: BaseException) -> None:
        """Don't carry it out."""
        self._settle(error)


class Face:
    """Callers of either face, one event loop above both; `commit` gives an awaitable of what the caller is told."""

    def __init__(self, committer: Any, etcd: Etcd, attempt_timeout: float) -> None:
        self.committer = committer
        self.etcd = etcd
        self.timeout = attempt_timeout
        self.sent = 0
        self.decide: Callable[[Flight], None] | None = None
        """What becomes of a request that the test does not wait for."""

    def commit(self, op: Txn) -> Awaitable[Told]:
        raise NotImplementedError

    def read(self, op: Range) -> Awaitable[RangeReply | None]:
        """Read with others; what is told is None where the read is to go by itself."""
        raise NotImplementedError

    async def flight(self) -> Flight:
        """Wait for the next request."""
        raise NotImplementedError

    async def first(self, op: Txn | None = None) -> tuple[Awaitable[Told], Flight]:
        """Let a call be under way: whoever comes now has to wait."""
        told = self.commit(op or write(b"/first"))
        return told, await self.flight()

    async def waiting(self, count: int) -> None:
        """Wait until so many wait."""
        await asyncio.to_thread(eventually, lambda: len(self.committer._queue.waiting) == count, PATIENCE)

    async def gathered(self, *ops: Txn, first: Txn | None = None) -> tuple[list[Awaitable[Told]], Flight]:
        """Let callers wait behind a call, answer that, and give the request that they then share."""
        begun, flight = await self.first(first)
        callers = []
        for op in ops:  # one by one: who comes first is first
            callers.append(self.commit(op))
            await self.waiting(len(callers))
        flight.answer()
        assert isinstance(await begun, TxnReply)
        return callers, await self.flight()


class Threads(Face):
    """Callers that are threads."""

    def __init__(self, pool: ThreadPoolExecutor, etcd: Etcd, attempt_timeout: float) -> None:
        super().__init__(Committer(self, attempt_timeout), etcd, attempt_timeout)  # type: ignore[arg-type]
        self._pool = pool
        self._flights: queue.Queue[Flight] = queue.Queue()

    def attempt(self, method: Callable[[Any], Any], request: Any, timeout: float) -> Any:
        """Stand in for the client's."""
        assert timeout <= self.timeout
        self.sent += 1
        answer: queue.Queue[Any] = queue.Queue()
        (self.decide or self._flights.put)(Flight(self.etcd, method, request, answer.put))
        told = answer.get(timeout=PATIENCE)
        if isinstance(told, BaseException):
            raise told
        return told

    def told(self, op: Txn) -> Told:
        """Commit in this thread."""
        try:
            return self.committer.commit(op, self.timeout, time.monotonic() + 60)  # type: ignore[no-any-return]
        except BaseException as error:  # noqa: BLE001 - it is what the test looks at
            return error

    def commit(self, op: Txn) -> Awaitable[Told]:
        call = asyncio.get_running_loop().run_in_executor(self._pool, self.told, op)
        return asyncio.ensure_future(asyncio.wait_for(call, PATIENCE))

    def read(self, op: Range) -> Awaitable[RangeReply | None]:
        call = functools.partial(self.committer.read, op, time.monotonic() + 60)
        reading = asyncio.get_running_loop().run_in_executor(self._pool, call)
        return asyncio.ensure_future(asyncio.wait_for(reading, PATIENCE))

    async def flight(self) -> Flight:
        return await asyncio.to_thread(self.next_flight)

    def next_flight(self) -> Flight:
        """Wait for it in a thread."""
        return self._flights.get(timeout=PATIENCE)


class Tasks(Face):
    """Callers that are tasks of one event loop."""

    def __init__(self, etcd: Etcd, attempt_timeout: float) -> None:
        super().__init__(AsyncCommitter(self, attempt_timeout), etcd, attempt_timeout)  # type: ignore[arg-type]
        self._flights: asyncio.Queue[Flight] = asyncio.Queue()

    async def attempt(self, method: Callable[[Any], Any], request: Any, timeout: float) -> Any:
        """Stand in for the client's."""
        assert timeout <= self.timeout
        self.sent += 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        flight = Flight(self.etcd, method, request, lambda told: _settle(answer, told))
        (self.decide or self._flights.put_nowait)(flight)
        told = await answer
        if isinstance(told, BaseException):
            raise told
        return told

    def commit(self, op: Txn) -> asyncio.Task[Told]:
        async def told() -> Told:
            try:
                return await asyncio.wait_for(self.attempt_at(op, self.timeout, time.monotonic() + 60), PATIENCE)
            except BaseException as error:  # noqa: BLE001 - it is what the test looks at
                return error

        return asyncio.create_task(told())

    def read(self, op: Range) -> asyncio.Task[RangeReply | None]:
        async def told() -> RangeReply | None:
            sharing = self.committer.read(op, time.monotonic() + 60)
            return None if sharing is None else await asyncio.wait_for(sharing, PATIENCE)

        return asyncio.create_task(told())

    async def attempt_at(self, op: Txn, timeout: float, deadline: float) -> TxnReply:
        """Commit as a performer does: alone, if it turns out that it can't share."""
        shared: TxnReply | None = await self.committer.commit(op, timeout, deadline)
        alone: TxnReply = await self.committer.alone(op, timeout) if shared is None else shared
        return alone

    async def flight(self) -> Flight:
        return await asyncio.wait_for(self._flights.get(), PATIENCE)


def _settle(answer: asyncio.Future[Any], told: Any) -> None:
    if not answer.done():
        answer.set_result(told)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(80) as made:
        yield made


@pytest.fixture
def fake() -> Etcd:
    return Etcd()


@pytest.fixture(params=["threads", "asyncio"])
async def face(request: pytest.FixtureRequest, pool: ThreadPoolExecutor, fake: Etcd) -> Face:
    return Threads(pool, fake, 5.0) if request.param == "threads" else Tasks(fake, 5.0)


async def works(face: Face) -> None:
    """See that the next call goes at once, and one that comes meanwhile after it."""
    begun, flight = await face.first(write(b"/works"))
    behind = face.commit(write(b"/works too"))
    await face.waiting(1)
    flight.answer()
    (await face.flight()).answer()
    for told in (await begun, await behind):
        assert isinstance(told, TxnReply)
        assert told.succeeded


def doubt(told: Told) -> bool:
    """Tell of a passing failure whether it leaves open what became of the call."""
    assert isinstance(told, Failed)
    assert told.failure.transient
    return not told.failure.definite


# --- who goes with whom ----------------------------------------------------------------------------------------------


async def test_what_comes_while_a_call_is_under_way_goes_together_after_it(face: Face) -> None:
    ops = [write(f"/{number}".encode()) for number in range(20)]
    callers, flight = await face.gathered(*ops)
    assert flight.written == [op.success[0].key for op in ops]
    flight.answer()
    replies = [await caller for caller in callers]
    assert [reply.succeeded if isinstance(reply, TxnReply) else reply for reply in replies] == [True] * 20
    assert face.sent == 2


async def test_one_alone_goes_as_it_would_go_without_all_this(face: Face) -> None:
    op = claim(b"/a")
    told, flight = await face.first(op)
    assert flight.request == txn_request(op)
    flight.answer()
    assert isinstance(await told, TxnReply)
    for op in (claim(b"/b"), write(b"/c")):
        (caller,), flight = await face.gathered(op, first=write(b"/before " + op.compares[0].key))
        assert flight.request == txn_request(op)
        flight.answer()
        assert isinstance(await caller, TxnReply)


async def test_one_that_can_not_share_goes_beside_the_others(face: Face) -> None:
    begun, flight = await face.first()
    large = face.commit(write(b"/large", b"v" * 200_000))
    (await face.flight()).answer()
    assert isinstance(await large, TxnReply)
    flight.answer()
    assert isinstance(await begun, TxnReply)


async def test_two_writers_of_one_key_follow_each_other(face: Face) -> None:
    (one, two, three), flight = await face.gathered(write(b"/a", b"1"), write(b"/a", b"2"), write(b"/b"))
    assert len(flight.members) == 2
    flight.answer()
    (await face.flight()).answer()
    told = [await one, await two, await three]
    assert all(isinstance(each, TxnReply) for each in told)
    assert [each.succeeded for each in told if isinstance(each, TxnReply)] == [True, False, True]
    assert (face.sent, face.etcd.written[b"1"], face.etcd.written[b"2"]) == (3, 1, 0)


def nests(flight: Flight) -> bool:
    """Tell whether it asks for each of its members by itself, not for all of them as one."""
    return any(op.HasField("request_txn") for op in flight.members)


async def test_where_one_is_refused_what_was_asked_as_one_is_asked_apart(face: Face) -> None:
    face.etcd.put(b"/b", b"theirs")
    names = (b"/a", b"/b", b"/c")
    callers, flight = await face.gathered(*(claim(key, b"mine" + key) for key in names))
    assert not nests(flight)
    flight.answer()
    flight = await face.flight()
    assert nests(flight)
    assert sorted(flight.written) == sorted(names)
    flight.answer()
    told = [await caller for caller in callers]
    assert [each.succeeded if isinstance(each, TxnReply) else each for each in told] == [True, False, True]
    assert isinstance(told[1], TxnReply)
    assert told[1].found[0].value == b"theirs"  # type: ignore[union-attr]
    assert {key: face.etcd.written[b"mine" + key] for key in names} == {b"/a": 1, b"/b": 0, b"/c": 1}
    assert face.sent == 3


async def test_after_a_refusal_they_are_asked_apart_until_all_goes_well_again(face: Face) -> None:
    async def shared(turn: int, *, refused: bool = False) -> bool:
        callers, flight = await face.gathered(
            *(write(f"/{turn}/{number}".encode()) for number in range(2)),
            *([write(b"/stands")] if refused else []),
            first=write(f"/{turn}/first".encode()),
        )
        flight.answer()
        if refused and not nests(flight):
            (await face.flight()).answer()
        told = [await caller for caller in callers]
        assert [isinstance(each, TxnReply) and each.succeeded for each in told] == [True] * 2 + [False] * refused
        return nests(flight)

    face.etcd.put(b"/stands", b"theirs")
    assert [await shared(number, refused=number == 1) for number in range(7)] == [False, False, *[True] * 4, False]
    assert [await shared(number, refused=number == 9) for number in range(7, 11)] == [False, False, False, True]


async def test_the_outcome_of_what_was_asked_as_one_is_not_known_to_anybody(face: Face) -> None:
    callers, flight = await face.gathered(claim(b"/a", b"one"), claim(b"/b", b"two"), write(b"/c", b"three"))
    assert not nests(flight)
    flight.lose()
    assert [doubt(await caller) for caller in callers] == [True] * 3
    assert [face.etcd.written[value] for value in (b"one", b"two", b"three")] == [1, 1, 1]
    await works(face)


async def test_claims_behind_two_fences_go_one_after_the_other(face: Face) -> None:
    (one, two), flight = await face.gathered(claim(b"/a"), claim(b"/b", fence=session(99)))
    flight.answer()
    (await face.flight()).answer()
    assert await one == TxnReply(True, 3)
    refused = await two
    assert isinstance(refused, TxnReply)
    assert not refused.succeeded
    assert face.sent == 3


async def test_of_many_same_claims_one_writes_and_the_others_look(face: Face) -> None:
    """Those who have come to wait while the step was being claimed read the claim, once for all of them."""
    callers, flight = await face.gathered(*(claim(b"/a", b"theirs") for _ in range(20)), first=claim(b"/a", b"mine"))
    assert b"theirs" not in flight.request
    flight.answer()
    for caller in callers:
        told = await caller
        assert isinstance(told, TxnReply)
        assert not told.succeeded
        assert told.found[0] is not None
        assert told.found[0].value == b"mine"
    assert face.sent == 2
    assert face.etcd.written[b"theirs"] == 0


async def test_where_a_look_finds_nothing_one_of_them_claims(face: Face) -> None:
    begun, flight = await face.first(claim(b"/a", b"mine"))
    callers = []
    for number in range(5):
        callers.append(face.commit(claim(b"/a", f"{number}".encode())))
        await face.waiting(number + 1)
    flight.answer()
    assert isinstance(await begun, TxnReply)
    looking = await face.flight()
    face.etcd.remove(b"/a")
    looking.answer()
    (await face.flight()).answer()
    told = [await caller for caller in callers]
    assert [each.succeeded for each in told if isinstance(each, TxnReply)] == [True, False, False, False, False]
    assert face.sent == 3
    assert sum(face.etcd.written[f"{number}".encode()] for number in range(5)) == 1


async def test_who_looked_at_a_step_that_was_given_up_meanwhile_claims_it(face: Face) -> None:
    """It waits behind the release of what was just seen to stand, looks once, and looks no more."""
    revision = face.etcd.put(b"/a", b"theirs")
    release = Txn(compares=(Compare(b"/a", "mod", revision),), success=(Delete(b"/a"),))
    (released, waits), flight = await face.gathered(release, claim(b"/a"), first=claim(b"/a", b"first"))
    flight.answer()
    assert isinstance(await released, TxnReply)
    looks = await face.flight()
    assert looks.reads
    looks.answer()
    claims = await face.flight()
    assert not claims.reads
    claims.answer()
    told = await waits
    assert isinstance(told, TxnReply)
    assert told.succeeded
    assert face.sent == 4


async def test_after_a_claim_whose_outcome_is_not_known_nobody_only_looks(face: Face) -> None:
    begun, flight = await face.first(claim(b"/a", b"mine"))
    caller = face.commit(claim(b"/a", b"theirs"))
    await face.waiting(1)
    flight.fail(failure())
    assert doubt(await begun)
    flight = await face.flight()
    assert b"theirs" in flight.request
    flight.answer()
    assert isinstance(await caller, TxnReply)
    assert face.etcd.written[b"theirs"] == 1


async def test_a_moved_fence_is_told_at_once_and_the_others_go_on_without_it(face: Face) -> None:
    moved = face.etcd.put(b"/session", b"{}")
    (fenced, plain), flight = await face.gathered(claim(b"/a"), write(b"/b"))
    flight.answer()
    (await face.flight()).answer()
    told = await fenced
    assert isinstance(told, TxnReply)
    assert (told.succeeded, told.fence_moved) == (False, True)
    assert told.barrier[0] is not None
    assert told.barrier[0].mod_revision == moved
    done = await plain
    assert isinstance(done, TxnReply)
    assert done.succeeded
    assert (face.sent, face.etcd.written[b"result"]) == (3, 2)  # the first of all, and this


# --- failures --------------------------------------------------------------------------------------------------------


async def test_a_batch_that_is_refused_goes_call_by_call(face: Face) -> None:
    ops = [claim(b"/a", b"1"), claim(b"/a", b"2"), write(b"/b", b"3"), write(b"/c", b"4"), claim(b"/d", b"5")]
    callers, flight = await face.gathered(*ops)
    flight.fail(refusal())
    alone = [await face.flight() for _ in ops]
    assert sorted(each.request for each in alone) == sorted(map(txn_request, ops))
    for each in alone:
        if b"/b" in each.request:
            each.fail(refusal("etcd refuses /b"))
        else:
            each.answer()
    told = [await caller for caller in callers]
    assert isinstance(told[2], Failed)
    assert "etcd refuses /b" in str(told[2].failure.error)
    assert [each.succeeded for each in told if isinstance(each, TxnReply)] in ([True, False, True, True],
                                                                               [False, True, True, True])  # fmt: skip
    await works(face)


@pytest.mark.parametrize("carried_out", [True, False])
async def test_a_failure_leaves_each_in_doubt_who_wrote_and_nobody_else(face: Face, carried_out: bool) -> None:
    ops = [
        claim(b"/standing", b"looks"),
        claim(b"/standing", b"looks, too"),
        claim(b"/a", b"claims"),
        claim(b"/a", b"follows"),
        write(b"/b", b"writes"),
    ]
    callers, flight = await face.gathered(*ops, first=claim(b"/standing", b"stands"))
    if carried_out:
        flight.lose()
    else:
        flight.fail(failure())
    told = [await caller for caller in callers]
    assert [doubt(each) for each in told] == [False, False, True, False, True]
    errors = [each.failure.error for each in told if isinstance(each, Failed)]
    assert len(set(map(id, errors))) == len(set(map(id, told))) == 5, "each has its own"
    assert {(type(error), str(error)) for error in errors} == {(UnavailableError, "the connection broke")}
    assert {str(each.__cause__) for each in told if isinstance(each, Failed)} == {"reset by peer"}
    assert {each.failure.elsewhere for each in told if isinstance(each, Failed)} == {True}
    for each in (b"looks", b"looks, too", b"follows"):
        assert face.etcd.written[each] == 0
    await works(face)


async def test_what_certainly_had_no_effect_is_told_so_to_all(face: Face) -> None:
    callers, flight = await face.gathered(claim(b"/a"), write(b"/b"), claim(b"/a"))
    flight.fail(failure(definite=True))
    assert [doubt(await caller) for caller in callers] == [False, False, False]
    await works(face)


async def test_who_waits_behind_a_failure_goes_next(face: Face) -> None:
    begun, flight = await face.first()
    caller = face.commit(write(b"/a"))
    await face.waiting(1)
    flight.fail(failure())
    assert doubt(await begun)
    (await face.flight()).answer()
    assert isinstance(await caller, TxnReply)


async def test_a_closed_store_is_told_to_all(face: Face) -> None:
    callers, flight = await face.gathered(claim(b"/a"), write(b"/b"), claim(b"/a"), write(b"/c"))
    late = face.commit(write(b"/d"))
    await face.waiting(1)
    flight.fail(StoreClosedError("the store was closed meanwhile"))
    (await face.flight()).fail(StoreClosedError("the store was closed meanwhile"))
    for caller in (*callers, late):
        assert isinstance(await caller, StoreClosedError)


async def test_an_answer_that_can_not_be_read_is_told_to_all(face: Face) -> None:
    """Whatever goes wrong: nobody waits for ever, and the next call goes."""
    callers, flight = await face.gathered(write(b"/a"), write(b"/b"), write(b"/c"))
    flight._settle(etcdrpc.TxnResponse(succeeded=True))  # no answer for any of the three
    for caller in callers:
        told = await caller
        assert isinstance(told, Exception)
        assert not isinstance(told, TimeoutError)
    await works(face)


@pytest.fixture(params=["threads", "asyncio"])
async def small(request: pytest.FixtureRequest, pool: ThreadPoolExecutor) -> Face:
    """Give a face before an etcd that takes 16 operations in a transaction; one flight at a time, to count them."""
    face = Threads(pool, Etcd(most=16), 5.0) if request.param == "threads" else Tasks(Etcd(most=16), 5.0)
    face.committer.flights = 1
    return face


async def all_answered(face: Face, *ops: Txn, first: bytes, alone: tuple[Txn, ...] = ()) -> float:
    """Let calls gather, then answer whatever comes; all of them succeed. Gives the seconds that took."""
    begun, flight = await face.first(write(first))
    callers = [face.commit(op) for op in ops]
    await face.waiting(len(ops))
    face.decide = Flight.answer
    since = time.monotonic()
    callers += [face.commit(op) for op in alone]
    flight.answer()
    told = await asyncio.gather(begun, *callers)
    face.decide = None
    assert [each.succeeded if isinstance(each, TxnReply) else each for each in told] == [True] * len(told)
    return time.monotonic() - since


async def learned(face: Face, where: str) -> int:
    """Let 64 calls gather, four times; gives the requests of the last time."""
    for turn in range(4):
        before = face.sent
        first = f"/{where}/{turn}".encode()
        await all_answered(face, *(write(first + f"/{number}".encode()) for number in range(64)), first=first)
    return face.sent - before


async def test_an_etcd_that_takes_little_at_once_is_given_little_at_once(small: Face) -> None:
    assert await learned(small, "a") <= 1 + 5, "15 fit into one"
    assert small.etcd.refused <= 3, "128, 64 and 32 are tried once each"


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("entries", [13, 14])
async def test_one_that_etcd_takes_only_alone_does_not_wait_for_company(small: Face, entries: int, others: int) -> None:
    """It has 15 operations, the last with one below it: 16 in all, and none is left for a transaction around it."""
    await learned(small, "a")
    heavy = write(b"/heavy", entries=entries)
    company = [write(f"/o/{number}".encode()) for number in range(others)]
    took = await all_answered(small, *company, first=b"/first", alone=(heavy,))
    assert took < small.timeout / 2
    await works(small)


@pytest.mark.parametrize("others", [0, 3])
async def test_one_that_waits_while_it_is_learned_how_little_fits_is_carried_out(small: Face, others: int) -> None:
    """When it came there was room for it."""
    while small.etcd.refused < 2:
        turn = f"/{small.etcd.refused}".encode()
        await all_answered(small, *(write(turn + f"/{n}".encode()) for n in range(64)), first=turn)
    many, flight = await small.gathered(*(write(f"/many/{n}".encode()) for n in range(20)), first=write(b"/first"))
    assert len(flight.members) == 20
    late = [
        small.commit(write(b"/heavy", entries=14)),
        *(small.commit(write(f"/o/{n}".encode())) for n in range(others)),
    ]
    await small.waiting(1 + others)
    small.decide = Flight.answer
    since = time.monotonic()
    flight.answer()
    told = [await caller for caller in (*many, *late)]
    assert [each.succeeded if isinstance(each, TxnReply) else each for each in told] == [True] * len(told)
    assert small.etcd.refused == 3
    assert time.monotonic() - since < small.timeout / 2
    small.decide = None
    await works(small)


async def test_one_that_is_too_heavy_even_alone_does_not_make_the_others_go_alone(small: Face) -> None:
    """What it is told is its own: how much goes together is not learned from it."""
    for number in range(8):
        (caller,), flight = await small.gathered(write(b"/heavy", entries=30), first=write(f"/{number}".encode()))
        flight.answer()
        told = await caller
        assert isinstance(told, Failed)
        assert "too many operations" in str(told.failure.error)
    assert await learned(small, "a") <= 1 + 5


# --- callers that go away, and those whose turn does not come --------------------------------------------------------


@pytest.fixture
def threads(pool: ThreadPoolExecutor, fake: Etcd) -> Threads:
    return Threads(pool, fake, 5.0)


@pytest.fixture
async def tasks(fake: Etcd) -> Tasks:
    return Tasks(fake, 5.0)


@pytest.mark.parametrize("alone", [True, False])
async def test_who_carries_the_others_along_is_interrupted(threads: Threads, alone: bool) -> None:
    if alone:
        begun, flight = await threads.first(write(b"/a"))
        behind = [threads.commit(write(b"/b"))]
        await threads.waiting(1)
        flight.fail(KeyboardInterrupt())
        assert isinstance(await begun, KeyboardInterrupt)
        (await threads.flight()).answer()
        assert isinstance(await behind[0], TxnReply)
    else:
        callers, flight = await threads.gathered(write(b"/a"), claim(b"/b"), claim(b"/b"), write(b"/c"))
        behind = [threads.commit(write(b"/d"))]
        await threads.waiting(1)
        flight.fail(KeyboardInterrupt())
        told = [await caller for caller in callers]
        assert [type(each) for each in told] == [KeyboardInterrupt, Failed, Failed, Failed]
        assert [doubt(each) for each in told[1:]] == [True, False, True], "who only followed is in no doubt"
        (await threads.flight()).answer()
        assert isinstance(await behind[0], TxnReply)
    await works(threads)


def interrupt_once_it_waits(then: Callable[[], Any] = lambda: None) -> threading.Thread:
    """Interrupt the main thread, as Ctrl-C does, once it waits for others; then do something else."""
    main = threading.main_thread().ident
    assert main is not None
    assert threading.get_ident() == main

    def waits() -> bool:
        frame = sys._current_frames().get(main)
        where = frame and frame.f_code.co_filename == commit.__file__
        return bool(frame and where and "acquire(timeout" in linecache.getline(commit.__file__, frame.f_lineno))

    def work() -> None:
        eventually(waits, PATIENCE)
        signal.pthread_kill(main, signal.SIGINT)
        then()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_who_is_interrupted_while_it_waits_is_not_sent(pool: ThreadPoolExecutor, threads: Threads) -> None:
    begun = pool.submit(threads.told, write(b"/first"))
    flight = threads.next_flight()
    helper = interrupt_once_it_waits()
    assert isinstance(threads.told(write(b"/never", b"never")), KeyboardInterrupt)
    helper.join()
    behind = pool.submit(threads.told, write(b"/behind"))
    eventually(lambda: len(threads.committer._queue.waiting) >= 1, PATIENCE)
    flight.answer()
    shared = threads.next_flight()
    assert b"/never" not in shared.request
    shared.answer()
    assert isinstance(begun.result(PATIENCE), TxnReply)
    assert isinstance(behind.result(PATIENCE), TxnReply)
    threads.decide = Flight.answer
    assert isinstance(threads.told(write(b"/works")), TxnReply)
    assert threads.etcd.written[b"never"] == 0


def test_who_is_interrupted_while_another_carries_it_leaves_that_one_alone(
    pool: ThreadPoolExecutor, threads: Threads
) -> None:
    begun = pool.submit(threads.told, write(b"/first"))
    flight = threads.next_flight()
    carrying = pool.submit(threads.told, write(b"/carries"))
    eventually(lambda: len(threads.committer._queue.waiting) == 1, PATIENCE)
    shared: list[Flight] = []

    def fly() -> None:
        eventually(lambda: len(threads.committer._queue.waiting) == 2, PATIENCE)
        flight.answer()
        shared.append(threads.next_flight())
        assert b"/carried" in shared[0].request
        interrupter.start()

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        shared[0].answer()

    main = threading.get_ident()
    interrupter = threading.Thread(target=interrupt)
    flying = threading.Thread(target=fly)
    flying.start()
    assert isinstance(threads.told(write(b"/carried", b"carried")), KeyboardInterrupt)
    flying.join()
    interrupter.join()
    assert isinstance(begun.result(PATIENCE), TxnReply)
    assert isinstance(carrying.result(PATIENCE), TxnReply)
    assert threads.etcd.written[b"carried"] == 1
    threads.decide = Flight.answer
    assert isinstance(threads.told(write(b"/works")), TxnReply)
    assert threads.sent == 3


class Gate:
    """A lock whose holder is interrupted at the moment that it is let through."""

    interrupting = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release = self._lock.release

    def acquire(self, *, timeout: float = -1) -> bool:
        got = self._lock.acquire(timeout=timeout)
        if got and timeout >= 0 and Gate.interrupting:
            Gate.interrupting = False
            self._lock.release()
            raise KeyboardInterrupt
        return got


async def test_who_is_interrupted_as_it_is_to_send_lets_the_next_one_send(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "threading", SimpleNamespace(Lock=Gate))
    begun, flight = await threads.first()
    one = threads.commit(write(b"/one", b"one"))
    await threads.waiting(1)
    two = threads.commit(write(b"/two"))
    await threads.waiting(2)
    Gate.interrupting = True
    flight.answer()
    assert isinstance(await begun, TxnReply)
    assert isinstance(await one, KeyboardInterrupt)
    (await threads.flight()).answer()
    assert isinstance(await two, TxnReply)
    assert threads.etcd.written[b"one"] == 0
    await works(threads)


@pytest.mark.parametrize("kind", ["threads", "asyncio"])
async def test_whose_turn_comes_too_late_goes_alone(kind: str, pool: ThreadPoolExecutor, fake: Etcd) -> None:
    """A thread does not even wait for the one before it to end; a task goes by itself once that has ended."""
    face = Threads(pool, fake, 0.2) if kind == "threads" else Tasks(fake, 0.2)
    begun, flight = await face.first()
    callers = [face.commit(write(key)) for key in (b"/a", b"/b")]
    await face.waiting(2)
    ends = time.monotonic() + 0.35
    if kind == "asyncio":
        await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
        flight.answer()
        assert isinstance(await begun, TxnReply)
    alone = [await face.flight(), await face.flight()]
    assert sorted(each.request for each in alone) == [txn_request(write(b"/a")), txn_request(write(b"/b"))]
    for each in alone:
        each.answer()
    for caller in callers:
        told = await caller
        assert isinstance(told, TxnReply)
        assert told.succeeded, "it was not sent twice"
    flight.answer()
    assert isinstance(await begun, TxnReply)
    face.decide = Flight.answer
    assert isinstance(await face.commit(write(b"/works")), TxnReply)
    assert face.sent == 4


async def test_who_waits_behind_a_silent_member_goes_after_that_one_is_given_up(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both began to wait within a millisecond: who goes by itself too early asks the silent member, too."""
    assert waiting._PATIENCE >= 1.1
    monkeypatch.setattr(waiting, "_PATIENCE", 5.0)  # a busy machine may stop this test for a while
    face = Threads(face._pool, face.etcd, 0.5) if isinstance(face, Threads) else Tasks(face.etcd, 0.5)
    begun, flight = await face.first()
    sent = time.monotonic()
    behind = [face.commit(write(key)) for key in (b"/a", b"/b")]
    await face.waiting(2)
    await asyncio.to_thread(eventually, lambda: time.monotonic() > sent + 0.55)
    assert face.sent == 1
    flight.fail(failure())
    assert doubt(await begun)
    both = await face.flight()
    assert len(both.members) == 2, "neither waited too long to share"
    both.answer()
    for told in behind:
        assert isinstance(await told, TxnReply)


async def test_who_has_little_time_left_goes_at_once(face: Face) -> None:
    begun, flight = await face.first()
    hurried: Any = face.attempt_at if isinstance(face, Tasks) else face.committer.commit
    for timeout, left in ((face.timeout, 2.5 * face.timeout), (face.timeout / 2, 60.0)):
        call = functools.partial(hurried, write(f"/hurried {left}".encode()), timeout, time.monotonic() + left)
        task = asyncio.ensure_future(call() if isinstance(face, Tasks) else asyncio.to_thread(call))
        (await face.flight()).answer()
        assert (await asyncio.wait_for(task, PATIENCE)).succeeded
    flight.answer()
    assert isinstance(await begun, TxnReply)


async def test_a_task_that_is_cancelled_while_it_waits_is_not_sent(tasks: Tasks) -> None:
    begun, flight = await tasks.first()
    never, other = tasks.commit(write(b"/never", b"never")), tasks.commit(write(b"/other"))
    await tasks.waiting(2)
    never.cancel()
    assert isinstance(await never, asyncio.CancelledError)
    flight.answer()
    flight = await tasks.flight()
    assert b"/never" not in flight.request
    flight.answer()
    assert isinstance(await begun, TxnReply)
    assert isinstance(await other, TxnReply)
    await works(tasks)


async def test_a_task_that_is_cancelled_on_its_way_takes_nobody_with_it(tasks: Tasks) -> None:
    callers, flight = await tasks.gathered(write(b"/a"), write(b"/b"), claim(b"/c"))
    for caller in callers[:2]:
        assert isinstance(caller, asyncio.Task)
        caller.cancel()
        assert isinstance(await caller, asyncio.CancelledError)
    flight.answer()
    told = await callers[2]
    assert isinstance(told, TxnReply)
    assert told.succeeded
    await works(tasks)


async def test_a_first_task_that_is_cancelled_lets_the_others_go(tasks: Tasks) -> None:
    begun, _ = await tasks.first()
    other = tasks.commit(write(b"/other"))
    await tasks.waiting(1)
    assert isinstance(begun, asyncio.Task)
    begun.cancel()
    (await tasks.flight()).answer()
    assert isinstance(await begun, asyncio.CancelledError)
    assert isinstance(await other, TxnReply)
    await works(tasks)


async def test_the_task_that_carries_is_cancelled_with_all_that_it_does_not_know(tasks: Tasks) -> None:
    """As by a program that ends whatever tasks it finds, but its own."""
    callers, _ = await tasks.gathered(claim(b"/a"), write(b"/b"))
    behind = [tasks.commit(claim(b"/c")), tasks.commit(write(b"/d"))]
    await tasks.waiting(2)
    tasks.decide = Flight.answer
    ours = {asyncio.current_task(), *callers, *behind}
    for task in asyncio.all_tasks() - ours:
        if "Committer" in str(task.get_coro()) and "Committer.commit" not in str(task.get_coro()):
            task.cancel()
    assert [doubt(await caller) for caller in callers] == [True, True]
    for caller in behind:
        told = await caller
        assert isinstance(told, TxnReply | Failed), "nobody waits for a task that is no more"
    assert isinstance(await tasks.commit(write(b"/works")), TxnReply)


# --- threads that are woken ------------------------------------------------------------------------------------------


def turn_of(*succeeded: bool) -> tuple[Turn, list[threading.Lock]]:
    turn, gates = Turn(), []
    for each in succeeded:
        entry = pending(write(b"/a"), 0.0, WaitingThread)
        assert entry is not None
        entry.reply = TxnReply(each, 5)
        entry.gate = threading.Lock()
        entry.gate.acquire()
        gates.append(entry.gate)
        turn.add(entry)
    return turn, gates


def test_threads_wake_each_other_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_SLOW", 60.0)
    turn, gates = turn_of(True, True, True)
    for woken in range(4):
        assert [gate.locked() for gate in gates] == [False] * woken + [True] * (3 - woken)
        turn.wake()


def test_who_was_refused_is_woken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_SLOW", 60.0)
    turn, gates = turn_of(True, False, True, False)
    assert [gate.locked() for gate in gates] == [True, False, True, False]
    turn.wake()
    turn.wake()
    assert not any(gate.locked() for gate in gates)


def test_where_that_is_slow_the_rest_are_woken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_SLOW", -1.0)
    turn, gates = turn_of(True, True, True, True, True)
    turn.wake()
    assert not any(gate.locked() for gate in gates)


async def test_all_who_share_are_woken_while_other_threads_compute(threads: Threads) -> None:
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    computing = [threading.Thread(target=compute) for _ in range(2)]
    callers, flight = await threads.gathered(*many("a", 40))
    for thread in computing:
        thread.start()
    try:
        since = time.monotonic()
        flight.answer()
        told = await asyncio.gather(*callers)
        assert time.monotonic() - since < threads.timeout / 2, "nobody's turn was forgotten"
    finally:
        over.set()
        for thread in computing:
            thread.join()
    assert all(isinstance(each, TxnReply) for each in told)
    await works(threads)


# --- reads that go along ---------------------------------------------------------------------------------------------


def prefix(key: bytes, limit: int = 0) -> Range:
    return Range(key=key, range_end=key[:-1] + bytes((key[-1] + 1,)), limit=limit, shared=True)


def one(key: bytes) -> Range:
    return Range(key=key, range_end=b"", shared=True)


async def test_a_read_goes_by_itself_where_nobody_is_on_the_way(face: Face) -> None:
    assert await face.read(one(b"/a")) is None
    assert face.sent == 0


async def test_reads_go_ahead_of_the_writes_that_take_them_along(face: Face) -> None:
    """They see what stood before the transaction, of which a revision can be told by no part of it."""
    face.etcd.put(b"/a", b"before")
    begun, flight = await face.first()
    written = face.commit(Txn(compares=(), success=(Put(b"/a", b"after"), Put(b"/b", b"new"))))
    await face.waiting(1)
    reads = [face.read(one(b"/a")), face.read(prefix(b"/")), face.read(one(b"/none"))]
    await face.waiting(4)
    flight.answer()
    flight = await face.flight()
    kinds = [member.WhichOneof("request") for member in flight.members]
    assert kinds == ["request_range"] * 3 + ["request_txn"]
    flight.answer()
    assert isinstance(await begun, TxnReply)
    assert isinstance(await written, TxnReply)
    of_one, of_all, of_none = await asyncio.gather(*reads)
    assert of_one is not None
    assert [kv.value for kv in of_one.kvs] == [b"before"]
    assert of_all is not None
    assert [kv.key for kv in of_all.kvs] == [b"/a", b"/first", b"/session"]
    assert of_none is not None
    assert of_none.kvs == []
    assert face.sent == 2
    await works(face)


async def test_reads_alone_go_by_themselves(face: Face) -> None:
    """A transaction that only reads would save little, and an etcd before 3.5.5 can end by one that is cut off."""
    begun, flight = await face.first()
    reads = [face.read(one(b"/a")), face.read(one(b"/b"))]
    await face.waiting(2)
    flight.answer()
    assert isinstance(await begun, TxnReply)
    assert await asyncio.gather(*reads) == [None, None]
    assert face.sent == 1
    await works(face)


async def test_reads_do_not_go_along_with_claims_that_only_look(face: Face) -> None:
    """That would be such a transaction, too."""
    face.etcd.put(b"/step", b"theirs")
    begun, flight = await face.first(claim(b"/step"))
    same = face.commit(claim(b"/step", b"other"))
    await face.waiting(1)
    reading = face.read(one(b"/a"))
    await face.waiting(2)
    flight.answer()
    look = await face.flight()
    assert look.reads, "a read of one key, not a transaction"
    look.answer()
    assert await reading is None
    for told in (await begun, await same):
        assert isinstance(told, TxnReply)
        assert not told.succeeded
    await works(face)


async def test_a_read_of_several_pages_goes_by_itself(face: Face) -> None:
    for number in range(101):
        face.etcd.put(f"/p/{number:03}".encode(), b"")
    begun, flight = await face.first()
    written = face.commit(write(b"/w"))
    await face.waiting(1)
    fits = face.read(prefix(b"/p/0", limit=100))
    others = [face.read(prefix(b"/p/", limit=limit)) for limit in (0, 99, 1000)]
    await face.waiting(5)
    flight.answer()
    (await face.flight()).answer()
    assert isinstance(await begun, TxnReply)
    assert isinstance(await written, TxnReply)
    reply = await fits
    assert reply is not None
    assert len(reply.kvs) == 100
    assert await asyncio.gather(*others) == [None] * 3, "etcd would do nothing else meanwhile"
    await works(face)


@pytest.mark.parametrize("how", ["fail", "refuse", "lose", "fence"])
async def test_a_read_is_not_told_of_the_troubles_of_those_who_take_it_along(face: Face, how: str) -> None:
    begun, flight = await face.first()
    claiming = face.commit(claim(b"/c", fence=session(99 if how == "fence" else 1)))
    await face.waiting(1)
    reading = face.read(one(b"/a"))
    await face.waiting(2)
    face.decide = None
    flight.answer()
    flight = await face.flight()
    face.decide = Flight.answer
    if how == "fence":
        flight.answer()
    elif how == "lose":
        flight.lose()
    else:
        flight.fail(failure() if how == "fail" else refusal())
    assert isinstance(await begun, TxnReply)
    told = await claiming
    assert await reading is None
    if how == "fence":
        assert isinstance(told, TxnReply)
        assert told.fence_moved
    elif how == "refuse":
        assert isinstance(told, TxnReply), "it went alone"
    else:
        assert doubt(told)
    face.decide = None
    await works(face)


# --- several flights -------------------------------------------------------------------------------------------------


def many(name: str, count: int) -> list[Txn]:
    return [write(f"/{name}/{number}".encode()) for number in range(count)]


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it always be worth it: tests take long to answer."""
    monkeypatch.setattr(commit, "_OVERLAPPING", float("inf"))


async def test_while_etcd_is_much_slower_than_the_client_there_is_one_flight(tasks: Tasks) -> None:
    """Where many processes want the same etcd many small transactions would make it slower still."""
    callers, flight = await tasks.gathered(*many("a", 10))
    ends = time.monotonic() + 0.1
    await asyncio.to_thread(eventually, lambda: time.monotonic() > ends)
    flight.answer()
    await asyncio.gather(*callers)
    begun, first = await tasks.first()
    behind = [tasks.commit(op) for op in many("b", 70)]
    await tasks.waiting(70)
    first.answer()
    flight = await tasks.flight()
    assert len(flight.members) == 70
    flight.answer()
    told = await asyncio.gather(begun, *behind)
    assert all(isinstance(each, TxnReply) for each in told)
    await works(tasks)


@pytest.mark.usefixtures("overlapping")
async def test_a_second_flight_goes_once_it_is_worth_it_and_no_third(tasks: Tasks) -> None:
    begun, first = await tasks.first()
    callers = [tasks.commit(op) for op in many("few", 31)]
    await tasks.waiting(31)
    callers.append(tasks.commit(write(b"/enough")))
    second = await tasks.flight()
    assert len(second.members) == 32
    callers += [tasks.commit(op) for op in many("more", 60)]
    await tasks.waiting(60)
    second.answer()
    third = await tasks.flight()
    assert len(third.members) == 60, "what waits goes when one of the two is back"
    for flight in (first, third):
        flight.answer()
    told = await asyncio.gather(begun, *callers)
    assert [each.succeeded if isinstance(each, TxnReply) else each for each in told] == [True] * len(told)
    assert tasks.sent == 3
    await works(tasks)


@pytest.mark.usefixtures("overlapping")
async def test_who_waits_when_nobody_is_on_the_way_is_divided_in_two(tasks: Tasks) -> None:
    begun, first = await tasks.first()
    callers = [tasks.commit(op) for op in many("a", 40)]
    second = await tasks.flight()
    callers += [tasks.commit(op) for op in many("b", 70)]
    await tasks.waiting(70)
    first.answer()
    second.answer()
    flights = [await tasks.flight(), await tasks.flight()]
    assert [len(flight.members) for flight in flights] == [35, 35]
    for flight in reversed(flights):  # the later one may be back first
        flight.answer()
    told = await asyncio.gather(begun, *callers)
    assert [each.succeeded if isinstance(each, TxnReply) else each for each in told] == [True] * len(told)
    await works(tasks)


@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize("won", [True, False])
async def test_a_claim_does_not_follow_the_same_claim_in_another_flight(tasks: Tasks, won: bool) -> None:
    """It would cost etcd a refusal, and only then: it waits, and looks, or claims if nobody has the step."""
    if not won:
        tasks.etcd.put(b"/step", b"theirs")
    begun, first = await tasks.first(claim(b"/step"))
    same = [tasks.commit(claim(b"/step", f"{number}".encode())) for number in range(3)]
    others = [tasks.commit(op) for op in many("a", 40)]
    second = await tasks.flight()
    assert len(second.members) == 40
    assert b"/step" not in second.request
    first.answer()
    second.answer()
    looking = await tasks.flight()
    assert looking.reads, "who waited for it only looks"
    looking.answer()
    told = [await each for each in (begun, *same)]
    assert [each.succeeded if isinstance(each, TxnReply) else each for each in told] == [won, False, False, False]
    assert all(isinstance(each, TxnReply) for each in await asyncio.gather(*others))
    assert tasks.sent == 3
    await works(tasks)


@pytest.mark.usefixtures("overlapping")
async def test_after_a_flight_that_failed_the_same_claim_is_made_again(tasks: Tasks) -> None:
    begun, first = await tasks.first(claim(b"/step"))
    same = tasks.commit(claim(b"/step", b"other"))
    others = [tasks.commit(op) for op in many("a", 40)]
    second = await tasks.flight()
    first.fail(failure())
    second.answer()
    third = await tasks.flight()
    assert not third.reads
    third.answer()
    assert doubt(await begun)
    told = await same
    assert isinstance(told, TxnReply)
    assert told.succeeded
    assert all(isinstance(each, TxnReply) for each in await asyncio.gather(*others))
    await works(tasks)


# --- all at once -----------------------------------------------------------------------------------------------------


class Chance:
    """Many callers of few keys, before an etcd that fails at random; each call writes a value of its own."""

    def __init__(self, face: Face, seed: int) -> None:
        self.face = face
        self.told: dict[bytes, Told] = {}
        self._seed = seed
        self._random = random.Random(seed)  # noqa: S311 - chance is the point
        self._fence = session()
        self.outcomes: Counter[str] = Counter()
        self.owned: defaultdict[int, set[bytes]] = defaultdict(set)
        """What was to be written to a key of the caller's own."""

    def decide(self, flight: Flight) -> None:
        """Let a request be answered, lost, refused or interrupted, or the fence be moved before it arrives."""
        lot = self._random.random()
        if lot < 0.04:
            flight.fail(failure(definite=True))
        elif lot < 0.07:
            flight.fail(failure())
        elif lot < 0.10:
            flight.lose()
        elif lot < 0.13:
            flight.fail(refusal())
        elif lot < 0.14 and isinstance(self.face, Threads):
            flight.fail(KeyboardInterrupt())
        else:
            if lot > 0.98:
                self._fence = session(self.face.etcd.put(b"/session", b"{}"))
            flight.answer()

    def calls(self, caller: int, count: int) -> Iterator[tuple[bytes, Txn]]:
        """Make one caller's calls, each once the one before is over."""
        lots = random.Random(f"{self._seed} {caller}")  # noqa: S311
        held: list[tuple[bytes, bytes]] = []
        for number in range(count):
            name = f"{caller}.{number}".encode()
            if held and lots.random() < 0.8:
                key, value = held.pop()
                release = Txn(
                    compares=(Compare(key, "value", value),), success=(Delete(key), Put(b"/log/" + name, name))
                )
                yield name, release
                continue
            key = f"/k{lots.randrange(6)}".encode()
            if lots.random() < 0.7:
                yield name, claim(key, name, self._fence)
                told = self.told[name]
                if isinstance(told, TxnReply) and told.succeeded:
                    held.append((key, name))
            else:
                self.owned[caller].add(name)
                yield name, write(b"/own/" + name, name, entries=lots.randrange(3))

    def looked(self, caller: int, reply: RangeReply | None) -> None:
        """Hold what a caller read of its own calls, which all have ended, against what it was told of them."""
        self.outcomes["read along" if reply else "read alone"] += 1
        if reply is not None:
            written = {name for name in self.owned[caller] if name in self.told and self.face.etcd.written[name]}
            assert {kv.value for kv in reply.kvs} - {b""} == written, "neither less nor more than had been written"

    def judge(self, callers: int, count: int) -> None:
        """Hold what each caller was told against what etcd carried out."""
        assert len(self.told) == callers * count
        for name, told in self.told.items():
            written = self.face.etcd.written[name]
            if isinstance(told, TxnReply):
                assert written == told.succeeded, (name, told)
                kind = "done" if told.succeeded else "moved" if told.fence_moved or told.barrier else "refused"
            elif isinstance(told, Failed):
                assert written <= (not told.failure.definite), (name, told)
                kind = "no effect" if told.failure.definite else "doubt"
            else:
                assert isinstance(told, KeyboardInterrupt | asyncio.CancelledError), told
                assert written <= 1
                kind = "gone"
            self.outcomes[kind] += 1
        print(dict(self.outcomes), self.face.sent, "requests")
        kinds = {"done", "refused", "no effect", "doubt", "gone", "moved", "read along", "read alone"}
        assert set(self.outcomes) == kinds
        assert self.face.sent < callers * count
        assert not self.face.committer._queue.waiting or all(
            not each.take() for each in self.face.committer._queue.waiting
        ), "nobody is left behind"


@pytest.mark.parametrize("attempt_timeout", [5.0, 0.002], ids=["patient", "hasty"])
def test_many_threads_and_many_failures(pool: ThreadPoolExecutor, attempt_timeout: float) -> None:
    face = Threads(pool, Etcd(), attempt_timeout)
    chance = Chance(face, 1)

    def work(caller: int) -> None:
        for number, (name, op) in enumerate(chance.calls(caller, 200)):
            chance.told[name] = face.told(op)
            if number % 4 == 0:
                with contextlib.suppress(KeyboardInterrupt):
                    look = prefix(f"/own/{caller}.".encode())
                    chance.looked(caller, face.committer.read(look, time.monotonic() + 60))

    with ThreadPoolExecutor(1) as etcd:

        def decide(flight: Flight) -> None:
            etcd.submit(chance.decide, flight)

        face.decide = decide
        for done in [pool.submit(work, caller) for caller in range(32)]:
            done.result(60)
        face.decide = Flight.answer
        assert isinstance(face.told(write(b"/works")), TxnReply)
    chance.judge(32, 200)


async def test_many_tasks_and_many_failures_and_cancellations() -> None:
    face = Tasks(Etcd(), 5.0)
    chance = Chance(face, 2)
    loop = asyncio.get_running_loop()
    calls: set[asyncio.Task[Told]] = set()
    lots = random.Random(3)  # noqa: S311

    def decide(flight: Flight) -> None:
        if calls and lots.random() < 0.2:
            lots.choice(sorted(calls, key=id)).cancel()
        loop.call_soon(chance.decide, flight)

    async def work(caller: int) -> None:
        for number, (name, op) in enumerate(chance.calls(caller, 200)):
            if number % 4 == 1:
                chance.looked(caller, await face.read(prefix(f"/own/{caller}.".encode())))
            call = face.commit(op)
            calls.add(call)
            try:
                chance.told[name] = await call
            except asyncio.CancelledError as cancelled:  # before it had begun
                chance.told[name] = cancelled
            calls.discard(call)

    face.decide = decide
    await asyncio.wait_for(asyncio.gather(*map(work, range(32))), 60)
    face.decide = Flight.answer
    assert isinstance(await face.commit(write(b"/works")), TxnReply)
    chance.judge(32, 200)
