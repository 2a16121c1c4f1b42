"""Random sequences of all calls, from two stores, on etcd and in memory side by side: answers, errors and keys agree.

Ids and times are made alike on both sides: a call's time is its number. What can't be alike (revisions, leases, the
sessions' names) must correspond one to one, revisions in the same order. After each call all keys are compared as they
stand, at the end of a sequence also what every read and every watch tells of them.

STEPCLAIM_HYPOTHESIS=soak looks for longer, with other sequences each time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import uuid
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from stepclaim import (
    AsyncEtcdRunStore,
    ClaimLostError,
    ClaimTimeoutError,
    EtcdRunStore,
    RunStatus,
    StepClaim,
    StepStatus,
)
from stepclaim._core.ops import KeyValue, read_snapshot
from stepclaim.models import PREREQUISITES_UNMET
from stepclaim.recovery import recover, recover_async
from stepclaim.testing import AsyncInMemoryRunStore, InMemoryBackend, InMemoryRunStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servers import EtcdServer

SOAK = os.environ.get("STEPCLAIM_HYPOTHESIS") == "soak"
EXAMPLES = {"threads": 80, "asyncio": 40}
MOST_PARTS = 25

settings.register_profile(
    "side-by-side",
    deadline=None,
    database=None,
    derandomize=not SOAK,
    print_blob=SOAK,
    phases=(Phase.generate, Phase.shrink),  # explaining a failure takes as long again, and the calls say enough
    suppress_health_check=list(HealthCheck),
)

RUN = "3f2b8c1e-0000-4000-8000-00000000abcd"
RUNS = (RUN, "order/7")
RUN_NAMES = (RUN, RUN.upper(), uuid.UUID(RUN), RUN, RUN, "order/7")
STEPS = ("a", "a/b", "loop.1.c", "loop.10.c")
OWNERS = ("one", "two")
FLOWS = ("flow", "other flow")
BEGINNING = datetime(2024, 2, 29, 12, tzinfo=UTC)


# --- what is called ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """One call to one of the two stores, or to what stands above them."""

    store: int
    name: str
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.keywords.items())]
        return f"{OWNERS[self.store]}.{self.name}({', '.join(given)})"


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A claim that was won before; 0 is the latest one."""

    back: int


@dataclasses.dataclass(frozen=True)
class Ago:
    """The time of the call so many calls before: what happened then is not strictly before it."""

    calls: int


RUN_ID = st.sampled_from(RUN_NAMES)
STEP = st.sampled_from((*STEPS, "a", "a", "a", "a"))  # deep rather than wide
SEVERAL = st.lists(STEP, max_size=4)
MAYBE_JSON = st.sampled_from((None, None, '{"n": 1}', '"ä\\n"'))
REASON = st.sampled_from((None, "why", PREREQUISITES_UNMET, PREREQUISITES_UNMET))
STEP_STATUS = st.sampled_from((*StepStatus, "Succeeded", "failed"))
FINAL = st.sampled_from(("Succeeded", "Succeeded", "Failed", "Skipped", "Pending"))
RUN_STATUS = st.sampled_from((*RunStatus, "cancelled"))
TRIGGER = st.sampled_from(("manual", " Manual\n", "webhook"))
KEY = st.sampled_from(("request-1", " REQUEST-1", "request/2"))
CLAIM = st.sampled_from((0, 0, 0, 0, 1, 2, 3)).map(Earlier)
TIME = st.integers(0, 40).map(lambda seconds: BEGINNING + timedelta(seconds=seconds))
BODY = st.sampled_from(("ends", "output", "fails", "raises", "defers", "dispatches", "released", "retried"))


def _call(name: str, *args: st.SearchStrategy[Any], **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[Call]:
    return st.builds(
        Call, st.integers(0, 1), st.just(name), st.tuples(*args), st.fixed_dictionaries({}, optional=keywords)
    )


STARTING = {"step_type": st.just("mail"), "input_json": MAYBE_JSON, "job_id": st.sampled_from((None, "job-1"))}
FINISHING = st.builds(
    lambda store, claim, dispatch: Call(store, "complete_step", (claim, "Succeeded"), {"dispatch": dispatch}),
    *(st.integers(0, 1), CLAIM, st.lists(STEP, min_size=1, max_size=4)),
)
SKIPPING = _call("record_skipped_step", RUN_ID, STEP, st.just("mail"), st.just(PREREQUISITES_UNMET))
WORKING = st.one_of(
    _call("claim_step", RUN_ID, STEP, **STARTING),
    _call("claim_step", RUN_ID, STEP, **STARTING),
    _call("try_claim_step", RUN_ID, STEP),
    _call("claim_steps", RUN_ID, SEVERAL),
    _call("wait_for_step", RUN_ID, STEP, **STARTING),
    _call("release_step_claim", RUN_ID, STEP),
    _call("release_claim", CLAIM),
    _call("holds", CLAIM),
    _call("complete_step", CLAIM, FINAL, output_json=MAYBE_JSON, error=REASON, dispatch=SEVERAL),
    FINISHING,
    FINISHING,
    _call("complete_step", CLAIM, FINAL, output_json=MAYBE_JSON),
    _call("defer_step", CLAIM, reason=REASON, dispatch=st.booleans()),
    _call("step", RUN_ID, STEP, BODY),
    _call("record_step_start", RUN_ID, STEP, st.just("mail"), MAYBE_JSON),
    _call("record_step_complete", RUN_ID, STEP, STEP_STATUS, MAYBE_JSON, REASON),
    _call("record_step_complete", RUN_ID, STEP, STEP_STATUS, MAYBE_JSON),
    _call("record_skipped_step", RUN_ID, STEP, st.just("mail"), REASON),
    _call("record_skipped_step_with_trace", RUN_ID, STEP, st.just("mail"), REASON, MAYBE_JSON),
    _call("retry_step", RUN_ID, STEP),
    SKIPPING,
    _call("reset_cascade_skipped_dependents", RUN_ID, st.just(STEPS)),
    _call("reset_cascade_skipped_dependents", RUN_ID, SEVERAL),
    _call("try_record_dispatch", RUN_ID, STEP),
    _call("try_record_dispatch", RUN_ID, STEP),
    _call("annotate_dispatch", RUN_ID, STEP, st.sampled_from(("job-1", "job-2"))),
    _call("release_dispatch", RUN_ID, STEP),
)
FLOW = st.sampled_from(FLOWS)
STEERING = st.one_of(
    _call("start_run", FLOW, st.just("Flow"), RUN_ID, TRIGGER, MAYBE_JSON),
    _call(
        "start_run",
        *(FLOW, st.just("Flow"), RUN_ID, TRIGGER, MAYBE_JSON, st.just("job-9")),
        idempotency_key=KEY,
        source_run_id=RUN_ID,
    ),
    _call("complete_run", RUN_ID, RUN_STATUS),
    _call("configure_run", RUN_ID, FLOW, TRIGGER, KEY, TIME),
    _call("request_cancel", RUN_ID, REASON),
    _call("mark_timed_out", RUN_ID, REASON),
    _call("try_register_idempotency_key", FLOW, TRIGGER, KEY, RUN_ID),
    _call("find_run_by_idempotency_key", FLOW, TRIGGER, KEY),
    _call("recover", mend=st.booleans(), grace=st.sampled_from((0.0, 5.0))),
)
ENDING = st.one_of(
    _call("delete_run", RUN_ID),
    _call("purge_runs", st.one_of(st.integers(1, 5).map(Ago), TIME), limit=st.sampled_from((None, 1))),
    _call("reopen"),
)
READS = {
    "of a step": ("get_claim",),
    "of a run": (
        *("get_run", "get_run_status", "get_step_statuses", "get_claims", "get_claimed_step_keys"),
        *("get_dispatched_step_keys", "get_run_control", "orphaned_steps"),
    ),
    "of all": ("get_runs", "get_active_runs", "get_claims"),
}
READING = st.one_of(
    _call("get_claim", RUN_ID, STEP),
    *(_call(name, RUN_ID) for name in READS["of a run"]),
    *(_call(name) for name in READS["of all"]),
)
CALL = st.sampled_from((*[WORKING] * 12, *[STEERING] * 5, ENDING, READING)).flatmap(lambda calls: calls)


@st.composite
def stories(draw: st.DrawFn) -> list[Call]:
    """Draw calls that belong together, which chance alone seldom brings together; from either store each."""
    run_id, step, other, flow, trigger = draw(RUN_ID), draw(STEP), draw(STEP), draw(FLOW), draw(TRIGGER)
    skip = ("record_skipped_step", run_id, step, "mail", PREREQUISITES_UNMET)
    reset = ("reset_cascade_skipped_dependents", run_id, [step, other])
    claim, retry = ("claim_step", run_id, step), ("retry_step", run_id, step)
    story: list[tuple[Any, ...]] = draw(
        st.sampled_from(
            (
                [skip, reset, claim],
                [claim, retry, claim, retry, skip, reset, claim],
                [claim, ("try_record_dispatch", run_id, other), ("complete_step", Earlier(0), "Failed", [step, other])],
                [claim, ("release_step_claim", run_id, step), claim, ("complete_step", Earlier(1), "Succeeded")],
                [claim, ("release_step_claim", run_id, step), ("complete_step", Earlier(0), "Failed")],
                [claim, ("release_step_claim", run_id, step), ("defer_step", Earlier(0))],
                [
                    ("start_run", flow, "Flow", run_id, trigger),
                    ("complete_run", run_id, "Failed"),
                    ("purge_runs", Ago(1)),
                ],
                [
                    ("try_register_idempotency_key", flow, trigger, draw(KEY), run_id),
                    ("find_run_by_idempotency_key", flow, draw(TRIGGER), draw(KEY)),
                ],
            )
        )
    )
    return [_told(draw(st.integers(0, 1)), *call) for call in story]


def _told(store: int, name: str, *args: Any) -> Call:
    if name == "complete_step" and len(args) > 2:
        return Call(store, name, args[:2], {"dispatch": args[2]})
    return Call(store, name, args)


@st.composite
def sequences(draw: st.DrawFn) -> list[Call]:
    """Draw calls; each may be left out, so that a failing sequence shrinks to those that matter."""
    one = CALL.map(lambda call: [call])
    parts = [draw(st.one_of(one, one, one, stories())) for _ in range(MOST_PARTS) if draw(st.integers(0, 3))]
    return [call for part in parts for call in part]


# --- the two sides -----------------------------------------------------------------------------------------------


class Side:
    """Two stores on the same keys, with the faces for threads."""

    def __init__(self, connect: Callable[..., Any], prefix: str, ttls: tuple[float | None, float | None]) -> None:
        self._connect = connect
        self._prefix = prefix
        self._ttls = ttls
        self.begin(0)
        self.stores = [self._opened(0), self._opened(1)]
        self.claims: list[StepClaim] = []
        self.first_revision = self.keys()[1]

    def _opened(self, n: int) -> Any:
        store = self._open(owner=OWNERS[n], prefix=self._prefix, lease_ttl=self._ttls[n])
        store._ctx.now = lambda: self.now
        store._ctx.new_id = lambda: f"{self._number}.{next(self._ids)}"
        return store

    def begin(self, number: int) -> None:
        """Let the time and the ids be those of the call with this number."""
        self._number = number
        self._ids = count(1)
        self.now = BEGINNING + timedelta(seconds=number)

    def _open(self, **options: Any) -> Any:
        return self._connect(**options)

    def _do(self, store: Any, name: str, *args: Any, **keywords: Any) -> Any:
        return getattr(store, name)(*args, **keywords)

    def keys(self) -> tuple[list[KeyValue], int]:
        """Read all keys but the sessions', and the revision."""
        kvs, revision = self._do(self.stores[0], "_run", read_snapshot(f"{self._prefix}/".encode()))
        return [kv for kv in kvs if not kv.key.startswith(f"{self._prefix}/sessions/".encode())], revision

    def perform(self, call: Call) -> Any:
        """Do a call, and give its answer or its error."""
        args: list[Any] = list(map(self._resolved, call.args))
        store, other = self.stores[call.store], self.stores[1 - call.store]
        try:
            if call.name == "reopen":
                self._do(store, "close")
                self.stores[call.store] = self._opened(call.store)
                return None
            if call.name == "step":
                return self._step(store, other, *args)
            if call.name == "recover":
                return self._recover(store, **call.keywords)
            answer = self._do(store, call.name, *args, **call.keywords)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must be the same on both sides
            return error
        if isinstance(answer, StepClaim):
            self.claims.append(answer)
        elif call.name == "claim_steps":
            self.claims += answer.values()
        return answer

    def _resolved(self, arg: Any) -> Any:
        if isinstance(arg, Earlier):
            return self.claims[-1 - arg.back]
        return self.now - timedelta(seconds=arg.calls) if isinstance(arg, Ago) else arg

    def _step(self, store: Any, other: Any, run_id: Any, step_key: str, body: str) -> StepClaim | None:
        with store.step(run_id, step_key, step_type="mail", input_json="1") as active:
            if active is None:
                return None
            self.claims.append(active.claim)
            if body == "released":
                other.release_step_claim(run_id, step_key)
            elif body == "retried":
                other.retry_step(run_id, step_key)
                self.claims.append(other.claim_step(run_id, step_key))
            _in_body(active, body)
            claim: StepClaim = active.claim
            return claim

    def _recover(self, store: Any, **keywords: Any) -> Any:
        return recover(store, **keywords)

    def _watching(self, run_id: str, most: int | None, *, whole: bool) -> Any:
        after = self.first_revision if whole else None
        return self.stores[1].watch_run(run_id, after_revision=after, timeout=0.005 if most is None else 10)

    def watch(self, run_id: str, most: int | None, *, whole: bool) -> list[Any]:
        """Give so many of a run's events, or those that there are; its whole history, or what stands."""
        return list(islice(self._watching(run_id, most, whole=whole), most))

    def close(self) -> None:
        """Close both stores."""
        for store in self.stores:
            self._do(store, "close")


class AsyncSide(Side):
    """Two stores on the same keys, with the faces for asyncio."""

    def __init__(
        self,
        connect: Callable[..., Any],
        prefix: str,
        ttls: tuple[float | None, float | None],
        *,
        run: Callable[[Any], Any],
    ) -> None:
        self._until_done = run
        super().__init__(connect, prefix, ttls)

    def _open(self, **options: Any) -> Any:
        async def opened() -> Any:
            return await self._connect(**options).__aenter__()

        return self._until_done(opened())

    def _do(self, store: Any, name: str, *args: Any, **keywords: Any) -> Any:
        async def done() -> Any:
            return await getattr(store, name)(*args, **keywords)

        return self._until_done(done())

    def _step(self, store: Any, other: Any, run_id: Any, step_key: str, body: str) -> StepClaim | None:
        async def step() -> StepClaim | None:
            async with store.step(run_id, step_key, step_type="mail", input_json="1") as active:
                if active is None:
                    return None
                self.claims.append(active.claim)
                if body == "released":
                    await other.release_step_claim(run_id, step_key)
                elif body == "retried":
                    # in a task of its own: the loss of the claim cancels the body
                    again = asyncio.create_task(_again(other, run_id, step_key))
                    try:
                        await asyncio.shield(again)
                    finally:
                        self.claims.append(await again)
                _in_body(active, body)
                claim: StepClaim = active.claim
                return claim

        try:
            claim: StepClaim | None = self._until_done(step())
        except ClaimLostError as error:
            # the watch tells of it, or the body's end: who comes first differs, and with it the text
            raise ClaimLostError("lost in the body", error.claim) from error
        return claim

    def _recover(self, store: Any, **keywords: Any) -> Any:
        return self._until_done(recover_async(store, **keywords))

    def watch(self, run_id: str, most: int | None, *, whole: bool) -> list[Any]:
        async def told() -> list[Any]:
            events: list[Any] = []
            watching = self._watching(run_id, most, whole=whole)
            async for event in watching:
                events.append(event)
                if len(events) == most:
                    break
            await watching.aclose()
            return events

        events: list[Any] = self._until_done(told())
        return events


async def _again(other: Any, run_id: Any, step_key: str) -> Any:
    await other.retry_step(run_id, step_key)
    return await other.claim_step(run_id, step_key)


def _in_body(active: Any, body: str) -> None:
    if body == "output":
        active.output_json = '{"sent": true}'
    elif body == "fails":
        active.fail("said so")
    elif body == "raises":
        raise RuntimeError("the body's own")
    elif body in ("defers", "dispatches"):
        active.defer("later", dispatch=body == "dispatches")


# --- what agrees -------------------------------------------------------------------------------------------------


class Correspondence:
    """Which revision, lease and session of one side is which of the other: one to one, revisions in their order."""

    def __init__(self) -> None:
        self._revisions: list[tuple[int, int]] = []
        self._names: dict[tuple[str, Any], Any] = {}

    def revision(self, left: int | None, right: int | None) -> bool:
        """Tell whether two revisions can be the same one."""
        if not left or not right:
            return left == right
        at = bisect_left(self._revisions, (left, 0))
        here = self._revisions[at : at + 1]
        if here and here[0][0] == left:
            return here[0][1] == right
        self._revisions.insert(at, (left, right))
        around = [pair[1] for pair in self._revisions[max(at - 1, 0) : at + 2]]
        return around == sorted(set(around))

    def name(self, kind: str, left: Any, right: Any) -> bool:
        """Tell whether two names can be of the same lease or session."""
        if not left or not right:
            return bool(left == right)
        forth = self._names.setdefault((f"{kind} >", left), right)
        back = self._names.setdefault((f"{kind} <", right), left)
        return bool(forth == right and back == left)

    def agree(self, left: Any, right: Any, what: str) -> None:
        """Fail, saying where, unless both are the same value."""
        last = what.rpartition(".")[2]
        agreed = True
        if last in ("fencing_token", "token", "revision", "orphan", "create_revision", "mod_revision"):
            agreed = self.revision(left, right)
        elif last in ("lease", "lease_id", "session"):
            agreed = self.name(last.removesuffix("_id"), left, right)
        elif type(left) is not type(right):
            agreed = False
        elif isinstance(left, KeyValue):
            assert left.key == right.key, f"{what}: {left.key!r} is not {right.key!r}"
            for name in ("create_revision", "mod_revision", "lease"):
                self.agree(getattr(left, name), getattr(right, name), f"{left.key.decode()}.{name}")
            self.agree(json.loads(left.value), json.loads(right.value), left.key.decode())
        elif isinstance(left, Exception):
            self.agree(str(left), str(right), f"{what}, the text of {type(left).__name__}")
            self.agree(getattr(left, "claim", None), getattr(right, "claim", None), f"{what}'s claim")
        elif dataclasses.is_dataclass(left) and not isinstance(left, type):
            for each in dataclasses.fields(left):
                if each.name == "resume":  # the event's revision or the one before
                    agreed = distance(left) == distance(right)
                    continue
                self.agree(getattr(left, each.name), getattr(right, each.name), f"{what}.{each.name}")
        elif isinstance(left, Mapping):
            assert list(left) == list(right), f"{what}: {list(left)} is not {list(right)}"
            for key, value in left.items():
                self.agree(value, right[key], f"{what}.{key}")
        elif isinstance(left, Sequence) and not isinstance(left, str):
            if len(left) != len(right):
                raise AssertionError(f"{what}: {left!r} is not {right!r}")
            for n, (one, other) in enumerate(zip(left, right, strict=True)):
                self.agree(one, other, f"{what}[{n}]")
        elif isinstance(left, str):
            texts, others = (re.split(r"(?<=token )(\d+)", text) for text in (left, right))
            agreed = texts[::2] == others[::2] and all(
                map(self.revision, *(map(int, each[1::2]) for each in (texts, others)))
            )
        else:
            agreed = left == right
        assert agreed, f"{what}: {left!r} in memory, {right!r} on etcd"


def distance(event: Any) -> int:
    """Tell how far before an event's own revision one goes on behind it."""
    behind: int = event.revision - event.resume
    return behind


def look_at_all(memory: Side, etcd: Side, same: Correspondence, *, history: bool) -> None:
    """Ask the second store of each side all that can be asked."""
    reads = [Call(1, name) for name in READS["of all"]]
    reads += [Call(1, name, (run_id,)) for run_id in RUNS for name in READS["of a run"]]
    reads += [Call(1, "get_claim", (run_id, step)) for run_id in RUNS for step in STEPS]
    reads += [Call(1, "holds", (Earlier(back),)) for back in range(len(memory.claims))]
    for read in reads:
        same.agree(memory.perform(read), etcd.perform(read), repr(read))
    for run_id in RUNS:
        for whole in {False, history}:
            events = memory.watch(run_id, None, whole=whole)
            if events:
                same.agree(events, etcd.watch(run_id, len(events), whole=whole), f"the events of {run_id}")


def run_both(memory: Side, etcd: Side, calls: list[Call], *, history: bool) -> None:
    """Do the same on both sides, and compare."""
    same = Correspondence()
    for number, call in enumerate(calls, 1):
        if any(isinstance(arg, Earlier) and arg.back >= len(memory.claims) for arg in call.args):
            continue
        memory.begin(number)
        etcd.begin(number)
        note(f"{number}: {call!r}")
        if call.name == "wait_for_step":
            answer, other = wait_on_both(memory, etcd, call)
        else:
            answer, other = memory.perform(call), etcd.perform(call)
        note(f"   {answer!r}")
        same.agree(answer, other, f"{number}: {call!r}")
        (kvs, _), (others, _) = memory.keys(), etcd.keys()
        names, other_names = [kv.key for kv in kvs], [kv.key for kv in others]
        assert names == other_names, f"{number}: {call!r} left other keys: {set(names) ^ set(other_names)}"
        same.agree(kvs, others, f"{number}: {call!r} left keys")
    removes = any(call.name in ("delete_run", "purge_runs") for call in calls)
    look_at_all(memory, etcd, same, history=history or removes)


def wait_on_both(memory: Side, etcd: Side, call: Call) -> tuple[Any, Any]:
    """Wait in memory; on etcd, where waiting takes long, only for what can be had: the other is refused at once."""
    answer = memory.perform(dataclasses.replace(call, keywords=call.keywords | {"timeout": 0.005}))
    if isinstance(answer, ClaimTimeoutError):
        return None, etcd.perform(dataclasses.replace(call, name="claim_step"))
    return answer, etcd.perform(dataclasses.replace(call, keywords=call.keywords | {"timeout": 10}))


@pytest.fixture(scope="module")
def until_done() -> Iterator[Callable[[Any], Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


HISTORY = st.sampled_from((False, False, True))  # etcd lets a watch of the past wait for up to 0.1 s
TTLS = st.sampled_from(((30.0, 30.0), (30.0, None), (None, None)))


@pytest.mark.timeout(3600 if SOAK else 180)
@pytest.mark.parametrize("face", EXAMPLES)
def test_etcd_and_memory_agree(face: str, etcd: EtcdServer, until_done: Callable[[Any], Any]) -> None:
    out_of_time: list[BaseException] = []
    examples = int(os.environ.get("STEPCLAIM_EXAMPLES", "2000")) if SOAK else EXAMPLES[face]

    @settings(settings.get_profile("side-by-side"), max_examples=examples)
    @given(sequences(), TTLS, HISTORY)
    def agree(calls: list[Call], ttls: tuple[float | None, float | None], history: bool) -> None:
        prefix = f"/t-{uuid.uuid4().hex[:16]}"
        backend = InMemoryBackend()

        def side(connect: Callable[..., Any]) -> Side:
            return (
                Side(connect, prefix, ttls) if face == "threads" else AsyncSide(connect, prefix, ttls, run=until_done)
            )

        def in_memory(**options: Any) -> Any:
            return (InMemoryRunStore if face == "threads" else AsyncInMemoryRunStore)(backend, **options)

        def on_etcd(**options: Any) -> Any:
            return (EtcdRunStore if face == "threads" else AsyncEtcdRunStore).connect(etcd.endpoint, **options)

        if out_of_time:
            raise out_of_time[0]
        with ExitStack() as stack:
            memory = side(in_memory)
            stack.callback(memory.close)
            other = side(on_etcd)
            stack.callback(other.close)
            try:
                run_both(memory, other, calls, history=history)
            except pytest.fail.Exception as late:  # the time-out's only shot: a sequence that hangs is not tried again
                out_of_time.append(late)
                raise

    agree()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"token": 5}, {"token": 6}),
        ({"owner": "one"}, {"owner": "two"}),
        ([1], [1, 2]),
        ({"x": 1}, {"x": True}),
        ("token 3 and token 4", "token 7 and token 7"),
        (ValueError("a"), TypeError("a")),
        ([{"session": "a"}, {"session": "a"}], [{"session": "x"}, {"session": "y"}]),
        ([{"session": "a"}, {"session": "b"}], [{"session": "x"}, {"session": "x"}]),
        ([{"token": 4}, {"token": 3}], [{"token": 7}, {"token": 8}]),
    ],
)
def test_what_differs_does_not_agree(left: Any, right: Any) -> None:
    same = Correspondence()
    same.agree([{"token": 5}, {"token": None}], [{"token": 9}, {"token": None}], "first")
    with pytest.raises(AssertionError):
        same.agree(left, right, "second")
