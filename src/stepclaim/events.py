"""What `watch_run` tells: one value for each change of a key of the run, in etcd's order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepclaim.models import RunStatus, StepStatus


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something happened to a run. All events of one transaction have one revision."""

    revision: int
    run_id: str
    resume: int = field(default=0, kw_only=True, compare=False, repr=False)
    """Give this to `watch_run(after_revision=...)` to go on behind this event. It is the event's revision once all
    events of that transaction were told, and the revision before until then."""


@dataclass(frozen=True, slots=True)
class RunChanged(RunEvent):
    """The run's record was written."""

    status: RunStatus


@dataclass(frozen=True, slots=True)
class RunRemoved(RunEvent):
    """The run was deleted."""


@dataclass(frozen=True, slots=True)
class ControlChanged(RunEvent):
    """Something was asked of the run."""

    cancel_requested: bool
    timed_out: bool


@dataclass(frozen=True, slots=True)
class StepEvent(RunEvent):
    """Something happened to a step."""

    step_key: str


@dataclass(frozen=True, slots=True)
class StepChanged(StepEvent):
    """The step's row was written."""

    status: StepStatus
    attempt: int
    owner: str | None


@dataclass(frozen=True, slots=True)
class StepReset(StepEvent):
    """The step's row was removed: it is evaluated anew."""


@dataclass(frozen=True, slots=True)
class ClaimTaken(StepEvent):
    """The step was claimed; the event's revision is the fencing token."""

    owner: str


@dataclass(frozen=True, slots=True)
class ClaimSealed(StepEvent):
    """The step is final: nobody can claim it any more."""

    owner: str
    status: StepStatus


@dataclass(frozen=True, slots=True)
class ClaimEnded(StepEvent):
    """The claim is gone: released, or its lease ended."""


@dataclass(frozen=True, slots=True)
class StepDispatched(StepEvent):
    """The step's entry in the dispatch ledger was written."""

    job_id: str | None


@dataclass(frozen=True, slots=True)
class DispatchEnded(StepEvent):
    """The step's entry in the dispatch ledger was removed."""


@dataclass(frozen=True, slots=True)
class Relisted(RunEvent):
    """What came behind this revision was compacted before it could be told: the events that follow tell what stands.

    A watcher that went on behind a revision should forget what is not told again.
    """
