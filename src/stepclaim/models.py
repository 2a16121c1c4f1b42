"""The values that the stores take and give: statuses, claims, and the records of runs and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from datetime import datetime


PREREQUISITES_UNMET = "Prerequisite status did not satisfy runAfter conditions."
"""The reason of a skip that a retry of what came before undoes."""


class _CaselessEnum(StrEnum):
    """Statuses are read without regard to case; an unknown one is an error, never a guess."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if isinstance(value, str):
            folded = value.casefold()
            for member in cls:
                if member.value.casefold() == folded:
                    return member
        return None


class StepStatus(_CaselessEnum):
    """Where a step stands."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SKIPPED = "Skipped"

    @property
    def is_final(self) -> bool:
        """Whether the step is over: Succeeded, Failed or Skipped."""
        return self not in (StepStatus.PENDING, StepStatus.RUNNING)


class RunStatus(_CaselessEnum):
    """Where a run stands."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SKIPPED = "Skipped"
    CANCELLED = "Cancelled"
    TIMED_OUT = "TimedOut"

    @property
    def is_final(self) -> bool:
        """Whether the run is over: everything but Running."""
        return self is not RunStatus.RUNNING


class ClaimState(StrEnum):
    """A claim is held while somebody works, and sealed for good once the step is final."""

    HELD = "held"
    SEALED = "sealed"


class SessionState(StrEnum):
    """What a store knows of its own session."""

    ACTIVE = "ACTIVE"
    UNCERTAIN = "UNCERTAIN"
    LOST = "LOST"


@dataclass(frozen=True, slots=True)
class StepClaim:
    """The right to run one step once. A value: it can be pickled, logged and handed to another process."""

    run_id: str
    step_key: str
    owner: str
    fencing_token: int
    """The create revision of the claim's key: grows each time the same step is claimed again."""
    attempt: int
    """The attempt's number, from 1; 0 while the step was claimed but not started."""
    lease_id: int
    """The lease that the claim ends with; 0 in at-most-once mode."""
    prefix: str = field(default="/stepclaim", repr=False)
    """What the keys of the claim's store begin with."""

    def guard(self) -> Any:
        """Give the etcd compare that holds while, and only while, this claim is held.

        For a transaction of your own with an `etcd3` client: `client.transaction(compare=[claim.guard()], ...)`; for
        one with `etcd3.etcdrpc`'s messages: `claim.guard().build_message()`.
        """
        from stepclaim._etcd.wire import guard  # noqa: PLC0415 - values must not need gRPC until they are asked for it

        return guard(self)


@dataclass(frozen=True, slots=True)
class ClaimInfo:
    """Who holds a step, as etcd has it."""

    run_id: str
    step_key: str
    state: ClaimState
    owner: str
    session: str
    fencing_token: int
    attempt: int
    lease_id: int
    claimed_at: datetime
    status: StepStatus | None = None
    sealed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt at a step."""

    attempt: int
    step_key: str
    step_type: str
    status: StepStatus
    input_json: str | None = None
    output_json: str | None = None
    error: str | None = None
    evaluation_trace_json: str | None = None
    job_id: str | None = None
    owner: str | None = None
    fencing_token: int | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step as its latest attempt left it, with all its attempts, oldest first."""

    step_key: str
    step_type: str
    status: StepStatus
    attempt_count: int
    attempts: tuple[AttemptRecord, ...] = field(repr=False)
    input_json: str | None = None
    output_json: str | None = None
    error: str | None = None
    evaluation_trace_json: str | None = None
    job_id: str | None = None
    owner: str | None = None
    fencing_token: int | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None


class FindingKind(StrEnum):
    """What a crash can leave behind."""

    ORPHANED_STEP = "orphaned step"
    LOST_DISPATCH = "lost dispatch"
    UNDISPATCHED_STEP = "undispatched step"
    UNREACHABLE_STEP = "unreachable step"
    UNCOMPLETED_RUN = "uncompleted run"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a crash left behind. `mended`: this caller, and nobody else, has put it right."""

    kind: FindingKind
    run_id: str
    step_key: str | None
    detail: str
    mended: bool


@dataclass(frozen=True, slots=True)
class NextSteps:
    """What an engine's graph says of a run as it stands: the plan that recovery asks for."""

    ready: frozenset[str] = frozenset()
    """Steps without a row whose prerequisites are met."""
    unreachable: frozenset[str] = frozenset()
    """Steps without a row whose prerequisites can't be met any more."""
    outcome: RunStatus | None = None
    """The run's final status, once nothing is left to do."""


@dataclass(frozen=True, slots=True)
class RunControl:
    """What was asked of a run. A run that timed out counts as one whose cancellation was requested, too."""

    run_id: str
    flow_id: str | None = None
    trigger_key: str | None = None
    idempotency_key: str | None = None
    timeout_at: datetime | None = None
    cancel_requested: bool = False
    cancel_reason: str | None = None
    cancel_requested_at: datetime | None = None
    timed_out_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run, and its steps where they were asked for, in the order of their keys."""

    run_id: str
    flow_id: str
    flow_name: str
    status: RunStatus
    trigger_key: str
    trigger_data_json: str | None
    job_id: str | None
    source_run_id: str | None
    started_at: datetime
    completed_at: datetime | None = None
    steps: tuple[StepRecord, ...] = ()
