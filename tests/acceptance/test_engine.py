"""The engine's conformance cases I1 to I7, J1 to J3 and X1, on etcd and in memory."""

from __future__ import annotations

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from acceptance.crew import ABC, OK, SKIPPED, Message, alone, failing, read, reasons, statuses
from stepclaim import RunStatus, StepStatus
from stepclaim.cli.engine import Engine, Handled, Pending
from stepclaim.cli.flow import Flow
from stepclaim.errors import DeadlineExceededError
from stepclaim.events import StepDispatched
from stepclaim.models import PREREQUISITES_UNMET

if TYPE_CHECKING:
    from acceptance.crew import Hire, Open
    from stepclaim import StepClaim
    from stepclaim.run_store import RunStore

JOIN = Flow.from_json('{"name": "join", "steps": {"a": [], "b": ["a"], "c": ["a"], "join": ["b", "c"]}}')


def test_i1_ledger_refuses(open_one: Open) -> None:
    store = open_one()
    engine, sent = alone(store)
    store.try_record_dispatch("run", "a")
    engine.trigger("run")
    assert sent == []


def test_i2_claim_refused(open_one: Open) -> None:
    one, other = open_one(), open_one()
    ran: list[StepClaim] = []
    engine, _ = alone(one, body=ran.append)
    engine.trigger("run")
    assert other.try_claim_step("run", "a")
    assert engine.handle("run", "a") is Handled.REFUSED_HELD
    assert ran == []


@pytest.mark.parametrize("delay", [0.0, 30.0], ids=["I4", "I5"])
def test_i4_i5_pending_lets_go_before_it_is_scheduled_again_once(open_one: Open, delay: float) -> None:
    """When the message is sent nobody holds the step, and the ledger's entry is a new one."""
    store, other = open_one(), open_one()
    scheduled = []
    answers: list[str | Pending] = [Pending(delay, "not yet"), "{}"]

    def later(run_id: str, step_key: str, seconds: float) -> None:
        scheduled.append((step_key, seconds))
        assert other.get_claim(run_id, step_key) is None
        assert not other.try_record_dispatch(run_id, step_key)
        assert other.get_step_statuses(run_id) == {"a": StepStatus.PENDING}

    sent: list[str] = []
    engine = Engine(store, ABC, lambda _: answers.pop(0), lambda _, step: sent.append(step), later)
    engine.trigger("run")
    (first,) = [event.revision for event in _dispatches(store)]
    assert engine.handle("run", "a") is Handled.PARKED
    (second,) = [event.revision for event in _dispatches(store)]
    assert second > first
    engine.advance("run")
    assert engine.recover(grace=0.0) == []  # a parked step is never touched
    assert (scheduled, sent) == ([("a", delay)], ["a"])
    assert engine.handle("run", "a") is Handled.RAN
    assert (scheduled, sent) == ([("a", delay)], ["a", "b"])
    run = store.get_run("run")
    assert run is not None
    assert [(each.attempt, each.status) for each in run.steps[0].attempts] == [(1, StepStatus.PENDING), (2, OK)]


def _dispatches(store: RunStore) -> list[StepDispatched]:
    return [event for event in store.watch_run("run", timeout=0.3) if isinstance(event, StepDispatched)]


def test_i7_after_a_failure_that_did_not_come(hire: Hire) -> None:
    crew = hire(Flow.from_json('{"name": "i7", "steps": {"step1": [], "step2": {"after": {"step1": ["Failed"]}}}}'))
    crew.engine.trigger("run")
    crew.settle()
    run = read(crew, "run")
    assert run.status is RunStatus.SKIPPED
    assert statuses(run) == {"step1": OK, "step2": SKIPPED}
    assert reasons(run) == {"step2": PREREQUISITES_UNMET}


@pytest.mark.parametrize(
    ("mends", "outcome"), [(0, RunStatus.SUCCEEDED), (1, RunStatus.FAILED)], ids=["handled", "not handled"]
)
def test_a_failure_is_handled_when_a_dependant_that_accepts_it_succeeded(
    hire: Hire, mends: int, outcome: RunStatus
) -> None:
    flow = Flow.from_json('{"name": "mend", "steps": {"a": [], "mend": {"after": {"a": ["Failed"]}}, "b": ["a"]}}')
    crew = hire(flow, failing({"a": 1, "mend": mends}))
    crew.engine.trigger("run")
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)["b"]) == (outcome, SKIPPED)


def test_j1_one_run_for_one_idempotency_key(hire: Hire) -> None:
    crew = hire(ABC)
    first = crew.engines[0].trigger(trigger_key="manual", idempotency_key="order-1")
    second = crew.engines[1].trigger(trigger_key="Manual", idempotency_key=" ORDER-1 ")
    assert first.run_id == second.run_id
    crew.settle()
    assert crew.engines[2].trigger(idempotency_key="order-1").status is RunStatus.SUCCEEDED
    crew.settle()
    assert [run.run_id for run in crew.engine.store.get_runs()] == [first.run_id]
    assert crew.steps_sent(first.run_id) == crew.steps_ran(first.run_id) == ["a", "b", "c"]


def test_j1_at_once(hire: Hire) -> None:
    crew = hire(ABC, workers=4)
    gate = threading.Barrier(4)

    def trigger(engine: Engine) -> str:
        gate.wait()
        return engine.trigger(idempotency_key="order-2").run_id

    with ThreadPoolExecutor(4) as pool:
        (run_id,) = set(pool.map(trigger, crew.engines))
    crew.settle()
    assert crew.sent == [Message(run_id, key) for key in "abc"]


def test_j2_cancelled_before_the_step_runs(open_one: Open) -> None:
    store = open_one()
    ran: list[StepClaim] = []
    engine, _ = alone(store, body=ran.append)
    engine.trigger("run")
    assert store.get_run_control("run") is None
    assert store.request_cancel("run", "enough")
    assert engine.handle("run", "a") is Handled.STOPPED
    run = store.get_run("run")
    assert run is not None
    assert (ran, run.status) == ([], RunStatus.CANCELLED)
    assert reasons(run) == dict.fromkeys("abc", "Run is Cancelled.")
    assert [step.attempt_count for step in run.steps] == [1, 1, 1]
    assert engine.handle("run", "a") is Handled.STOPPED
    assert store.get_run("run") == run


@pytest.mark.parametrize("how", ["marked", "time is over"])
def test_j3_timed_out_before_the_step_runs(open_one: Open, how: str) -> None:
    store = open_one()
    ran: list[StepClaim] = []
    engine, _ = alone(store, body=ran.append)
    engine.trigger("run")
    if how == "marked":
        assert store.mark_timed_out("run")
    else:
        store.configure_run("run", ABC.name, "manual", timeout_at=dt.datetime.now(dt.UTC))
    assert engine.handle("run", "a") is Handled.STOPPED
    run = store.get_run("run")
    assert run is not None
    assert (ran, run.status) == ([], RunStatus.TIMED_OUT)
    assert reasons(run) == dict.fromkeys("abc", "Run is TimedOut.")


def test_a_time_out_after_the_end_changes_nothing(open_one: Open) -> None:
    store = open_one()
    engine, sent = alone(store)
    engine.trigger("run")
    while sent:
        engine.handle("run", sent.pop(0))
    store.configure_run("run", ABC.name, "manual", timeout_at=dt.datetime.now(dt.UTC))
    before = store.get_run("run")
    assert engine.handle("run", "a") is Handled.REFUSED_FINAL
    assert store.get_run("run") == before
    control = store.get_run_control("run")
    assert control is not None
    assert control.timed_out_at is None


def test_cancelled_while_bodies_run(hire: Hire) -> None:
    """They may end, and their results count; nothing else begins, and the last to end completes the run."""
    inside, go_on = threading.Semaphore(0), threading.Event()

    def body(claim: StepClaim) -> None:
        if claim.step_key != "a":
            inside.release()
            assert go_on.wait(20)

    crew = hire(JOIN, body)
    crew.engine.trigger("run")
    inside.acquire()
    inside.acquire()
    assert crew.engine.cancel("run", "enough")
    assert not crew.engine.cancel("run", "again")
    assert read(crew, "run").status is RunStatus.RUNNING
    go_on.set()
    crew.settle()
    run = read(crew, "run")
    assert run.status is RunStatus.CANCELLED
    assert statuses(run) == {"a": OK, "b": OK, "c": OK, "join": SKIPPED}
    assert reasons(run) == {"join": "Run is Cancelled."}


def test_x1_fifty_times(hire: Hire) -> None:
    crew = hire(ABC)
    run_ids = [crew.engines[n % 3].trigger(f"run-{n}").run_id for n in range(50)]
    crew.settle()
    for run_id in run_ids:
        run = read(crew, run_id)
        assert (run.status, statuses(run)) == (RunStatus.SUCCEEDED, dict.fromkeys("abc", OK))
        assert [step.attempt_count for step in run.steps] == [1, 1, 1]
        assert crew.steps_ran(run_id) == crew.steps_sent(run_id) == ["a", "b", "c"]
    assert crew.engine.store.get_active_runs() == []


def test_two_that_finish_at_once_leave_no_gap(hire: Hire) -> None:
    """Neither of the last two before a join sees the other one's end before its own; the join runs all the same."""
    gate = threading.Barrier(2)

    def body(claim: StepClaim) -> None:
        if claim.step_key in ("b", "c"):
            gate.wait(20)

    crew = hire(JOIN, body)
    for n in range(25):
        crew.engine.trigger(f"run-{n}")
        crew.settle()
        assert read(crew, f"run-{n}").status is RunStatus.SUCCEEDED
        assert sorted(crew.steps_sent(f"run-{n}")) == sorted(crew.steps_ran(f"run-{n}")) == ["a", "b", "c", "join"]


def test_a_step_that_could_not_be_completed_is_free_again(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker lives on, and so does its session: the claim must not live on with them."""
    store = open_one()
    engine, sent = alone(store)
    engine.trigger("run")
    with monkeypatch.context() as patched:
        patched.setattr(store, "complete_step", _too_late)
        with pytest.raises(DeadlineExceededError):
            engine.handle("run", "a")
    claim = store.wait_for_step("run", "a", timeout=10)
    store.release_claim(claim)
    assert engine.handle("run", "a") is Handled.RAN
    assert sent == ["a", "b"]


def _too_late(*_: object, **__: object) -> None:
    raise DeadlineExceededError("too late", code="DEADLINE_EXCEEDED", definite=True)
