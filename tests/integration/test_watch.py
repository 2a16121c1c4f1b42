"""Watching and waiting through failovers, lost connections and compactions, against the history that etcd holds."""

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
import pytest
from etcd3 import etcdrpc

from proxy import EtcdProxy
from servers import EtcdCluster, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    ClaimTimeoutError,
    EtcdRunStore,
    OutcomeUnknownError,
    StepClaim,
    StepClaimError,
    StoreClosedError,
    UnavailableError,
)
from stepclaim.embedded import EmbeddedEtcd, free_ports
from stepclaim.events import (
    ClaimEnded,
    ClaimSealed,
    ClaimTaken,
    ControlChanged,
    DispatchEnded,
    Relisted,
    RunChanged,
    RunEvent,
    RunRemoved,
    StepChanged,
    StepDispatched,
    StepReset,
)

RUN = "r"
LAST = "the last"
FACES = ("threads", "asyncio")
STREAM = 8.0
"""A stream's longest life: what a silence may cost a watcher that has only one member to ask."""
SLACK = 4.0
"""An election, waits between attempts, a busy machine."""
UNMET = "Prerequisite status did not satisfy runAfter conditions."
UNLIMITED = [("grpc.max_receive_message_length", -1)]
PARTS: dict[type[RunEvent], tuple[str, bool]] = {
    RunChanged: ("run", False), RunRemoved: ("run", True), ControlChanged: ("control", False),
    StepChanged: ("steps", False), StepReset: ("steps", True),
    ClaimTaken: ("claims", False), ClaimSealed: ("claims", False), ClaimEnded: ("claims", True),
    StepDispatched: ("dispatches", False), DispatchEnded: ("dispatches", True),
}  # fmt: skip


class Change(NamedTuple):
    """One change of one key: what a watcher is told and what etcd holds, in the same words."""

    revision: int
    part: str
    step: str
    gone: bool


def told(event: RunEvent) -> Change:
    """Say of an event which key it is about."""
    part, gone = PARTS[type(event)]
    return Change(event.revision, part, getattr(event, "step_key", ""), gone)


class Truth:
    """What etcd itself says: the history of the run's keys, and what stands."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self._endpoint = endpoint
        self._prefix = f"{prefix}/runs/{RUN}/".encode()
        self.changes: list[Change] = []

    def read(self, last: int) -> list[Change]:
        """Read the history on, up to the revision of the run's last change, by a watch of our own."""
        first = self.changes[-1].revision + 1 if self.changes else 1
        watch = etcdrpc.WatchCreateRequest(
            key=self._prefix, range_end=self._prefix[:-1] + b"0", start_revision=first, prev_kv=False
        )
        if first > last:
            return self.changes
        with grpc.insecure_channel(self._endpoint, options=UNLIMITED) as channel:
            answers = etcdrpc.WatchStub(channel).Watch(iter([etcdrpc.WatchRequest(create_request=watch)]), timeout=20)
            for answer in answers:
                assert not answer.canceled, answer
                for event in answer.events:
                    part, _, step = event.kv.key.removeprefix(self._prefix).decode().partition("/")
                    if part in {"run", "control", "claims", "steps", "dispatches"}:
                        gone = event.type == event.DELETE
                        self.changes.append(Change(event.kv.mod_revision, part, step.replace("%20", " "), gone))
                if answer.events and answer.events[-1].kv.mod_revision >= last:
                    answers.cancel()
                    return self.changes
        raise AssertionError("etcd ended the watch")

    def standing(self) -> dict[tuple[str, str], int]:
        """Read which keys stand, and when each was written."""
        with grpc.insecure_channel(self._endpoint, options=UNLIMITED) as channel:
            answer = etcdrpc.KVStub(channel).Range(
                etcdrpc.RangeRequest(key=self._prefix, range_end=self._prefix[:-1] + b"0", keys_only=True), timeout=20
            )
        found = {}
        for kv in answer.kvs:
            part, _, step = kv.key.removeprefix(self._prefix).decode().partition("/")
            if part in {"run", "control", "claims", "steps", "dispatches"}:
                found[part, step.replace("%20", " ")] = kv.mod_revision
        return found


def state(events: Sequence[RunEvent]) -> dict[tuple[str, str], int]:
    """Give what stands after the events, for one who follows them from the first."""
    found: dict[tuple[str, str], int] = {}
    for event in events:
        if isinstance(event, Relisted):
            continue
        change = told(event)
        if change.gone:
            found.pop((change.part, change.step), None)
        else:
            found[change.part, change.step] = change.revision
    return found


class Driven:
    """A store of either face, driven from the test's thread; the asyncio one lives in a loop of its own."""

    def __init__(self, face: str, endpoints: str | list[str], *, member: int | None = None, **options: Any) -> None:
        self.face = face
        self._threads = ThreadPoolExecutor(8)
        self._loop = asyncio.new_event_loop()
        self._runner = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner.start()
        if face == "threads":
            self.raw: Any = EtcdRunStore.connect(endpoints, **options)
        else:

            async def connect() -> Any:
                return await AsyncEtcdRunStore.connect(endpoints, **options)

            self.raw = asyncio.run_coroutine_threadsafe(connect(), self._loop).result(20)
        if member is not None:
            self.raw._client.members.current = self.raw._client.members.all[member]

    def start(self, name: str, *args: Any, **keywords: Any) -> Future[Any]:
        """Begin a call in the background."""
        method = getattr(self.raw, name)
        if self.face == "threads":
            return self._threads.submit(method, *args, **keywords)
        return asyncio.run_coroutine_threadsafe(method(*args, **keywords), self._loop)

    def call(self, name: str, *args: Any, **keywords: Any) -> Any:
        """Make a call and give its answer."""
        return self.start(name, *args, **keywords).result(30)

    def watch(self, seen: Callable[[RunEvent], None], after: int | None) -> Future[None]:
        """Watch in the background up to the run's last event."""

        def collect() -> None:
            with contextlib.closing(self.raw.watch_run(RUN, after_revision=after, timeout=60)) as events:
                for event in events:
                    seen(event)
                    if is_last(event):
                        return

        async def collect_async() -> None:
            async with contextlib.aclosing(self.raw.watch_run(RUN, after_revision=after, timeout=60)) as events:
                async for event in events:
                    seen(event)
                    if is_last(event):
                        return

        if self.face == "threads":
            return self._threads.submit(collect)
        return asyncio.run_coroutine_threadsafe(collect_async(), self._loop)

    def streams(self) -> int:
        """Count the store's open watch streams."""
        return len(self.raw._client.streams)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.start("close").result(30)
        self._threads.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._runner.join()
        self._loop.close()


def idle(store: Driven) -> bool:
    """Tell whether no stream is open."""
    return not store.streams()


def is_last(event: RunEvent) -> bool:
    """Tell the writer's last word."""
    return isinstance(event, StepDispatched) and event.step_key == LAST


class Watcher:
    """One watcher and what it was told; it can be made to stop reading."""

    def __init__(self, store: Driven, after: int | None = 0) -> None:
        self.after = after
        self.events: list[RunEvent] = []
        self.reads = threading.Event()
        self.reads.set()
        self._done = store.watch(self._take, after)

    def _take(self, event: RunEvent) -> None:
        assert self.reads.wait(30)
        self.events.append(event)

    @property
    def revision(self) -> int:
        """The last revision that was told."""
        return max((event.revision for event in self.events), default=0)

    def reaches(self, revision: int, timeout: float) -> None:
        """Wait until so much was told."""
        eventually(lambda: self._done.done() or self.revision >= revision, timeout)
        if self._done.done():
            self._done.result()

    def ends(self, timeout: float) -> list[Change]:
        """Wait for the last word and give all that was told."""
        self._done.result(timeout)
        return [told(event) for event in self.events if not isinstance(event, Relisted)]

    @property
    def relisted(self) -> list[int]:
        """The places at which it was told that something was lost."""
        return [at for at, event in enumerate(self.events) if isinstance(event, Relisted)]


class Writer:
    """Works on the run all the time: steps that are claimed, finished, given back, deferred, retried and reset."""

    def __init__(self, endpoints: str | list[str], prefix: str, *, pace: float = 0.01) -> None:
        self._store = EtcdRunStore.connect(endpoints, prefix=prefix, owner="writer")
        self._stop = threading.Event()
        self._pace = pace
        self.rounds = 0
        self.failures: list[StepClaimError] = []
        self._store.start_run("f", "F", RUN, "manual")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for number in itertools.count():
            if self._stop.wait(self._pace):
                return
            try:
                self._act(number, f"s{number}")
            except StepClaimError as error:  # etcd tells what came of it
                self.failures.append(error)
            self.rounds += 1

    def _act(self, number: int, key: str) -> None:
        store, kind = self._store, number % 6
        if kind == 0:
            store.record_skipped_step(RUN, key, "T", UNMET)
            store.reset_cascade_skipped_dependents(RUN, [key])
            return
        store.try_record_dispatch(RUN, key)
        claim = store.claim_step(RUN, key, input_json="1")
        if claim is None:
            return
        if kind == 1:
            store.complete_step(claim, "Succeeded", output_json="2", dispatch=[f"{key}.next"])
        elif kind == 2:
            store.release_claim(claim)
            store.release_dispatch(RUN, key)
        elif kind == 3:
            store.complete_step(claim, "Failed", error="x")
            store.retry_step(RUN, key)
        elif kind == 4:
            store.defer_step(claim, dispatch=True)
        else:
            store.request_cancel(RUN, str(number))
            store.annotate_dispatch(RUN, key, "j")
            store.complete_step(claim, "Skipped")

    def goes_on(self, rounds: int = 12, timeout: float = 20) -> None:
        """Wait until more was done."""
        enough = self.rounds + rounds
        eventually(lambda: self.rounds >= enough, timeout)

    def ends(self) -> None:
        """Stop, and say the last word."""
        self._stop.set()
        self._thread.join()
        self._store.try_record_dispatch(RUN, LAST)
        self._store.close()


def last_revision(endpoint: str, prefix: str) -> int:
    """Give the revision of the run's newest key that stands."""
    return max(Truth(endpoint, prefix).standing().values())


def revision_now(endpoint: str) -> int:
    """Give etcd's revision."""
    with grpc.insecure_channel(endpoint) as channel:
        answer = etcdrpc.KVStub(channel).Range(etcdrpc.RangeRequest(key=b"\0"), timeout=10)
    return int(answer.header.revision)


def compact(server: EmbeddedEtcd) -> int:
    """Forget all history up to now."""
    revision = revision_now(server.endpoint)
    server.etcdctl("compact", str(revision))
    return revision


class HalfOpen:
    """Passes bytes between clients and etcd; connections that stand can be left for dead while new ones work."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._port = free_ports(1)[0]
        self.endpoint = f"127.0.0.1:{self._port}"
        self._sockets: list[socket.socket] = []
        self._generation = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def abandon(self) -> int:
        """Let every connection that stands go silent, for ever, and open; give how many."""
        with self._lock:
            self._generation += 1
            return len(self._sockets) // 2

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                try:
                    server = socket.create_connection(self._upstream)
                except OSError:
                    client.close()
                    continue
                self._sockets += (client, server)
                for pair in ((client, server), (server, client)):
                    thread = threading.Thread(target=self._pump, args=(*pair, self._generation), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, target: socket.socket, generation: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if generation == self._generation:
                    target.sendall(data)
            if generation == self._generation:
                target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        self._server = socket.create_server(("127.0.0.1", self._port))
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._accepting.join()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()


@pytest.fixture
def server() -> Iterator[EmbeddedEtcd]:
    """Give a server of the test's own: its history is whole, and what is compacted is nobody else's."""
    with EmbeddedEtcd() as started:
        yield started


@pytest.fixture
def proxy(server: EmbeddedEtcd) -> Iterator[EtcdProxy]:
    with EtcdProxy(server.endpoint) as between:
        yield between


@pytest.fixture
def half_open(server: EmbeddedEtcd) -> Iterator[HalfOpen]:
    with HalfOpen(server.endpoint) as between:
        yield between


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster() as three:
        yield three


@pytest.fixture
def opened() -> Iterator[Callable[..., Driven]]:
    """Give a function that opens a store, which is closed with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(Driven(*args, **options))


def no_gap(watchers: Sequence[Watcher], truth: Truth, last: int, timeout: float) -> None:
    """Show that each watcher was told etcd's own history: every change of every key once, in etcd's order."""
    for watcher in watchers:
        changes = watcher.ends(timeout)
        assert not watcher.relisted
        assert changes == truth.read(last)
    assert len(truth.changes) > 100
    assert {change.part for change in truth.changes} == {"run", "control", "claims", "steps", "dispatches"}
    assert {change.part for change in truth.changes if change.gone} == {"claims", "steps", "dispatches"}


# --- watching --------------------------------------------------------------------------------------------------------


def test_a_watcher_lives_through_cut_and_silent_connections(
    server: EmbeddedEtcd, prefix: str, proxy: EtcdProxy, half_open: HalfOpen, opened: Callable[..., Driven]
) -> None:
    writer = Writer(server.endpoint, prefix)
    options = {"prefix": prefix, "session": False}
    through_proxy = [Watcher(opened(face, proxy.endpoint, **options)) for face in FACES]
    through_half = [Watcher(opened(face, half_open.endpoint, **options)) for face in FACES]
    watchers = [*through_proxy, *through_half]

    def all_reach_now(each: Sequence[Watcher] = watchers, timeout: float = SLACK) -> None:
        now = last_revision(server.endpoint, prefix)
        for watcher in each:
            watcher.reaches(now, timeout)

    writer.goes_on()
    all_reach_now()
    assert half_open.abandon() >= 2
    silent_since = time.monotonic()
    for _ in range(3):
        proxy.cut_all()
        writer.goes_on()
        all_reach_now(through_proxy)
    proxy.blackhole(on=True)
    writer.goes_on(60)
    before = [watcher.revision for watcher in through_proxy]
    now = last_revision(server.endpoint, prefix)
    assert all(revision < now for revision in before)
    proxy.blackhole(on=False)
    all_reach_now(through_proxy)
    all_reach_now(through_half, silent_since + STREAM + SLACK - time.monotonic())
    writer.goes_on()
    writer.ends()
    assert not writer.failures
    no_gap(watchers, Truth(server.endpoint, prefix), last_revision(server.endpoint, prefix), SLACK)


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_watcher_lives_through_a_change_of_the_leader(
    fault: str, cluster: EtcdCluster, prefix: str, opened: Callable[..., Driven]
) -> None:
    leader = cluster.leader()
    at = cluster.members.index(leader)
    healthy = next(member for member in cluster.members if member is not leader)
    writer = Writer(cluster.endpoints, prefix)
    options = {"prefix": prefix, "session": False}
    watchers = [
        Watcher(opened(face, cluster.endpoints, member=member, **options))
        for face in FACES
        for member in (at, (at + 1) % 3)
    ]
    writer.goes_on()
    for watcher in watchers:
        watcher.reaches(last_revision(healthy.endpoint, prefix), SLACK)
    (leader.kill if fault == "kill" else leader.pause)()
    since = time.monotonic()
    try:
        writer.goes_on()
        now = last_revision(healthy.endpoint, prefix)
        allowed = SLACK if fault == "kill" else STREAM + SLACK
        for watcher in watchers:
            watcher.reaches(now, since + allowed - time.monotonic())
    finally:
        (leader.restart if fault == "kill" else leader.resume)()
    writer.goes_on()
    writer.ends()
    no_gap(watchers, Truth(healthy.endpoint, prefix), last_revision(healthy.endpoint, prefix), STREAM + SLACK)


def test_a_compaction_that_did_not_outrun_the_watcher_is_not_noticed(
    server: EmbeddedEtcd, prefix: str, proxy: EtcdProxy, opened: Callable[..., Driven]
) -> None:
    writer, truth = Writer(server.endpoint, prefix), Truth(server.endpoint, prefix)
    watchers = [Watcher(opened(face, proxy.endpoint, prefix=prefix, session=False)) for face in FACES]
    for _ in range(4):
        writer.goes_on()
        now = last_revision(server.endpoint, prefix)
        truth.read(now)
        for watcher in watchers:
            watcher.reaches(now, SLACK)
        server.etcdctl("compact", str(now))
        proxy.cut_all()
    writer.goes_on()
    writer.ends()
    no_gap(watchers, truth, last_revision(server.endpoint, prefix), SLACK)


@pytest.mark.parametrize("why", ["silent", "stopped"])
def test_a_compaction_that_outran_the_watcher_is_told_and_then_what_stands(
    why: str, server: EmbeddedEtcd, prefix: str, proxy: EtcdProxy, opened: Callable[..., Driven]
) -> None:
    writer, truth = Writer(server.endpoint, prefix), Truth(server.endpoint, prefix)
    stores = [opened(face, proxy.endpoint, prefix=prefix, session=False) for face in FACES]
    # from the first revision, and from the state as it stands
    watchers = [Watcher(store, after) for store in stores for after in (0, None)]
    writer.goes_on()
    for watcher in watchers:
        watcher.reaches(last_revision(server.endpoint, prefix), SLACK)
    if why == "silent":
        proxy.blackhole(on=True)
    else:
        for watcher in watchers:
            watcher.reads.clear()
    known = set(truth.standing())
    behind = eventually(lambda: truth.read(last_revision(server.endpoint, prefix)))[-1].revision
    victim = opened("threads", server.endpoint, prefix=prefix)
    victim.call("release_step_claim", RUN, "s1")  # keys that the watchers know and that go unseen
    victim.call("release_dispatch", RUN, "s1")
    victim.call("release_dispatch", RUN, "s1.next")
    writer.goes_on(60)
    compacted = truth.read(last_revision(server.endpoint, prefix))[-1].revision
    assert compacted > behind
    server.etcdctl("compact", str(compacted))
    proxy.cut_all()
    if why == "silent":
        proxy.blackhole(on=False)
    for watcher in watchers:
        watcher.reads.set()
    for watcher in watchers:
        watcher.reaches(last_revision(server.endpoint, prefix), STREAM + SLACK)
    writer.goes_on()
    writer.ends()
    history = truth.read(last_revision(server.endpoint, prefix))
    standing = truth.standing()
    assert known - set(standing) >= {("claims", "s1"), ("dispatches", "s1"), ("dispatches", "s1.next")}
    for watcher in watchers:
        watcher.ends(SLACK)
        events = watcher.events
        assert len(watcher.relisted) == 1
        at = watcher.relisted[0]
        revisions = [event.revision for event in events]
        assert revisions == sorted(revisions)
        before = [told(event) for event in events[:at]]
        after = [told(event) for event in events[at + 1 :]]
        if watcher.after == 0:
            assert before == history[: len(before)]
        assert len(set(before + after)) == len(before + after)
        written = [change for change in after if not change.gone]
        assert set(written) <= set(history)
        assert written[0].revision > before[-1].revision
        # from the compaction on nothing is missing
        late = [change for change in history if change.revision > written[-1].revision - 5]
        assert after[-len(late) :] == late
        assert state(events) == standing


@pytest.mark.parametrize("face", FACES)
def test_one_who_goes_on_behind_a_compaction_is_told_all_that_stands(
    face: str, server: EmbeddedEtcd, prefix: str, opened: Callable[..., Driven]
) -> None:
    store = opened(face, server.endpoint, prefix=prefix)
    for step in ("a", "b"):
        store.call("try_record_dispatch", RUN, step)
    seen = last_revision(server.endpoint, prefix)
    store.call("release_dispatch", RUN, "b")
    store.call("try_record_dispatch", RUN, "c")
    store.call("try_record_dispatch", RUN, LAST)
    compact(server)
    watcher = Watcher(store, seen)
    watcher.ends(SLACK)
    # what went can't be told any more: all that stands is, so that the rest is known to be gone
    assert watcher.relisted == [0]
    assert [getattr(event, "step_key", "") for event in watcher.events[1:]] == ["a", "c", LAST]
    assert watcher.events[0].revision <= seen  # who goes on behind it is told of the compaction again


# --- waiting ---------------------------------------------------------------------------------------------------------


class Waiting:
    """A step that somebody holds and that others wait for."""

    def __init__(self, holder: Driven, step: str) -> None:
        self.holder = holder
        self.step = step
        self.claim: StepClaim = holder.call("claim_step", RUN, step)
        self.got: Future[Any] | None = None

    def wait(self, store: Driven, timeout: float) -> Future[Any]:
        """Let a store wait for it, and see that its stream is open."""
        before = store.streams()
        self.got = store.start("wait_for_step", RUN, self.step, timeout=timeout)
        eventually(lambda: store.streams() > before)
        return self.got

    def passes_on(self, within: float) -> None:
        """Give the step up, and see the waiter get it soon."""
        assert self.got is not None
        assert not self.got.done()
        assert self.holder.call("release_claim", self.claim)
        claim = self.got.result(within)
        assert (claim.step_key, claim.attempt) == (self.step, 2)
        assert claim.fencing_token > self.claim.fencing_token
        assert self.holder.call("holds", claim)


@pytest.fixture
def holder(server: EmbeddedEtcd, prefix: str, opened: Callable[..., Driven]) -> Driven:
    return opened("threads", server.endpoint, prefix=prefix, owner="holder")


@pytest.mark.parametrize("fault", ["none", "cut", "silent", "half-open", "compaction"])
def test_who_waits_gets_the_step_soon(
    fault: str, server: EmbeddedEtcd, prefix: str, proxy: EtcdProxy, half_open: HalfOpen, holder: Driven,
    opened: Callable[..., Driven],
) -> None:  # fmt: skip
    endpoint = half_open.endpoint if fault == "half-open" else proxy.endpoint
    waits = []
    for face in FACES:
        waits.append(Waiting(holder, face))
        waits[-1].wait(opened(face, endpoint, prefix=prefix), 40)
    allowed = SLACK
    if fault == "cut":
        proxy.cut_all()
    elif fault == "silent":
        proxy.blackhole(on=True)
        for wait in waits:
            assert holder.call("release_claim", wait.claim)
            assert wait.got is not None
            assert not wait.got.done()
        proxy.blackhole(on=False)
        for wait in waits:
            assert wait.got is not None
            assert wait.got.result(SLACK).attempt == 2
        return
    elif fault == "half-open":
        half_open.abandon()
        allowed = STREAM + SLACK
    elif fault == "compaction":
        for _ in range(3):
            holder.call("try_record_dispatch", RUN, "other")
            holder.call("release_dispatch", RUN, "other")
        compact(server)
        proxy.cut_all()
    for wait in waits:
        wait.passes_on(allowed)


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_who_waits_gets_the_step_soon_after_a_change_of_the_leader(
    fault: str, cluster: EtcdCluster, prefix: str, opened: Callable[..., Driven]
) -> None:
    leader = cluster.leader()
    at = cluster.members.index(leader)
    options: dict[str, Any] = {"prefix": prefix, "member": at}
    holder = opened("threads", cluster.endpoints, prefix=prefix, owner="holder")
    waits = []
    for face in FACES:
        waits.append(Waiting(holder, face))
        waits[-1].wait(opened(face, cluster.endpoints, **options), 60)
    (leader.kill if fault == "kill" else leader.pause)()
    try:
        for wait in waits:
            wait.passes_on(SLACK if fault == "kill" else STREAM + SLACK)
    finally:
        (leader.restart if fault == "kill" else leader.resume)()


@pytest.mark.parametrize("face", FACES)
def test_waiting_is_not_polling(face: str, prefix: str, proxy: EtcdProxy, holder: Driven, opened: Any) -> None:
    wait = Waiting(holder, "a")
    store = opened(face, proxy.endpoint, prefix=prefix, lease_ttl=60)
    eventually(lambda: proxy.count("LeaseKeepAlive") >= 1 or proxy.count("Txn") >= 1)
    proxy.reset_calls()
    got = store.start("wait_for_step", RUN, "a", timeout=3)
    with pytest.raises(ClaimTimeoutError):
        got.result(10)
    # one look, one stream, and one look at most when the time is over
    assert proxy.count("Watch") == 1
    assert 1 <= proxy.count("Txn") + proxy.count("Range") <= 2
    assert holder.call("holds", wait.claim)


def test_waiting_opens_its_stream_anew_each_eight_seconds(
    prefix: str, proxy: EtcdProxy, holder: Driven, opened: Any
) -> None:
    waits = [(Waiting(holder, face), opened(face, proxy.endpoint, prefix=prefix, lease_ttl=60)) for face in FACES]
    proxy.reset_calls()
    for wait, store in waits:
        wait.wait(store, 30)
    eventually(lambda: proxy.count("Watch") >= 4, STREAM + SLACK)
    assert proxy.count("Txn") + proxy.count("Range") <= 6
    for wait, _ in waits:
        wait.passes_on(SLACK)


@pytest.mark.parametrize("fault", ["refuse", "silent"])
def test_waiting_ends_in_time_while_etcd_is_away(
    fault: str, prefix: str, proxy: EtcdProxy, holder: Driven, opened: Callable[..., Driven]
) -> None:
    waits = [(Waiting(holder, face), opened(face, proxy.endpoint, prefix=prefix, lease_ttl=60)) for face in FACES]
    begun = time.monotonic()
    ended: list[float] = []
    waiting = [wait.wait(store, 3) for wait, store in waits]
    for got in waiting:
        got.add_done_callback(lambda _: ended.append(time.monotonic() - begun))
    if fault == "refuse":
        proxy.refuse(on=True)
        proxy.cut_all()
    else:
        proxy.blackhole(on=True)
    try:
        for got in waiting:
            # where the stream was found dead before, a claim went out that nobody answered
            with pytest.raises((ClaimTimeoutError, UnavailableError, OutcomeUnknownError)):
                got.result(10)
        assert all(2.5 <= after <= 4.5 for after in ended)
    finally:
        proxy.blackhole(on=False)
        proxy.refuse(on=False)
    for wait, _ in waits:
        assert holder.call("holds", wait.claim)


@pytest.mark.parametrize("face", FACES)
def test_closing_the_store_ends_waiting_and_watching(
    face: str, server: EmbeddedEtcd, prefix: str, holder: Driven
) -> None:
    wait = Waiting(holder, "a")
    with Driven(face, server.endpoint, prefix=prefix) as store:
        got = wait.wait(store, 60)
        watcher = Watcher(store)
        watcher.reaches(wait.claim.fencing_token, SLACK)
        eventually(lambda: store.streams() == 2)
        begun = time.monotonic()
        closing = store.start("close")
        with pytest.raises(StoreClosedError):
            got.result(5)
        with pytest.raises(StoreClosedError):
            watcher.ends(5)
        closing.result(5)
        assert time.monotonic() - begun < 2
    assert holder.call("holds", wait.claim)


def test_a_cancelled_wait_ends_at_once_and_leaves_nothing(
    prefix: str, proxy: EtcdProxy, holder: Driven, opened: Callable[..., Driven]
) -> None:
    wait = Waiting(holder, "a")
    store = opened("asyncio", proxy.endpoint, prefix=prefix)
    got = wait.wait(store, 60)
    begun = time.monotonic()
    got.cancel()
    with pytest.raises(CancelledError):
        got.result(5)
    eventually(partial(idle, store), 1)
    assert time.monotonic() - begun < 1
    assert holder.call("release_claim", wait.claim)
    again = holder.call("claim_step", RUN, "a")
    assert again is not None
    assert again.attempt == 2


def test_a_watcher_that_is_left_closes_its_stream(
    server: EmbeddedEtcd, prefix: str, opened: Callable[..., Driven]
) -> None:
    store = opened("threads", server.endpoint, prefix=prefix)
    store.call("try_record_dispatch", RUN, LAST)
    for face in FACES:
        watching = opened(face, server.endpoint, prefix=prefix, session=False)
        Watcher(watching).ends(SLACK)
        eventually(partial(idle, watching), 1)
