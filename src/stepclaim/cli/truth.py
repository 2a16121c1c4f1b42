"""What really happened, read from etcd: its revision history, the records and the claims; and what is wrong with it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from stepclaim._core.keys import last_segment
from stepclaim._core.ops import KeyValue, Program, Range, prefix_end, read_prefix
from stepclaim._core.records import StepRow, decode
from stepclaim._etcd import wire
from stepclaim._etcd.client import Client
from stepclaim.errors import StepClaimError
from stepclaim.models import ClaimState, RunStatus, StepStatus
from stepclaim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stepclaim._etcd.channel import Member
    from stepclaim.models import ClaimInfo, RunRecord, StepRecord
    from stepclaim.sync_store import EtcdRunStore

_LONGEST_READ = 60.0


@dataclass(frozen=True)
class Write:
    """One write to a step's row, as etcd's history has it; `status` is None where the row was removed."""

    run_id: str
    step_key: str
    revision: int
    status: StepStatus | None
    owner: str | None = None

    @property
    def is_commit(self) -> bool:
        """Whether it made the step final."""
        return self.status is not None and self.status.is_final


@dataclass(frozen=True)
class Truth:
    """All that etcd knows of some runs."""

    runs: Mapping[str, RunRecord | None]
    claims: Sequence[ClaimInfo]
    history: Sequence[Write]

    @property
    def commits(self) -> Counter[tuple[str, str]]:
        """How often each step's row was written with a final status."""
        return Counter((each.run_id, each.step_key) for each in self.history if each.is_commit)

    @property
    def attempts(self) -> int:
        """The attempts that were begun, in all steps that have bodies to run."""
        return sum(
            step.attempt_count
            for run in self.runs.values()
            for step in (run.steps if run else ())
            if step.status is not StepStatus.SKIPPED
        )


def revision(store: EtcdRunStore) -> int:
    """Tell the cluster's revision."""
    return store._run(_revision(store._ctx.keys.runs))  # noqa: SLF001 - a program of the demo's own


def _revision(key: bytes) -> Program[int]:
    page = yield from Range(key=key, range_end=prefix_end(key), limit=1, keys_only=True)
    return page.revision


def read(store: EtcdRunStore, settings: Settings, run_ids: Sequence[str], since: int) -> Truth:
    """Read what became of the runs, and every write to their steps' rows after revision `since`."""
    wanted = set(run_ids)
    history = [write for write in read_history(store, settings, since) if write.run_id in wanted]
    return Truth(
        {run_id: store.get_run(run_id) for run_id in run_ids},
        [claim for run_id in run_ids for claim in store.get_claims(run_id)],
        history,
    )


def read_history(store: EtcdRunStore, settings: Settings, since: int) -> list[Write]:
    """Have etcd tell every write to a step's row after revision `since`, by a watch that begins there.

    Raises `StepClaimError` if etcd has compacted a part of it.
    """
    keys = store._ctx.keys.runs  # noqa: SLF001
    standing = store._run(read_prefix(keys, keys_only=True))  # noqa: SLF001
    last = max((kv.mod_revision for kv in standing), default=0)
    if last <= since:
        return []
    client = Client(Settings.resolve(settings, {"attempt_timeout": _LONGEST_READ}))
    try:
        told = client.call(_watch(keys, since + 1, last), None, time.monotonic() + _LONGEST_READ)
    finally:
        client.close()
    writes = []
    for kv, removed in told:
        run, part, *_ = kv.key.removeprefix(keys).split(b"/")
        if part == b"steps":
            row = None if removed else decode(kv, StepRow)
            status, owner = (None, None) if row is None else (row.status, row.owner)
            writes.append(Write(last_segment(run), last_segment(kv.key), kv.mod_revision, status, owner))
    return writes


def _watch(prefix: bytes, first: int, last: int) -> Callable[[Member], Callable[..., list[tuple[KeyValue, bool]]]]:
    """Make the call that reads all events from one revision to another."""
    rpc: Any = wire.etcdrpc  # type: ignore[attr-defined]  # theirs to know

    def on(member: Member) -> Callable[..., list[tuple[KeyValue, bool]]]:
        def call(_: None, *, timeout: float, metadata: Any) -> list[tuple[KeyValue, bool]]:
            create = rpc.WatchCreateRequest(key=prefix, range_end=prefix_end(prefix), start_revision=first)
            request = rpc.WatchRequest(create_request=create)
            stream = member.watch.Watch(iter((request,)), timeout=timeout, metadata=metadata)
            told: list[tuple[KeyValue, bool]] = []
            try:
                for answer in stream:
                    if answer.canceled:
                        why = answer.cancel_reason or f"it keeps nothing before revision {answer.compact_revision}"
                        raise StepClaimError(f"etcd can't tell what happened since revision {first}: {why}")
                    for event in answer.events:
                        kv = event.kv
                        told.append(
                            (
                                KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision),
                                event.type == event.DELETE,
                            )
                        )
                    if told and told[-1][0].mod_revision >= last:
                        return told
            finally:
                stream.cancel()
            raise StepClaimError("etcd ended the watch before it had told everything")

        return call

    return on


def problems(expected: Mapping[str, StepStatus], run_status: RunStatus, truth: Truth) -> list[str]:
    """Compare what happened with what should have; each problem names its run and step, nothing wrong is []."""
    found: list[str] = []
    claims = {(claim.run_id, claim.step_key): claim for claim in truth.claims}
    history: dict[tuple[str, str], list[Write]] = defaultdict(list)
    for write in truth.history:
        history[write.run_id, write.step_key].append(write)
    for run_id, run in truth.runs.items():
        if run is None:
            found.append(f"run {run_id} is missing")
            continue
        if run.status is not run_status:
            found.append(f"run {run_id} is {run.status}, not {run_status}")
        steps = {step.step_key: step for step in run.steps}
        for key in sorted(expected.keys() | steps.keys()):
            where = f"step {key} of run {run_id}"
            if key not in steps:
                found.append(f"{where} is missing")
            elif key not in expected:
                found.append(f"{where} should not be there: it is {steps[key].status}")
            else:
                wrong = _step_problems(expected[key], steps[key], claims.get((run_id, key)), history[run_id, key])
                found += [f"{where} {what}" for what in wrong]
    return found


def _step_problems(
    expected: StepStatus, step: StepRecord, claim: ClaimInfo | None, history: Sequence[Write]
) -> Iterator[str]:
    """Tell what is wrong with one step."""
    if step.status is not expected:
        yield f"is {step.status}, not {expected}"
    commits = sum(write.is_commit for write in history)
    if commits != 1:
        yield f"was committed {commits} times" if commits else "was never committed"
    if any(write.status is None for write in history):
        yield "was removed in between"
    if history and history[-1].status is not step.status:
        yield f"is {step.status}, but its history ends with {history[-1].status}"
    tokens = [attempt.fencing_token or 0 for attempt in step.attempts]
    if any(later <= earlier for earlier, later in pairwise(tokens)):
        yield f"has attempts whose fencing tokens don't grow: {tokens}"
    if claim is None:
        yield f"is {step.status} without a sealed claim"
    elif claim.state is not ClaimState.SEALED or claim.status is not step.status:
        yield f"is {step.status}, but its claim is {claim.state} as {claim.status}"
    elif step.fencing_token != claim.fencing_token and step.status is not StepStatus.SKIPPED:
        yield f"has a result under token {step.fencing_token}, but {claim.fencing_token} is sealed"
