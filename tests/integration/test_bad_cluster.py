"""A cluster in trouble: away, silent, full, with records that nobody can read; and a store that is used wrongly."""

import asyncio
import functools
import gc
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from datetime import UTC, datetime
from typing import Any

import etcd3
import pytest

from fix_stores import AnyStore
from proxy import EtcdProxy
from servers import EtcdServer, eventually
from stepclaim import (
    AsyncEtcdRunStore,
    CorruptRecordError,
    DeadlineExceededError,
    EtcdRunStore,
    OutcomeUnknownError,
    RecordTooLargeError,
    ResourceExhaustedError,
    SessionLostError,
    StepClaim,
    StoreClosedError,
    UnavailableError,
)
from stepclaim.embedded import EmbeddedEtcd, free_ports

OpenAt = Callable[..., AbstractAsyncContextManager[AnyStore]]

AT_ONCE = 3.0
"""Seconds that a refusal may take, of the ten that a call has."""
SLACK = 0.7
"""Seconds past its deadline that a call may take on a busy machine."""
NO_ANSWER = (UnavailableError, DeadlineExceededError, OutcomeUnknownError)
NOISE = ("ipv4:", "last error", "SETTINGS", "recvmsg", "grpc", "\n")
"""What gRPC says around the words that help."""


@pytest.fixture(params=("threads", "asyncio"))
def face(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def open_at(face: str, threads: ThreadPoolExecutor) -> OpenAt:
    """Give a function that opens a store of either face."""

    @asynccontextmanager
    async def open_one(endpoints: Any, **options: Any) -> AsyncIterator[AnyStore]:
        if face == "asyncio":
            async with AsyncEtcdRunStore.connect(endpoints, **options) as store:
                yield AnyStore(store, threads)
            return
        opened = await asyncio.to_thread(functools.partial(EtcdRunStore.connect, endpoints, **options))
        try:
            yield AnyStore(opened, threads)
        finally:
            await asyncio.to_thread(opened.close)

    return open_one


@pytest.fixture
async def store(open_at: OpenAt, etcd: EtcdServer, prefix: str) -> AsyncIterator[AnyStore]:
    async with open_at(etcd.endpoint, prefix=prefix) as opened:
        yield opened


@pytest.fixture
def own_etcd() -> Iterator[EmbeddedEtcd]:
    """Give a server that the test may stop."""
    with EmbeddedEtcd() as server:
        yield server


def readable(message: str) -> None:
    assert not [noise for noise in NOISE if noise in message], message
    assert len(message) < 400


async def fails_within(seconds: float, call: Awaitable[Any], *kinds: type[Exception]) -> Exception:
    """Await a call that must fail in time, and give its error."""
    begun = time.monotonic()
    with pytest.raises(kinds) as wrong:
        await call
    assert time.monotonic() - begun < seconds
    readable(str(wrong.value))
    return wrong.value


async def opened_and_closed(opening: AbstractAsyncContextManager[AnyStore]) -> None:
    async with opening:
        pass


@pytest.fixture
def keys(etcd: EtcdServer) -> Iterator[Any]:
    """Give a client that reads and writes any key, as etcdctl would but faster."""
    host, _, port = etcd.endpoint.rpartition(":")
    with closing(etcd3.client(host=host, port=int(port))) as client:
        yield client


def dump(keys: Any, prefix: str) -> dict[str, tuple[bytes, int, int]]:
    """Read everything under a prefix but the sessions: value, create revision and mod revision."""
    found = {
        meta.key.decode(): (value, meta.create_revision, meta.mod_revision) for value, meta in keys.get_prefix(prefix)
    }
    return {key: kv for key, kv in found.items() if not key.startswith(f"{prefix}/sessions/")}


def read(keys: Any, key: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(keys.get(key)[0])
    return value


# --- away or silent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", [True, False])
@pytest.mark.parametrize("members", [1, 3])
async def test_nobody_listens(open_at: OpenAt, members: int, session: bool) -> None:
    endpoints = [f"127.0.0.1:{port}" for port in free_ports(members)]
    opening = opened_and_closed(open_at(endpoints, timeout=10, session=session))
    error = await fails_within(AT_ONCE, opening, UnavailableError)
    assert "Connection refused; check the endpoints and that etcd is up" in str(error)


async def test_a_name_that_nobody_has(open_at: OpenAt) -> None:
    opening = opened_and_closed(open_at("etcd.invalid:2379", timeout=10))
    error = await fails_within(8, opening, UnavailableError)
    assert "its name can't be resolved" in str(error)


@pytest.mark.parametrize("session", [True, False])
async def test_opening_into_a_black_hole(open_at: OpenAt, etcd: EtcdServer, session: bool) -> None:
    with EtcdProxy(etcd.endpoint) as proxy:
        proxy.blackhole(True)
        opening = opened_and_closed(open_at(proxy.endpoint, timeout=1.5, session=session))
        await fails_within(1.5 + SLACK, opening, UnavailableError, DeadlineExceededError)


async def test_a_black_hole_in_the_middle_of_use(open_at: OpenAt, etcd: EtcdServer, prefix: str) -> None:
    with EtcdProxy(etcd.endpoint) as proxy:
        async with (
            open_at(proxy.endpoint, prefix=prefix, timeout=1.2) as store,
            open_at(etcd.endpoint, prefix=prefix) as other,
        ):
            kept = await store.claim_step("r", "kept")
            proxy.blackhole(True)
            calls = (
                store.try_claim_step("r", "a"),
                store.claim_step("r", "b"),
                store.get_step_statuses("r"),
                store.complete_step(kept, "Succeeded"),
            )
            await asyncio.gather(*(fails_within(1.2 + SLACK, call, *NO_ANSWER) for call in calls))
            proxy.blackhole(False)

            async def settled() -> bool:  # whatever arrived late was undone
                claimed: frozenset[str] = await other.get_claimed_step_keys("r")
                return claimed <= {"kept"}

            deadline = time.monotonic() + 10
            while not await settled():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            claim = await store.claim_step("r", "a")
            assert claim is not None
            assert await other.try_claim_step("r", "a") is False
            await store.complete_step(kept, "Succeeded")
            assert (await other.get_step_statuses("r"))["kept"] == "Succeeded"


async def test_dead_endpoints_among_others(open_at: OpenAt, etcd: EtcdServer, prefix: str) -> None:
    dead = [f"127.0.0.1:{port}" for port in free_ports(2)]
    for endpoints in ([dead[0], etcd.endpoint, dead[1]], [etcd.endpoint, *dead], [*dead, etcd.endpoint]):
        async with open_at(endpoints, prefix=prefix) as store:
            assert await store.try_claim_step("r", ",".join(endpoints))


async def test_a_server_that_stops_in_its_tracks(open_at: OpenAt, own_etcd: EmbeddedEtcd, prefix: str) -> None:
    async with open_at(own_etcd.endpoint, prefix=prefix, timeout=1.2, lease_ttl=30) as store:
        session = store.session
        claim = await store.claim_step("r", "held")
        assert claim is not None
        own_etcd.pause()
        try:
            write, claiming, reading = await asyncio.gather(
                fails_within(1.2 + SLACK, store.complete_step(claim, "Succeeded"), *NO_ANSWER),
                fails_within(1.2 + SLACK, store.try_claim_step("r", "a"), *NO_ANSWER),
                fails_within(1.2 + SLACK, store.get_step_statuses("r"), *NO_ANSWER),
            )
        finally:
            own_etcd.resume()
        assert isinstance(write, OutcomeUnknownError), "it was sent, and may be carried out"
        assert isinstance(claiming, OutcomeUnknownError)
        assert isinstance(reading, (DeadlineExceededError, UnavailableError)), "a read leaves no doubt behind"
        deadline = time.monotonic() + 10
        while await store.get_claim("r", "a") is not None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert await store.try_claim_step("r", "a")
        await store.complete_step(claim, "Succeeded")
        assert (await store.get_step_statuses("r"))["held"] == "Succeeded"
        assert not session.lost.is_set()


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_closing_while_etcd_is_gone(open_at: OpenAt, own_etcd: EmbeddedEtcd, how: str) -> None:
    async with open_at(own_etcd.endpoint, timeout=1) as store:
        assert await store.try_claim_step("r", "a")
        (own_etcd.kill if how == "killed" else own_etcd.pause)()
        begun = time.monotonic()
        await store.close()
        assert time.monotonic() - begun < 1 + SLACK
        with pytest.raises(StoreClosedError):
            await store.try_claim_step("r", "b")


# --- records -------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 1, 2, tzinfo=UTC).isoformat()
CLAIM = {"v": 1, "state": "held", "owner": "o", "session": "s", "attempt_id": "i", "claimed_at": NOW}
ROW = {"v": 1, "status": "Running", "type": "T", "attempt": 1, "write_id": "w"}
RUN = {
    "v": 1,
    "flow_id": "f",
    "flow_name": "F",
    "status": "Running",
    "trigger_key": "t",
    "started_at": NOW,
    "write_id": "w",
}
PAYLOAD = {"v": 1, "input": "1"}
SOUND = {
    "claims/a": CLAIM,
    "steps/a": {**ROW, "payload": True},
    "payloads/a/1": PAYLOAD,
    "run": RUN,
    "dispatches/a": {"v": 1, "recorded_at": NOW, "write_id": "w"},
}
"""A run with one step, as a sound etcd holds it."""


def spoilt(record: dict[str, Any], **fields: Any) -> list[str | bytes]:
    """Give values that can't be read in the place of a record; `fields` are wrong values for it."""
    wrong: list[str | bytes] = ["", "not JSON", "[1]", "null", "{}", b"\xff\xfe", json.dumps(record)[:-1]]
    wrong.append(json.dumps({**record, "v": 99}))
    wrong += [json.dumps({**record, name: value}) for name, value in fields.items()]
    return wrong


CORRUPT: dict[str, tuple[list[str | bytes], list[tuple[str, Any]]]] = {
    "claims/a": (
        spoilt(CLAIM, state="leased", owner=7, claimed_at="yesterday", attempt="1", status="Finished"),
        [
            ("try_claim_step", ("r", "a")),
            ("claim_step", ("r", "a")),
            ("claim_steps", ("r", ["a"])),
            ("get_claim", ("r", "a")),
            ("get_claims", ("r",)),
            ("get_claimed_step_keys", ("r",)),
            ("record_step_complete", ("r", "a", "Succeeded")),
            ("record_skipped_step", ("r", "a", "T", "why")),
        ],
    ),
    "steps/a": (
        spoilt(ROW, status="Finished", attempt="1", type=None, payload=1),
        [
            ("record_step_start", ("r", "a", "T")),
            ("record_step_complete", ("r", "a", "Succeeded")),
            ("record_skipped_step", ("r", "a", "T", "why")),
            ("get_run", ("r",)),
        ],
    ),
    "payloads/a/1": (
        spoilt(PAYLOAD, input=7),
        [("get_run", ("r",)), ("record_step_complete", ("r", "a", "Succeeded", "2"))],
    ),
    "run": (
        spoilt(RUN, status="Finished", flow_name=None, started_at=7),
        [
            ("get_run", ("r",)),
            ("get_run_status", ("r",)),
            ("get_runs", ()),
            ("complete_run", ("r", "Succeeded")),
            ("start_run", ("f", "F", "r", "t")),
        ],
    ),
    "dispatches/a": (spoilt(SOUND["dispatches/a"], job=7), [("annotate_dispatch", ("r", "a", "job"))]),
}


def put_run(keys: Any, prefix: str, **values: dict[str, Any]) -> None:
    for name, record in {**SOUND, **values}.items():
        keys.put(f"{prefix}/runs/r/{name}", json.dumps(record))


@pytest.mark.parametrize("where", list(CORRUPT))
async def test_records_that_nobody_can_read(store: AnyStore, keys: Any, prefix: str, where: str) -> None:
    put_run(keys, prefix)
    if where.startswith("steps"):
        keys.delete(f"{prefix}/runs/r/claims/a")
    key = f"{prefix}/runs/r/{where}"
    values, calls = CORRUPT[where]
    for value in values:
        keys.put(key, value)
        before = dump(keys, prefix)
        for name, args in calls:
            with pytest.raises(CorruptRecordError) as wrong:
                await getattr(store, name)(*args)
            assert (wrong.value.key, wrong.value.revision) == (key, before[key][2]), name
            assert f"the value of {key} at revision" in str(wrong.value)
            assert "mend or delete it" in str(wrong.value) or "use a newer one" in str(wrong.value)
            readable(str(wrong.value))
        assert dump(keys, prefix) == before
    # other runs are not harmed
    assert await store.claim_step("other", "a") is not None


async def test_a_row_that_nobody_can_read_is_not_claimed(store: AnyStore, keys: Any, prefix: str) -> None:
    key = f"{prefix}/runs/r/steps/a"
    for value in CORRUPT["steps/a"][0]:
        keys.put(key, value)
        before = dump(keys, prefix)
        with pytest.raises(CorruptRecordError) as wrong:
            await store.claim_step("r", "a")
        assert wrong.value.key == key
        assert dump(keys, prefix) == before
    for value in ("not JSON", json.dumps({**ROW, "status": "Finished"}), json.dumps({**ROW, "v": 99})):
        keys.put(key, value)
        with pytest.raises(CorruptRecordError):
            await store.get_step_statuses("r")


FUTURE = {"future": {"x": [1, "ä"]}, "more": None}


async def test_unknown_fields_survive(store: AnyStore, keys: Any, prefix: str) -> None:
    put_run(keys, prefix, **{name: {**record, **FUTURE} for name, record in SOUND.items()})
    base = f"{prefix}/runs/r"
    token = dump(keys, prefix)[f"{base}/claims/a"][1]
    assert await store.get_step_statuses("r") == {"a": "Running"}
    assert (await store.get_run("r")).steps[0].input_json == "1"
    await store.annotate_dispatch("r", "a", "job")
    await store.complete_step(StepClaim("r", "a", "o", token, 1, 0), "Succeeded", output_json="2")
    assert await store.complete_run("r", "Succeeded")
    lost = []
    for name, changed in {
        "claims/a": {"state": "sealed", "status": "Succeeded"},
        "steps/a": {"status": "Succeeded"},
        "run": {"status": "Succeeded"},
        "dispatches/a": {"job": "job"},
    }.items():
        record = read(keys, f"{base}/{name}")
        assert record.items() >= changed.items()
        lost += [name for field, value in FUTURE.items() if record.get(field, "missing") != value]
    assert not lost


async def test_an_earlier_attempt_keeps_unknown_fields(store: AnyStore, keys: Any, prefix: str) -> None:
    put_run(keys, prefix, **{"steps/a": {**ROW, **FUTURE}})
    assert await store.record_step_start("r", "a", "T") == 2
    assert read(keys, f"{prefix}/runs/r/attempts/a/1").items() >= FUTURE.items()


async def test_statuses_in_another_case_are_read(store: AnyStore, keys: Any, prefix: str) -> None:
    put_run(
        keys,
        prefix,
        **{
            "steps/a": {**ROW, "status": "sUCCEEDED"},
            "run": {**RUN, "status": "TIMEDOUT"},
            "claims/a": {**CLAIM, "state": "sealed", "status": "succeeded"},
        },
    )
    assert await store.get_step_statuses("r") == {"a": "Succeeded"}
    assert await store.get_run_status("r") == "TimedOut"
    assert (await store.get_run("r")).steps[0].status == "Succeeded"
    assert (await store.get_claim("r", "a")).status == "Succeeded"
    assert await store.try_claim_step("r", "a") is False


# --- no room -------------------------------------------------------------------------------------------------------


async def test_a_full_cluster(open_at: OpenAt, prefix: str) -> None:
    with EmbeddedEtcd(extra_args=["--quota-backend-bytes", str(2 * 1024 * 1024)]) as server:
        async with open_at(server.endpoint, prefix=prefix, timeout=10) as store:
            claim = await store.claim_step("r", "held")
            assert claim is not None

            async def fill() -> None:
                for number in range(400):  # etcd learns its size with a delay
                    await store.record_step_start("full", f"s{number}", "T", "x" * 200_000)

            full = await fails_within(10, fill(), ResourceExhaustedError)
            assert "database space exceeded; free space (compact, defragment, disarm the alarm)" in str(full)
            await asyncio.to_thread(eventually, lambda: "NOSPACE" in server.etcdctl("alarm", "list"))
            for call in (
                store.try_claim_step("r", "a"),
                store.claim_step("r", "a"),
                store.start_run("f", "F", "r", "t"),
                store.complete_step(claim, "Succeeded"),
            ):
                error = await fails_within(1.5, call, ResourceExhaustedError)
                assert isinstance(error, ResourceExhaustedError)
                assert error.definite is (call.__name__ != "start_run")  # of the others it was looked up
            assert await store.holds(claim), "it can still be read"
            await fails_within(
                AT_ONCE, opened_and_closed(open_at(server.endpoint, prefix=prefix)), ResourceExhaustedError
            )

            server.etcdctl("del", "--prefix", f"{prefix}/runs/full/")
            revision = json.loads(server.etcdctl("endpoint", "status", "-w=json"))[0]["Status"]["header"]["revision"]
            server.etcdctl("compact", str(revision))
            server.etcdctl("defrag")
            server.etcdctl("alarm", "disarm")
            assert await store.try_claim_step("r", "a")
            await store.complete_step(claim, "Succeeded")
            assert await store.get_step_statuses("r") == {"held": "Succeeded"}


async def test_a_request_far_over_etcds_limit(store: AnyStore, keys: Any, prefix: str) -> None:
    big = "\x01" * 250_000  # six bytes each as JSON
    claim = await store.claim_step("r", "a")
    before = dump(keys, prefix)
    for call in (
        store.claim_step("r", "b", input_json=big, job_id=big),
        store.record_step_start("r", "b", "T", big, big),
        store.complete_step(claim, "Failed", output_json=big, error=big),
        store.record_skipped_step("r", "b", "T", big, big),
        store.start_run("f", "F", "r", "t", big, big),
    ):
        error = await fails_within(AT_ONCE, call, RecordTooLargeError)
        assert "write less at once" in str(error)
    assert dump(keys, prefix) == before
    await store.complete_step(claim, "Succeeded")


async def test_a_request_just_over_etcds_limit(store: AnyStore, keys: Any, prefix: str) -> None:
    big = '"' * (256 * 1024)  # two bytes each as JSON: three of them are etcd's 1.5 MiB
    claim = await store.claim_step("r", "a", input_json=big)
    before = dump(keys, prefix)
    call = store.complete_step(claim, "Failed", output_json=big, error=big)
    error = await fails_within(AT_ONCE, call, RecordTooLargeError)
    assert "request is too large; write less at once" in str(error)
    assert dump(keys, prefix) == before
    await store.complete_step(claim, "Failed", error=big)
    assert await store.get_step_statuses("r") == {"a": "Failed"}


# --- used wrongly --------------------------------------------------------------------------------------------------

FORKS = {
    "threads": """
        store = EtcdRunStore.connect(endpoint, prefix=prefix, owner="parent", lease_ttl=3)
        def session(): return store.session
        run = run_in_child = lambda call: call()
    """,
    "asyncio": """
        loop = asyncio.new_event_loop()
        async def opened(): return await AsyncEtcdRunStore.connect(endpoint, prefix=prefix, owner="parent", lease_ttl=3)
        store = loop.run_until_complete(opened())
        async def session(): return store.session
        run = lambda call: loop.run_until_complete(call())
        run_in_child = lambda call: asyncio.run(call())
    """,
}
FORKED = """
    import asyncio, os, sys, time
    from stepclaim import AsyncEtcdRunStore, EtcdRunStore, StoreClosedError
    endpoint, prefix = sys.argv[1:]
    {opened}
    claim = run(lambda: store.claim_step("r", "a"))
    first = run(session)
    pid = os.fork()
    if pid == 0:
        for call in (
            session,
            lambda: store.try_claim_step("r", "b"),
            lambda: store.complete_step(claim, "Succeeded"),
            lambda: store.release_claim(claim),
        ):
            try:
                run_in_child(call)
            except StoreClosedError as error:
                print("child:", error, flush=True)
            else:
                print("child: no error", flush=True)
        run_in_child(store.close)
        del store
        sys.exit(0)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    print("exit:", ended[1] if ended[0] else "the child hangs", flush=True)
    for turn in (1, 2):  # 2.7 s can be trusted after a renewal, which comes after 1 s
        while first.expires_in() > 2.4 and time.monotonic() < deadline:
            time.sleep(0.02)
        while first.expires_in() < 2.5 and time.monotonic() < deadline:
            time.sleep(0.02)
    print("renewed:", first.expires_in() > 2.3, first.state, run(session) is first, flush=True)
    print("holds:", run(lambda: store.holds(claim)), flush=True)
    run(lambda: store.complete_step(claim, "Succeeded"))
    print("statuses:", run(lambda: store.get_step_statuses("r")), flush=True)
    print("goes on:", run(lambda: store.try_claim_step("r", "b")), flush=True)
    run(store.close)
"""


async def test_a_fork_leaves_the_parent_alone(face: str, etcd: EtcdServer, prefix: str) -> None:
    script = textwrap.dedent(FORKED).replace("{opened}", textwrap.dedent(FORKS[face]).strip())
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, etcd.endpoint, prefix],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("child:")]
    assert len(told) == 4, done
    for line in told:
        assert "by fork: connections and leases can't be shared; open a store of its own in the child" in line
    assert [line for line in lines if not line.startswith("child:")] == [
        "exit: 0",
        "renewed: True ACTIVE True",
        "holds: True",
        "statuses: {'a': <StepStatus.SUCCEEDED: 'Succeeded'>}",
        "goes on: True",
    ], done
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


async def test_two_event_loops(etcd: EtcdServer, prefix: str) -> None:
    async with AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as store:

        async def elsewhere() -> None:
            with pytest.raises(StoreClosedError, match="opened in another event loop: open one in this loop"):
                await store.try_claim_step("r", "a")
            async with AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix) as own:
                assert await own.try_claim_step("r", "b")

        await asyncio.to_thread(asyncio.run, elsewhere())
        assert await store.try_claim_step("r", "a")
        assert await store.try_claim_step("r", "b"), "the other store was closed, and its claims ended"


async def test_a_store_that_was_not_opened(etcd: EtcdServer) -> None:
    store = AsyncEtcdRunStore.connect(etcd.endpoint)
    with pytest.raises(StoreClosedError, match="use `async with` or `await`"):
        await store.try_claim_step("r", "a")


async def test_a_store_that_nobody_closes(face: str, etcd: EtcdServer, prefix: str) -> None:
    store: Any
    if face == "threads":
        store = EtcdRunStore.connect(etcd.endpoint, prefix=prefix)  # here: another thread might keep it a little longer
    else:
        store = await AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix)
    keeper, client = store._keeper, store._client
    with pytest.warns(ResourceWarning, match="was never closed: its session lives until its lease ends"):  # noqa: PT031
        del store
        gc.collect()
    keeper.close(time.monotonic() + 5)
    closing = client.close()
    if closing is not None:
        await closing


async def test_a_session_that_can_not_be_had_again(open_at: OpenAt, own_etcd: EmbeddedEtcd, prefix: str) -> None:
    async with open_at(own_etcd.endpoint, prefix=prefix, timeout=1.2, lease_ttl=1) as store:
        session = store.session
        own_etcd.pause()
        try:
            if isinstance(session.lost, asyncio.Event):
                await asyncio.wait_for(session.lost.wait(), 6)
            else:
                assert await asyncio.to_thread(session.lost.wait, 6)
            error = await fails_within(1.2 + SLACK, store.try_claim_step("r", "a"), SessionLostError)
            assert "try again once it answers" in str(error)
        finally:
            own_etcd.resume()
        assert await store.try_claim_step("r", "a")
        assert store.session is not session
