"""The judge: a history with a double commit, a missing step or a wrong seal doesn't get past it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stepclaim import EtcdRunStore, RunStatus, Settings, StepClaimError, StepStatus
from stepclaim.cli import truth
from stepclaim.cli.engine import Engine
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from servers import EtcdServer

FLOW = Flow.from_json('{"steps": {"a": [], "b": ["a"], "never": {"after": {"a": ["Failed"]}}}}')


class Seen:
    """A run that went well, and what etcd says of it."""

    def __init__(self, etcd: EtcdServer, prefix: str) -> None:
        self.settings = Settings(endpoints=etcd.endpoint, prefix=prefix, lease_ttl=10)
        with EtcdRunStore.connect(self.settings) as store:
            self.since = truth.revision(store)
            queue = []
            engine = Engine(store, FLOW, lambda _: None, lambda _, step: queue.append(step))
            engine.trigger("run")
            while queue:
                engine.handle("run", queue.pop())
        self.truth = self.read()

    def read(self) -> truth.Truth:
        with EtcdRunStore.connect(self.settings, session=False) as store:
            return truth.read(store, self.settings, ["run"], self.since)


@pytest.fixture
def seen(etcd: EtcdServer, prefix: str) -> Seen:
    return Seen(etcd, prefix)


def _wrong(found: truth.Truth) -> list[str]:
    return truth.problems(FLOW.expected(), RunStatus.SUCCEEDED, found)


def test_a_good_run_has_no_problems(seen: Seen) -> None:
    assert _wrong(seen.truth) == []
    assert seen.truth.commits == {("run", "a"): 1, ("run", "b"): 1, ("run", "never"): 1}
    assert seen.truth.attempts == 2
    written = [(write.step_key, write.status) for write in seen.truth.history]
    assert written[:2] == [("a", StepStatus.RUNNING), ("a", StepStatus.SUCCEEDED)]


def test_a_second_commit_is_found_in_etcds_own_history(seen: Seen, etcd: EtcdServer, prefix: str) -> None:
    """Written over with the same value by hand: nothing but the history shows it."""
    key = f"{prefix}/runs/run/steps/a"
    etcd.etcdctl("put", key, etcd.etcdctl("get", "--print-value-only", key).strip())
    assert _wrong(seen.read()) == ["step a of run run was committed 2 times"]


def test_a_missing_step(seen: Seen, etcd: EtcdServer, prefix: str) -> None:
    etcd.etcdctl("del", f"{prefix}/runs/run/steps/b")
    assert _wrong(seen.read()) == ["step b of run run is missing"]


def test_a_step_that_was_removed_and_done_again(seen: Seen, etcd: EtcdServer, prefix: str) -> None:
    key = f"{prefix}/runs/run/steps/b"
    value = etcd.etcdctl("get", "--print-value-only", key).strip()
    etcd.etcdctl("del", key)
    etcd.etcdctl("put", key, value)
    assert _wrong(seen.read()) == [
        "step b of run run was committed 2 times",
        "step b of run run was removed in between",
    ]


def test_a_claim_that_does_not_fit(seen: Seen, etcd: EtcdServer, prefix: str) -> None:
    key = f"{prefix}/runs/run/claims/a"
    value = json.loads(etcd.etcdctl("get", "--print-value-only", key))
    etcd.etcdctl("put", key, json.dumps(value | {"status": "Failed"}))
    assert _wrong(seen.read()) == ["step a of run run is Succeeded, but its claim is sealed as Failed"]
    etcd.etcdctl("del", key)
    assert _wrong(seen.read()) == ["step a of run run is Succeeded without a sealed claim"]


def test_runs_that_are_missing_or_not_over(seen: Seen) -> None:
    run = seen.truth.runs["run"]
    assert run
    assert _wrong(replace(seen.truth, runs={"run": None})) == ["run run is missing"]
    failed = replace(seen.truth, runs={"run": replace(run, status=RunStatus.FAILED)})
    assert _wrong(failed) == ["run run is Failed, not Succeeded"]


def test_steps_that_should_not_be_there_or_are_otherwise(seen: Seen) -> None:
    expected = {"a": StepStatus.FAILED, "b": StepStatus.SUCCEEDED}
    assert truth.problems(expected, RunStatus.SUCCEEDED, seen.truth) == [
        "step a of run run is Succeeded, not Failed",
        "step never of run run should not be there: it is Skipped",
    ]


def test_never_committed_and_tokens_that_do_not_grow(seen: Seen) -> None:
    assert "step a of run run was never committed" in _wrong(replace(seen.truth, history=[]))
    run = seen.truth.runs["run"]
    assert run
    step = replace(run.steps[0], attempts=run.steps[0].attempts * 2)
    twice = replace(seen.truth, runs={"run": replace(run, steps=(step, *run.steps[1:]))})
    assert any("tokens don't grow" in problem for problem in _wrong(twice))


def test_a_compacted_history_is_told(seen: Seen, etcd: EtcdServer, prefix: str) -> None:
    """The answer is then an error, never a clean bill."""
    revision = json.loads(etcd.etcdctl("get", "-w", "json", f"{prefix}/runs/run/run"))["header"]["revision"]
    etcd.etcdctl("compact", str(revision))
    with pytest.raises(StepClaimError, match="can't tell what happened"):
        seen.read()
