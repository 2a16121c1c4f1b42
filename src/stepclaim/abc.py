"""The published interface, for whoever calls a store and for whoever writes one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stepclaim.models import StepStatus

RunId = UUID | str
"""A run's id: a UUID, or any text. Text that parses as a UUID names the same run as that UUID."""


class FlowRunRuntimeStore(ABC):
    """What an engine needs from a store, for threads."""

    @abstractmethod
    def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        """Claim a step: True for exactly one caller, False for every other.

        Once the step is final the answer is False for ever, until the step is released, retried or reset.
        Works for a run and a step that nobody has recorded. On etcd: one transaction.
        """

    def release_step_claim(self, run_id: RunId, step_key: str) -> None:  # noqa: B027 - a store without it still works
        """Remove the step's claim, whoever holds it and whether it is held or sealed. Doing it again does nothing."""

    @abstractmethod
    def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are claimed and not yet completed."""

    @abstractmethod
    def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        """Give every recorded step's status as one linearizable snapshot; empty for an unknown run."""

    @abstractmethod
    def record_skipped_step(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None = None,
    ) -> None:
        """Set the step to Skipped in one visible transition; it can't be claimed afterwards. Needs no claim.

        On a step that is Skipped already nothing happens. Raises `StepConflictError`, with nothing written, if the
        step is Succeeded or Failed or is claimed by somebody else.
        """

    def record_skipped_step_with_trace(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None,  # noqa: ARG002 - a store written for four arguments drops it
    ) -> None:
        """Skip a step and keep the trace of the clause that decided it, where the store can keep one."""
        self.record_skipped_step(run_id, step_key, step_type, reason)

    @abstractmethod
    def get_run_status(self, run_id: RunId) -> str | None:
        """Give the run's status, "Running" to "TimedOut"; None for an unknown run."""


class AsyncFlowRunRuntimeStore(ABC):
    """What an engine needs from a store, for asyncio."""

    @abstractmethod
    async def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        """Claim a step: True for exactly one caller, False for every other.

        Once the step is final the answer is False for ever, until the step is released, retried or reset.
        Works for a run and a step that nobody has recorded. On etcd: one transaction.
        """

    async def release_step_claim(self, run_id: RunId, step_key: str) -> None:  # noqa: B027
        """Remove the step's claim, whoever holds it and whether it is held or sealed. Doing it again does nothing."""

    @abstractmethod
    async def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are claimed and not yet completed."""

    @abstractmethod
    async def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        """Give every recorded step's status as one linearizable snapshot; empty for an unknown run."""

    @abstractmethod
    async def record_skipped_step(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None = None,
    ) -> None:
        """Set the step to Skipped in one visible transition; it can't be claimed afterwards. Needs no claim.

        On a step that is Skipped already nothing happens. Raises `StepConflictError`, with nothing written, if the
        step is Succeeded or Failed or is claimed by somebody else.
        """

    async def record_skipped_step_with_trace(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None,  # noqa: ARG002 - a store written for four arguments drops it
    ) -> None:
        """Skip a step and keep the trace of the clause that decided it, where the store can keep one."""
        await self.record_skipped_step(run_id, step_key, step_type, reason)

    @abstractmethod
    async def get_run_status(self, run_id: RunId) -> str | None:
        """Give the run's status, "Running" to "TimedOut"; None for an unknown run."""
