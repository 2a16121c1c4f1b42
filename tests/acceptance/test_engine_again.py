"""The engine's conformance cases of retry, recovery and When clauses: K1 to K3, V3 to V6, X3, X4; on both stores."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from acceptance.crew import ABC, FAILED, OK, SKIPPED, alone, failing, read, statuses
from stepclaim import RunStatus
from stepclaim.cli.flow import Flow
from stepclaim.models import FindingKind

if TYPE_CHECKING:
    from acceptance.crew import Hire, Open
    from stepclaim.cli.engine import Engine

ABCD = Flow.from_json('{"name": "abcd", "steps": {"a": [], "b": ["a"], "c": ["b"], "d": ["c"]}}')
EXPRESSION = "@triggerBody().amount > 1000"
WITH_Z = Flow.from_json(
    json.dumps(
        {"name": "z", "steps": {"a": [], "b": ["a"], "c": ["b"], "z": {"after": ["a"], "when": EXPRESSION}}},
    )
)


def test_k1_retry_runs_what_was_skipped_because_of_it(hire: Hire) -> None:
    crew = hire(ABC, failing({"b": 1}))
    crew.engine.trigger("run")
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)) == (RunStatus.FAILED, {"a": OK, "b": FAILED, "c": SKIPPED})
    assert crew.steps_sent("run") == ["a", "b"]
    crew.engine.retry("run", "b")
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)) == (RunStatus.SUCCEEDED, dict.fromkeys("abc", OK))
    assert crew.steps_sent("run") == ["a", "b", "b", "c"]
    assert crew.steps_ran("run") == ["a", "b", "b", "c"]
    assert [(each.attempt, each.status) for each in run.steps[2].attempts] == [(1, SKIPPED), (2, OK)]
    assert crew.engine.store.get_active_runs() == []


def test_k2_retry_where_a_step_behind_the_skipped_one_has_no_row(hire: Hire) -> None:
    crew = hire(ABCD, failing({"b": 1}))
    crew.engine.trigger("run")
    crew.settle()
    assert statuses(read(crew, "run")) == {"a": OK, "b": FAILED, "c": SKIPPED}
    crew.engine.retry("run", "b")
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)) == (RunStatus.SUCCEEDED, dict.fromkeys("abcd", OK))


def test_k3_retry_leaves_what_its_when_clause_skipped(hire: Hire) -> None:
    crew = hire(WITH_Z, failing({"b": 1}))
    crew.engine.trigger("run", "manual", '{"amount": 500}')
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)) == (RunStatus.FAILED, {"a": OK, "b": FAILED, "c": SKIPPED, "z": SKIPPED})
    z = run.steps[3]
    assert z.error == "When clause '@triggerBody().amount > 1000' evaluated to false (500 > 1000)."
    assert z.evaluation_trace_json == (
        '{"expression": "@triggerBody().amount > 1000", "resolved": "500 > 1000", "result": false}'
    )
    crew.engine.retry("run", "b")
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)) == (RunStatus.SUCCEEDED, {"a": OK, "b": OK, "c": OK, "z": SKIPPED})
    assert run.steps[3] == z


def test_a_when_clause_that_holds_runs_its_step(hire: Hire) -> None:
    crew = hire(WITH_Z)
    crew.engine.trigger("run", "manual", '{"amount": 1001}')
    crew.settle()
    assert statuses(read(crew, "run")) == dict.fromkeys("abcz", OK)
    assert sorted(crew.steps_sent("run")) == ["a", "b", "c", "z"]


@pytest.mark.parametrize("order", ["before the reset", "after the reset"])
def test_a_retry_whose_caller_died_goes_on(hire: Hire, order: str) -> None:
    """Recovery finds the step that waits; whoever runs it again sees to what was skipped because of it."""
    crew = hire(ABCD, failing({"b": 1}))
    crew.engine.trigger("run")
    crew.settle()
    store = crew.engine.store
    store.retry_step("run", "b")
    if order == "after the reset":
        store.reset_cascade_skipped_dependents("run", ["c", "d"])
    (finding,) = crew.engine.recover(grace=0.0)
    assert (finding.kind, finding.step_key, finding.mended) == (FindingKind.ORPHANED_STEP, "b", True)
    crew.settle()
    run = read(crew, "run")
    assert (run.status, statuses(run)) == (RunStatus.SUCCEEDED, dict.fromkeys("abcd", OK))


@pytest.mark.parametrize("in_ledger", [False, True], ids=["V3", "V4"])
def test_v3_v4_recovery_of_a_ready_step(open_one: Open, *, in_ledger: bool) -> None:
    store = open_one()
    engine, sent = alone(store)
    store.start_run(ABC.name, ABC.name, "run", "manual")
    claim = store.claim_step("run", "a")
    assert claim is not None
    store.complete_step(claim, OK, dispatch=["b"] if in_ledger else [])
    found = engine.recover()
    assert [(each.kind, each.step_key) for each in found] == (
        [] if in_ledger else [(FindingKind.UNDISPATCHED_STEP, "b")]
    )
    assert sent == ([] if in_ledger else ["b"])
    assert store.get_dispatched_step_keys("run") == {"b"}


def test_v6_two_recoveries_at_once(open_one: Open) -> None:
    pairs = [alone(open_one()) for _ in range(2)]
    store = pairs[0][0].store
    for n in range(10):
        store.start_run(ABC.name, ABC.name, f"run-{n}", "manual")
        claim = store.claim_step(f"run-{n}", "a")
        assert claim is not None
        store.complete_step(claim, OK)
    gate = threading.Barrier(2)

    def recover(engine: Engine) -> int:
        gate.wait()
        return sum(finding.mended for finding in engine.recover())

    with ThreadPoolExecutor(2) as pool:
        mended = list(pool.map(recover, [engine for engine, _ in pairs]))
    assert sum(len(sent) for _, sent in pairs) == 10
    assert sum(mended) <= 10


def test_recovery_follows_clauses_and_cancellation(open_one: Open) -> None:
    """A ready step whose clause is false is skipped and not dispatched; a cancelled run is brought to its end."""
    store = open_one()
    engine, sent = alone(store, WITH_Z)
    for run in ("run", "cancelled"):
        store.start_run(WITH_Z.name, WITH_Z.name, run, "manual", '{"amount": 7}')
        claim = store.claim_step(run, "a")
        assert claim is not None
        store.complete_step(claim, OK, dispatch=["b"])
    store.request_cancel("cancelled")
    assert engine.recover() == []
    assert store.get_step_statuses("run") == {"a": OK, "z": SKIPPED}
    assert store.get_run_status("cancelled") == "Cancelled"
    assert sent == []


def test_x3_a_flaky_step_is_retried(hire: Hire) -> None:
    crew = hire(Flow.from_json('{"name": "x3", "steps": {"flaky": []}}'), failing({"flaky": 1}))
    crew.engine.trigger("run")
    crew.settle()
    assert read(crew, "run").status is RunStatus.FAILED
    crew.engine.retry("run", "flaky")
    crew.settle()
    run = read(crew, "run")
    assert (run.status, run.steps[0].status, run.steps[0].attempt_count) == (RunStatus.SUCCEEDED, OK, 2)
    assert [each.status for each in run.steps[0].attempts] == [FAILED, OK]


def test_x4_fails_three_times_and_is_retried_three_times(hire: Hire) -> None:
    crew = hire(Flow.from_json('{"name": "x4", "steps": {"flaky": []}}'), failing({"flaky": 3}))
    crew.engine.trigger("run")
    crew.settle()
    assert read(crew, "run").status is RunStatus.FAILED
    outcomes = []
    for _ in range(3):
        crew.engine.retry("run", "flaky")
        crew.settle()
        outcomes.append(read(crew, "run").status)
    assert outcomes == [RunStatus.FAILED, RunStatus.FAILED, RunStatus.SUCCEEDED]
    assert len(crew.ran) == 4
    assert [each.attempt for each in read(crew, "run").steps[0].attempts] == [1, 2, 3, 4]
