"""F1: `a`, then `b0` to `b7`, then `join`; 50 runs; 16 worker processes; every message delivered twice."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from stepclaim import EtcdRunStore, RunStatus, Settings
from stepclaim.cli import truth
from stepclaim.cli.fleet import Fleet
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from servers import EtcdServer

RUNS, WORKERS = 50, 16


def test_f1(etcd: EtcdServer, prefix: str) -> None:
    """All 50 succeed, every result is committed once by etcd's own history, and every body ran exactly once."""
    flow = Flow.default()
    # long enough that no session ends while 16 interpreters start on few cores
    settings = Settings(endpoints=etcd.endpoint, prefix=prefix, lease_ttl=60)
    run_ids = [str(uuid.uuid4()) for _ in range(RUNS)]
    with EtcdRunStore.connect(settings, session=False) as store:
        since = truth.revision(store)
        with Fleet(settings, flow, WORKERS, step_seconds=0.005) as fleet:
            fleet.run(store, run_ids)
        found = truth.read(store, settings, run_ids, since)
        assert not {run.run_id for run in store.get_active_runs()} & set(run_ids)

    assert truth.problems(flow.expected(), RunStatus.SUCCEEDED, found) == []
    steps = RUNS * len(flow.steps)
    assert len(found.commits) == sum(found.commits.values()) == steps
    counts = fleet.broker.counts
    assert (counts["messages"], counts["bodies"], found.attempts) == (steps, steps, steps)
    assert counts["first: refused, final"] + counts["first: refused, held"] == steps
    assert not fleet.errors
    workers = {step.owner for run in found.runs.values() if run for step in run.steps}
    assert len(workers) == WORKERS, "not every worker had a part in it"
