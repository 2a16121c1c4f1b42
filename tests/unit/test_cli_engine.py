"""The engine on a real store: what duplicates, failures and losses come to. `acceptance` has the conformance cases."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stepclaim import ConfigurationError, EtcdRunStore, RunStatus, StepStatus
from stepclaim.cli.engine import Body, Engine, Handled, Pending
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servers import EtcdServer
    from stepclaim import StepClaim

CHAIN = Flow.from_json('{"name": "chain", "steps": {"a": [], "b": ["a"], "c": ["b"], "d": ["c"]}}')


class Case:
    """An engine, the messages that it sent, and the steps whose bodies ran."""

    def __init__(self, store: EtcdRunStore, flow: Flow, body: Body | None = None) -> None:
        self.store = store
        self.sent: list[str] = []
        self.ran: list[str] = []
        self._body = body
        self.engine = Engine(store, flow, self._run, lambda _, step: self.sent.append(step))

    def _run(self, claim: StepClaim) -> str | Pending | None:
        self.ran.append(claim.step_key)
        return None if self._body is None else self._body(claim)

    def drain(self, copies: int = 1) -> list[Handled]:
        """Deliver every message, and those that come of it."""
        handled = []
        seen = 0
        while seen < len(self.sent):
            handled += [self.engine.handle("run", self.sent[seen]) for _ in range(copies)]
            seen += 1
        return handled


@pytest.fixture
def open_store(etcd: EtcdServer, prefix: str) -> Iterator[Callable[[], EtcdRunStore]]:
    opened: list[EtcdRunStore] = []

    def connect() -> EtcdRunStore:
        opened.append(EtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=10))
        return opened[-1]

    yield connect
    for store in opened:
        store.close()


def test_a_run_with_every_message_delivered_twice(open_store: Callable[[], EtcdRunStore]) -> None:
    """Bodies run once; a duplicate of a final step tells its followers again, which changes nothing."""
    case = Case(open_store(), Flow.default())
    case.engine.trigger("run")
    assert case.drain(copies=2).count(Handled.REFUSED_FINAL) == 10
    assert sorted(case.ran) == sorted(Flow.default().steps)
    assert sorted(case.sent) == sorted(Flow.default().steps)
    assert case.store.get_run_status("run") == RunStatus.SUCCEEDED
    assert not case.store.get_active_runs()


def test_trigger_again_changes_nothing(open_store: Callable[[], EtcdRunStore]) -> None:
    case = Case(open_store(), CHAIN)
    first = case.engine.trigger("run")
    assert case.engine.trigger("run") == first
    case.drain()
    assert case.engine.trigger("run").status is RunStatus.SUCCEEDED
    assert case.sent == ["a", "b", "c", "d"]


def test_a_duplicate_goes_on_where_the_first_worker_died(open_store: Callable[[], EtcdRunStore]) -> None:
    case = Case(open_store(), CHAIN)
    case.engine.trigger("run")
    dead = open_store()
    claim = dead.claim_step("run", "a")
    assert claim
    dead.complete_step(claim, StepStatus.SUCCEEDED)
    assert case.engine.handle("run", "a") is Handled.REFUSED_FINAL
    assert case.sent == ["a", "b"]


def test_a_failing_body_fails_its_step_with_the_traceback(open_store: Callable[[], EtcdRunStore]) -> None:
    """What comes after it is skipped; what comes after that has no record."""

    def body(claim: StepClaim) -> str:
        return str(json.loads("{")) if claim.step_key == "b" else "{}"

    case = Case(open_store(), CHAIN, body)
    case.engine.trigger("run")
    assert case.drain(copies=2).count(Handled.RAN) == 2
    run = case.store.get_run("run")
    assert run
    assert run.status is RunStatus.FAILED
    assert {step.step_key: step.status for step in run.steps} == {
        "a": StepStatus.SUCCEEDED,
        "b": StepStatus.FAILED,
        "c": StepStatus.SKIPPED,
    }
    assert "JSONDecodeError" in (run.steps[1].error or "")


def test_an_output_over_the_limit_fails_the_step(open_store: Callable[[], EtcdRunStore]) -> None:
    case = Case(open_store(), Flow.from_json('{"steps": {"a": []}}'), lambda _: "x" * 300_000)
    case.engine.trigger("run")
    assert case.drain() == [Handled.RAN]
    assert case.store.get_run_status("run") == RunStatus.FAILED


def test_a_lost_claim_is_a_result(open_store: Callable[[], EtcdRunStore]) -> None:
    store, other = open_store(), open_store()

    def body(claim: StepClaim) -> None:
        other.release_step_claim(claim.run_id, claim.step_key)
        assert other.claim_step(claim.run_id, claim.step_key)

    case = Case(store, CHAIN, body)
    case.engine.trigger("run")
    assert case.engine.handle("run", "a") is Handled.LOST
    assert case.sent == ["a"]
    assert store.get_step_statuses("run") == {"a": StepStatus.RUNNING}


def test_a_step_of_another_flow_is_refused(open_store: Callable[[], EtcdRunStore]) -> None:
    with pytest.raises(ConfigurationError, match="no step 'z'"):
        Case(open_store(), CHAIN).engine.handle("run", "z")
