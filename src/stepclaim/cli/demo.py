"""The demo: many workers, every message twice, one worker killed and one stopped; then what etcd says of it all."""

from __future__ import annotations

import http.client
import re
import time
import uuid
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from stepclaim.cli import truth
from stepclaim.cli.engine import Handled
from stepclaim.cli.fleet import Fleet, Tell, Victim
from stepclaim.errors import ConfigurationError
from stepclaim.models import RunStatus, StepStatus
from stepclaim.settings import Settings
from stepclaim.sync_store import EtcdRunStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim.cli.flow import Flow
    from stepclaim.models import RunRecord

ENOUGH_FOR_DRILLS = 3
"""Workers: one killed, one stopped, and one that takes over."""


@dataclass(frozen=True)
class Plan:
    """What the demo is to do."""

    flow: Flow
    settings: Settings
    """The workers': endpoints, prefix, lease TTL."""
    workers: int = 8
    runs: int = 20
    step_seconds: float = 0.02
    drills: bool = True

    def __post_init__(self) -> None:
        """Refuse what can't be shown."""
        if self.runs < 1:
            raise ConfigurationError("--runs: at least one run is needed")
        if self.step_seconds < 0:
            raise ConfigurationError("--step-seconds: must not be below 0")
        needed = ENOUGH_FOR_DRILLS if self.drills else 1
        if self.workers < needed:
            hint = "; with --no-kill one is enough" if self.drills else ""
            raise ConfigurationError(f"--workers: at least {needed} are needed{hint}")
        if self.drills and self.settings.lease_ttl is None:
            raise ConfigurationError(
                "--lease-ttl: nobody takes over from a killed worker without one; or use --no-kill"
            )

    def on(self, endpoint: str) -> Plan:
        """Give the same plan for another cluster."""
        given = self.settings.model_dump(include=self.settings.model_fields_set)
        return replace(self, settings=Settings(**given | {"endpoints": endpoint}))


@dataclass(frozen=True)
class Takeover:
    """A step that was begun again because its holder was gone, as etcd's records show it."""

    run_id: str
    step_key: str
    from_owner: str | None
    from_token: int | None
    to_owner: str | None
    to_token: int | None
    seconds: float | None
    """From the kill or stop to the end of the step, where it was this demo's."""
    after: str
    """kill, stop, or lease where a claim ended by itself."""


@dataclass
class Report:
    """What happened. All of it from etcd but for `delivered` and `bodies`, which the workers told."""

    endpoints: list[str]
    prefix: str
    flow: str
    workers: int
    run_statuses: dict[str, int]
    runs: list[dict[str, Any]]
    steps_expected: int
    steps_committed: int
    attempts: int
    bodies: int
    delivered: dict[str, int]
    duplicates_refused: int
    stale_results_refused: int
    victims: list[Victim]
    takeovers: list[Takeover]
    rpcs_per_step: float
    rpcs: dict[str, int]
    rpcs_counted_by: str
    elapsed_seconds: float
    lease_ttl: float | None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every run ended as it should, with each result committed once."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Give plain values, for `--json`."""
        values = asdict(self)
        for victim in values["victims"]:
            del victim["at"]
        return {"ok": self.ok, **values}


def run(plan: Plan, tell: Tell, progress: Callable[[Fleet], None] = lambda _: None) -> Report:
    """Run the demo against the cluster that the settings name. `progress` is called often, with the fleet at work."""
    run_ids = [str(uuid.uuid4()) for _ in range(plan.runs)]
    expected = plan.flow.expected()
    drills = ("kill", "stop") if plan.drills else ()
    with EtcdRunStore.connect(plan.settings, session=False) as store:
        since = truth.revision(store)
        with Fleet(plan.settings, plan.flow, plan.workers, step_seconds=plan.step_seconds, tell=tell) as fleet:
            tell(f"{plan.workers} workers are ready; {plan.runs} runs of flow {plan.flow.name!r} begin")
            before = server_rpcs(plan.settings)
            began = time.monotonic()
            fleet.run(store, run_ids, drills=drills, progress=progress)
            elapsed = time.monotonic() - began
            after = server_rpcs(plan.settings)
        found = truth.read(store, plan.settings, run_ids, since)
    report = _report(plan, fleet, found, elapsed)
    _count_rpcs(report, fleet, before, after)
    report.problems = truth.problems(expected, RunStatus.SUCCEEDED, found)
    for how in drills[len(fleet.victims) :]:
        report.notes.append(f"no worker could be {'killed' if how == 'kill' else 'stopped'}: too few steps")
    return report


def _report(plan: Plan, fleet: Fleet, found: truth.Truth, elapsed: float) -> Report:
    counts = fleet.broker.counts
    records = [run for run in found.runs.values() if run is not None]
    statuses = [str(run.status) if run else "missing" for run in found.runs.values()]
    refused = {name: counts[f"first: {name}"] for name in (Handled.REFUSED_FINAL, Handled.REFUSED_HELD)}
    return Report(
        endpoints=list(plan.settings.endpoints),
        prefix=plan.settings.prefix,
        flow=plan.flow.name,
        workers=plan.workers,
        run_statuses={status: statuses.count(status) for status in sorted(set(statuses))},
        runs=[
            {
                "run_id": run.run_id,
                "status": run.status,
                "steps": {step.step_key: step.status for step in run.steps},
                "attempts": sum(step.attempt_count for step in run.steps),
            }
            for run in records
        ],
        steps_expected=plan.runs * len(plan.flow.expected()),
        steps_committed=sum(times for times in found.commits.values()),
        attempts=found.attempts,
        bodies=counts["bodies"],
        delivered={
            "messages": counts["messages"],
            "deliveries": counts["deliveries"],
            "duplicates_refused_final": refused[Handled.REFUSED_FINAL],
            "duplicates_refused_held": refused[Handled.REFUSED_HELD],
            "asked_again_in_vain": counts[f"again: {Handled.REFUSED_HELD}"] + counts[f"again: {Handled.REFUSED_FINAL}"],
            "errors": counts["first: error"] + counts["again: error"],
        },
        duplicates_refused=sum(refused.values()),
        stale_results_refused=counts[f"first: {Handled.LOST}"] + counts[f"again: {Handled.LOST}"],
        victims=fleet.victims,
        takeovers=_takeovers(records, fleet.victims),
        rpcs_per_step=0.0,
        rpcs={},
        rpcs_counted_by="",
        elapsed_seconds=round(elapsed, 2),
        lease_ttl=plan.settings.lease_ttl,
    )


def _takeovers(runs: list[RunRecord], victims: list[Victim]) -> list[Takeover]:
    """Find the steps that were begun again although the attempt before had not ended."""
    known = {(victim.run_id, victim.step_key, victim.token): victim for victim in victims}
    found = []
    for run_id, step in ((run.run_id, step) for run in runs for step in run.steps):
        for earlier, later in pairwise(step.attempts):
            if earlier.status is not StepStatus.RUNNING:
                continue  # it was put off, to be done again
            token = earlier.fencing_token
            victim = known.get((run_id, step.step_key, token or 0))
            after, seconds = (victim.how, victim.taken_over_after) if victim else ("lease", None)
            found.append(
                Takeover(run_id, step.step_key, earlier.owner, token, later.owner, later.fencing_token, seconds, after)
            )
    return found


def server_rpcs(settings: Settings) -> dict[str, int] | None:
    """Ask etcd how many key-value calls it has served, by method; None where it doesn't show that to us."""
    if settings.uses_tls or len(settings.endpoints) > 1:  # of several members each counts its own alone
        return None
    try:
        with closing(http.client.HTTPConnection(settings.endpoints[0], timeout=2)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    found: dict[str, int] = {}
    for labels, count in re.findall(r"^grpc_server_handled_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        if 'grpc_service="etcdserverpb.KV"' in labels and (method := re.search(r'grpc_method="(\w+)"', labels)):
            found[method[1]] = found.get(method[1], 0) + int(float(count))
    return found or None


def _count_rpcs(report: Report, fleet: Fleet, before: dict[str, int] | None, after: dict[str, int] | None) -> None:
    if before is not None and after is not None:
        report.rpcs = {method: after[method] - before.get(method, 0) for method in sorted(after)}
        report.rpcs = {method: count for method, count in report.rpcs.items() if count}
        report.rpcs_counted_by = "etcd"
    else:
        report.rpcs = {"all": fleet.broker.counts["rpcs"]}
        report.rpcs_counted_by = "workers"
    report.rpcs_per_step = round(sum(report.rpcs.values()) / report.steps_expected, 1)
