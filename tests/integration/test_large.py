"""Runs of 20,000 steps and texts at the limit, read as one snapshot; and the removal of thousands of runs."""

import asyncio
import bisect
import datetime as dt
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from etcd3 import etcdrpc

from proxy import EtcdProxy
from servers import EtcdServer, eventually
from stepclaim import AsyncEtcdRunStore, ClaimState, EtcdRunStore, RunStatus, StepStatus
from stepclaim._core.keys import Keyspace, RunKeys
from stepclaim._core.records import (
    VERSION,
    ActiveRow,
    ClaimRecord,
    ControlRow,
    DispatchRow,
    IdempotencyRow,
    Payload,
    RunRow,
    StepRow,
    encode,
)

STEPS = 20_000
RUNS, STEPS_A_RUN = 2_000, 20
LONG = 6_000
"""Keys of each kind in one run that is too large for one transaction."""
MOST_KEYS = 2_000
"""Keys that one transaction may remove, but for the runs' own entries in the indexes."""
NOW = dt.datetime(2024, 5, 1, 12, tzinfo=dt.UTC)
DEFAULT_MESSAGE = 4 * 1024 * 1024
"""What a gRPC client takes in one message if nobody told it otherwise."""
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

Pair = tuple[bytes, bytes]


class Raw:
    """etcd without stepclaim: quick writes, and what stands byte for byte."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.insecure_channel(endpoint, options=UNLIMITED)
        self.kv = etcdrpc.KVStub(self.channel)

    def put(self, pairs: Sequence[Pair]) -> None:
        """Write all at once, in one transaction."""
        ops = [etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=value)) for key, value in pairs]
        self.kv.Txn(etcdrpc.TxnRequest(success=ops), timeout=20)

    def put_all(self, pairs: Sequence[Pair]) -> None:
        """Write many, in as many transactions as it takes."""
        parts = [pairs[first : first + 120] for first in range(0, len(pairs), 120)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.put, parts))

    def range(self, prefix: str, **options: Any) -> Any:
        """Read below a prefix."""
        key = prefix.encode()
        end = key[:-1] + bytes([key[-1] + 1])
        return self.kv.Range(etcdrpc.RangeRequest(key=key, range_end=end, **options), timeout=30)

    def dump(self, prefix: str) -> dict[bytes, tuple[Any, ...]]:
        """Give all that stands, with everything that etcd knows of each key."""
        return {
            kv.key: (kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)
            for kv in self.range(prefix).kvs
        }


@pytest.fixture
def raw(etcd: EtcdServer) -> Iterator[Raw]:
    made = Raw(etcd.endpoint)
    yield made
    made.channel.close()


@pytest.fixture(params=["threads", "asyncio"])
def face(request: pytest.FixtureRequest) -> str:
    """Name the face that is under test."""
    name: str = request.param
    return name


def ask(face: str, endpoint: str, prefix: str, work: Sequence[Callable[[Any], Any]]) -> list[Any]:
    """Do some calls on a store of either face, and give the answers."""
    if face == "threads":
        with EtcdRunStore.connect(endpoint, prefix=prefix, session=False) as store:
            return [each(store) for each in work]

    async def ask_async() -> list[Any]:
        async with AsyncEtcdRunStore.connect(endpoint, prefix=prefix, session=False) as store:
            return [await each(store) for each in work]

    return asyncio.run(ask_async())


def row(status: StepStatus, **more: Any) -> bytes:
    """Make a step's row."""
    return encode(
        StepRow(v=VERSION, status=status, type="T", attempt=1, owner="host:1:abc", started_at=NOW, write_id="w", **more)
    )


def record(status: RunStatus, completed_at: dt.datetime | None) -> bytes:
    """Make a run's record."""
    return encode(
        RunRow(
            v=VERSION, flow_id="f", flow_name="F", status=status, trigger_key="manual", started_at=NOW,
            completed_at=completed_at, write_id="w",
        )
    )  # fmt: skip


# --- large runs ------------------------------------------------------------------------------------------------------


def test_twenty_thousand_steps_are_one_snapshot(face: str, etcd: EtcdServer, prefix: str, raw: Raw) -> None:
    run = Keyspace(prefix).run("large")
    refs = [run.step(f"loop.{number}.child") for number in range(STEPS)]
    pending, succeeded = row(StepStatus.PENDING), row(StepStatus.SUCCEEDED, completed_at=NOW)
    begun = time.monotonic()
    raw.put_all([(run.record, record(RunStatus.RUNNING, None)), *((ref.row, pending) for ref in refs)])
    print(f"{STEPS} rows written in {time.monotonic() - begun:.2f} s")
    # far apart in etcd's order: they never come in one page
    by_key = sorted(refs, key=lambda ref: ref.row)
    pairs = list(zip(by_key, by_key[STEPS // 2 :], strict=False))
    stop = threading.Event()

    def write() -> int:
        for moved, pair in enumerate(pairs):
            if stop.is_set():
                return moved
            raw.put([(ref.row, succeeded) for ref in pair])
        return len(pairs)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            begun = time.monotonic()
            snapshots = ask(face, etcd.endpoint, prefix, [lambda store: store.get_step_statuses("large")] * 8)
            print(f"get_step_statuses: {(time.monotonic() - begun) / 8:.2f} s a call")
        finally:
            stop.set()
        written = writing.result()
    moved = []
    for snapshot in snapshots:
        assert len(snapshot) == STEPS
        done = {name for name, status in snapshot.items() if status is StepStatus.SUCCEEDED}
        count = len(done) // 2
        # a state that existed: both of each pair, and no pair without all before it
        assert done == {ref.step_key for pair in pairs[:count] for ref in pair}
        moved.append(count)
    assert moved == sorted(moved)
    assert moved[0] < moved[-1] <= written
    page = raw.range(f"{run.base}steps/", limit=2000)
    print(f"a page of 2,000 rows has {page.ByteSize()} bytes")
    assert page.ByteSize() < DEFAULT_MESSAGE
    begun = time.monotonic()
    (whole,) = ask(face, etcd.endpoint, prefix, [lambda store: store.get_run("large")])
    print(f"get_run: {time.monotonic() - begun:.2f} s")
    assert len(whole.steps) == STEPS
    assert sum(step.status is StepStatus.SUCCEEDED for step in whole.steps) == 2 * written


def test_texts_at_the_limit_are_read(face: str, etcd: EtcdServer, prefix: str, raw: Raw) -> None:
    reason = "ä" * 100 * 1024
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix) as store, ThreadPoolExecutor(4) as pool:
        store.start_run("f", "F", "large", "manual")
        skip = [
            pool.submit(store.record_skipped_step, "large", f"s{number}", "T", reason, reason) for number in range(100)
        ]
        for each in skip:
            each.result()
    size = raw.range(f"{prefix}/runs/large/steps/").ByteSize()
    print(f"100 rows with reasons of 200 KiB have {size} bytes")
    assert size > 4 * DEFAULT_MESSAGE
    begun = time.monotonic()
    statuses, whole = ask(
        face,
        etcd.endpoint,
        prefix,
        [lambda store: store.get_step_statuses("large"), lambda store: store.get_run("large")],
    )
    print(f"both read in {time.monotonic() - begun:.2f} s")
    assert statuses == {f"s{number}": StepStatus.SKIPPED for number in range(100)}
    assert all(step.error == reason == step.evaluation_trace_json for step in whole.steps)


# --- removal ---------------------------------------------------------------------------------------------------------


def finished(keys: Keyspace, run: RunKeys, completed_at: dt.datetime, steps: int, *, once: bool) -> list[Pair]:
    """Make all keys of a run that ended, as its life leaves them."""
    pairs = [(run.record, record(RunStatus.SUCCEEDED, completed_at))]
    claim = encode(
        ClaimRecord(
            v=VERSION, state=ClaimState.SEALED, owner="host:1:abc", session="s", attempt_id="a", attempt=1,
            claimed_at=NOW, status=StepStatus.SUCCEEDED, sealed_at=NOW,
        )
    )  # fmt: skip
    dispatch = encode(DispatchRow(v=VERSION, recorded_at=NOW, write_id="w"))
    done = row(StepStatus.SUCCEEDED, completed_at=NOW, payload=True)
    for number in range(steps):
        ref = run.step(f"s{number}")
        pairs += [(ref.claim, claim), (ref.row, done), (ref.dispatch, dispatch)]
    first = run.step("s0")
    pairs.append((first.payload(1), encode(Payload(v=VERSION, output="1"))))
    pairs.append((first.attempt(1), done))
    pairs.append((run.control, encode(ControlRow(v=VERSION, cancel_requested=True))))
    if once:
        key = keys.idempotency("f", "manual", run.run_id)
        value = encode(IdempotencyRow(v=VERSION, run_id=run.run_id, registered_at=NOW, write_id="w"))
        pairs += [(key, value), (run.points_at(key), value)]
    return pairs


CUTOFF = NOW + dt.timedelta(hours=1)
PURGE = """
import datetime, sys
from stepclaim import EtcdRunStore
with EtcdRunStore.connect(sys.argv[1], prefix=sys.argv[2], session=False, timeout=60) as store:
    print(store.purge_runs(datetime.datetime.fromisoformat(sys.argv[3])))
"""


def the_rest(etcd: EtcdServer, prefix: str, keys: Keyspace) -> list[Pair]:
    """Make runs that must stay: active, completed later or at the very time, and neighbours by name."""
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=None) as store:
        for number in range(5):
            store.start_run("f", "F", f"active{number}", "manual", idempotency_key=f"active{number}")
            claim = store.claim_step(f"active{number}", "a", input_json="1")
            assert claim is not None
        store.try_claim_step("never started", "a")
        store.configure_run("only configured", "f", "manual")
    pairs: list[Pair] = []
    for number in range(20):
        pairs += finished(keys, keys.run(f"later{number}"), CUTOFF + dt.timedelta(seconds=number), 5, once=True)
    pairs += finished(keys, keys.run("r0/x"), CUTOFF, 5, once=True)
    pairs += finished(keys, keys.run("r00"), CUTOFF, 5, once=True)
    # a key that stood for a run that goes, and stands for another by now
    moved = keys.idempotency("f", "manual", "moved on")
    value = encode(IdempotencyRow(v=VERSION, run_id="later0", registered_at=NOW, write_id="w"))
    return [*pairs, (moved, value), (keys.run("later0").points_at(moved), value)]


def doomed_runs(keys: Keyspace) -> list[Pair]:
    """Make 2,000 runs that must go, and a large one; the oldest is the last by name."""
    pairs: list[Pair] = []
    for number in range(RUNS):
        completed = CUTOFF - dt.timedelta(milliseconds=number + 1)
        pairs += finished(keys, keys.run(f"r{number}"), completed, STEPS_A_RUN, once=number % 4 == 0)
    pairs += finished(keys, keys.run("long"), CUTOFF - dt.timedelta(microseconds=1), LONG // 3, once=True)
    moved = keys.run("r1").points_at(keys.idempotency("f", "manual", "moved on"))
    active = (keys.run("r2").active, encode(ActiveRow(v=VERSION, started_at=NOW)))  # an entry that was left behind
    return [*pairs, (moved, encode(IdempotencyRow(v=VERSION, run_id="r1", registered_at=NOW, write_id="w"))), active]


def take_away(request: bytes, keys: list[bytes]) -> int:
    """Do to a sorted list of keys what a transaction's deletions did, and count what went."""
    before = len(keys)
    for op in etcdrpc.TxnRequest.FromString(request).success:
        if op.HasField("request_delete_range"):
            each = op.request_delete_range
            end = each.range_end or each.key + b"\0"
            del keys[bisect.bisect_left(keys, each.key) : bisect.bisect_left(keys, end)]
    return before - len(keys)


def test_a_purge_removes_two_thousand_runs_and_nothing_else(etcd: EtcdServer, prefix: str, raw: Raw) -> None:
    keys = Keyspace(prefix)
    raw.put_all(the_rest(etcd, prefix, keys))
    rest = raw.dump(f"{prefix}/")
    raw.put_all(doomed_runs(keys))
    everything = sorted(raw.dump(f"{prefix}/"))
    records = {keys.run(f"r{number}").record for number in range(RUNS)} | {keys.run("long").record}
    print(f"{len(everything) - len(rest)} keys to go, {len(rest)} to stay")

    # one that is killed in the middle leaves no run without its record: the next finds them all
    process = subprocess.Popen(
        [sys.executable, "-c", PURGE, etcd.endpoint, prefix, CUTOFF.isoformat()], stdout=subprocess.PIPE
    )
    try:
        eventually(lambda: raw.range(f"{prefix}/runs/", count_only=True).count < len(everything) * 0.8, 40)
    finally:
        process.kill()
        process.communicate()
    left = raw.dump(f"{prefix}/")
    standing = records & set(left)
    assert 0 < len(standing) < len(records)
    names = {key.split(b"/")[3] for key in left if key.startswith(f"{prefix}/runs/".encode())}
    kept = {key.split(b"/")[3] for key in rest if key.startswith(f"{prefix}/runs/".encode())}
    assert names - kept == {key.split(b"/")[3] for key in standing}
    assert {key: left[key] for key in rest} == rest

    with ExitStack() as stack:
        proxy = stack.enter_context(EtcdProxy(etcd.endpoint))
        store = stack.enter_context(EtcdRunStore.connect(proxy.endpoint, prefix=prefix, session=False))
        # the oldest first, and no more than asked for
        assert store.purge_runs(CUTOFF, limit=100) == 100
        after = records & set(raw.dump(f"{prefix}/"))
        oldest = [key for number in range(RUNS) if (key := keys.run(f"r{number}").record) in standing][-100:]
        assert standing - after == set(oldest)

        # one that is cut off in the middle
        proxy.reset_calls()
        with ThreadPoolExecutor(1) as pool:
            purging = pool.submit(store.purge_runs, CUTOFF, limit=len(after) // 2)
            eventually(lambda: sum(b"/active/" in call.requests[0] for call in list(proxy.calls) if call.requests) > 8)
            proxy.cut_all()
            assert purging.result(30) == len(after) // 2

        proxy.reset_calls()
        before = sorted(raw.dump(f"{prefix}/"))
        standing = records & set(before)
        begun = time.monotonic()
        assert store.purge_runs(CUTOFF) == len(standing)
        took = time.monotonic() - begun
        print(f"purge of {len(standing)} runs: {took:.2f} s, {proxy.count('Txn')} Txn, {proxy.count('Range')} Range")
        sizes = [(take_away(call.request, before), len(call.request)) for call in proxy.calls if call.method == "Txn"]
        print(f"largest transaction: {max(count for count, _ in sizes)} keys, {max(size for _, size in sizes)} bytes")
        assert max(count for count, _ in sizes) <= MOST_KEYS + 200
        assert max(size for _, size in sizes) < 256 * 1024
        assert store.purge_runs(CUTOFF) == 0
        assert not store.delete_run("r1")
    assert raw.dump(f"{prefix}/") == rest


def test_a_purge_beside_workers_takes_no_run_that_goes_on(etcd: EtcdServer, prefix: str, raw: Raw) -> None:
    """A retry brings a completed run back to life; a purge takes it whole or not at all."""
    keys = Keyspace(prefix)
    runs = [f"r{number}" for number in range(200)]
    raw.put_all(list(itertools.chain(*(finished(keys, keys.run(run), NOW, 3, once=True) for run in runs))))
    with (
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix) as worker,
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix, session=False) as keeper,
        ThreadPoolExecutor(1) as pool,
    ):
        purging = pool.submit(keeper.purge_runs, CUTOFF)
        for run in reversed(runs):
            worker.retry_step(run, "s1")
        removed = purging.result(30)
        revived = {run.run_id for run in worker.get_active_runs()}
        print(f"{removed} removed, {len(revived)} revived")
        assert removed + len(revived) == len(runs)
        for run in revived:
            record_now = worker.get_run(run)
            assert record_now is not None
            assert [step.status for step in record_now.steps] == ["Succeeded", "Running", "Succeeded"]
            assert worker.find_run_by_idempotency_key("f", "manual", run) == run
        for run in set(runs) - revived:
            assert worker.find_run_by_idempotency_key("f", "manual", run) is None
            assert worker.get_run_status(run) is None
