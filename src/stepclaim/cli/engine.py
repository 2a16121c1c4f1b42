"""The small engine that the demo and the tests run on a store: claim, body, completion, and on to what comes next."""

from __future__ import annotations

import traceback
import uuid
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from stepclaim import recovery
from stepclaim._core import claims
from stepclaim.cli.flow import Flow, Plan, Step
from stepclaim.cli.progress import Dispatch, Progress, stop_reason
from stepclaim.errors import ClaimLostError, ConfigurationError, RecordTooLargeError
from stepclaim.models import StepStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stepclaim.abc import RunId
    from stepclaim.models import Finding, RunRecord, StepClaim
    from stepclaim.run_store import RunStore

__all__ = ["Body", "Dispatch", "Engine", "Flow", "Handled", "Pending", "Plan", "Step"]

_LONGEST_TRACEBACK = 16_000
_MOST_SUCCESSORS = 100
"""As many go into the transaction that completes a step; the others are dispatched after it."""


class Handled(StrEnum):
    """What became of one message."""

    RAN = "ran"
    """The body ran and its result was committed, Succeeded or Failed."""
    PARKED = "parked"
    """The body ran and wants to be called again later."""
    STOPPED = "stopped"
    """The run was cancelled or has timed out: the step is skipped."""
    REFUSED_HELD = "refused, held"
    """Somebody has the step; it is not final yet, so the message must come again unless that one finishes."""
    REFUSED_FINAL = "refused, final"
    """The step is over: a duplicate."""
    LOST = "lost"
    """The body ran, but the claim had been lost meanwhile: the result was refused."""


@dataclass(frozen=True)
class Pending:
    """A body gives this back to be called again, after `delay` seconds."""

    delay: float = 0.0
    reason: str | None = None


Body: TypeAlias = "Callable[[StepClaim], str | Pending | None]"
"""A step's work: gives its output as JSON text, or None, or `Pending`; what it raises fails the step."""


class Engine:
    """Runs a flow on a store. Any number of engines, in any number of processes, work on the same runs.

    `dispatch_after` (run, step, seconds) sends a delayed message; without it a parked step is dispatched at once.
    """

    def __init__(
        self,
        store: RunStore,
        flow: Flow,
        body: Body,
        dispatch: Dispatch,
        dispatch_after: Callable[[str, str, float], None] | None = None,
    ) -> None:
        """Do nothing yet."""
        self.store = store
        self.flow = flow
        self._body = body
        self._dispatch = dispatch
        self._dispatch_after = dispatch_after or (lambda run_id, step_key, _: dispatch(run_id, step_key))
        self._progress = Progress(store, flow, dispatch)
        self.advance = self._progress.advance
        self.next_steps = self._progress.next_steps

    # --- what users and operators ask for --------------------------------------------------------------------------

    def trigger(
        self,
        run_id: RunId | None = None,
        trigger_key: str = "manual",
        data_json: str | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> RunRecord:
        """Start a run, or go on with the one that has its id or its idempotency key, and dispatch what is ready."""
        run = self.store.start_run(
            self.flow.name,
            self.flow.name,
            uuid.uuid4() if run_id is None else run_id,
            trigger_key,
            data_json,
            idempotency_key=idempotency_key,
        )
        if not run.status.is_final:
            self.advance(run.run_id)
        return run

    def cancel(self, run_id: str, reason: str | None = None) -> bool:
        """Have a run cancelled: no further body begins, those that run may end. True for the first who asks."""
        first = self.store.request_cancel(run_id, reason)
        self.advance(run_id)
        return first

    def retry(self, run_id: str, step_key: str) -> None:
        """Run a step again, and after it those that were skipped because of it."""
        self._step(step_key)
        self.store.retry_step(run_id, step_key)
        self._progress.revive(run_id, step_key)
        self._progress.send(run_id, (step_key,))

    def recover(self, grace: float = 60.0) -> list[Finding]:
        """Put right what crashes left in the active runs; `grace`: seconds for which a message may be under way."""
        found = recovery.recover(self.store, plan=self.next_steps, dispatch=self._dispatch, mend=True, grace=grace)
        for run in self.store.get_active_runs():
            if run.flow_name == self.flow.name:
                self.advance(run.run_id)
        return found

    # --- one message -----------------------------------------------------------------------------------------------

    def handle(self, run_id: str, step_key: str) -> Handled:
        """Handle one message. A duplicate is a result, not an error; etcd's troubles are raised: send it again."""
        step = self._step(step_key)
        stopped = self._progress.stopped(run_id)
        if stopped is not None:
            skipped = self._progress.skip(run_id, step_key, stop_reason(stopped))
            self._progress.stop(run_id, stopped)
            return Handled.STOPPED if skipped else _refused(step_key, self.store.get_step_statuses(run_id))
        claim = self.store.claim_step(run_id, step_key, step_type=step.type)
        if claim is None:
            statuses = self.store.get_step_statuses(run_id)
            refused = _refused(step_key, statuses)
            if refused is Handled.REFUSED_FINAL:
                # whoever finished the step may have died before it told the next ones: doing that again does no harm
                self._progress.go_on(run_id, statuses)
            return refused
        try:
            if claim.attempt > 1:  # whoever retried it may have died before it revived what comes after
                self._progress.revive(run_id, step_key)
            return self._run(claim)
        except ClaimLostError:
            return Handled.LOST
        except BaseException:
            # unless the step was completed, nobody works on it now: as long as this session lives, it must be free
            self.store._run_later(partial(claims.release_claim, self.store._ctx, claim))  # noqa: SLF001
            raise

    def _run(self, claim: StepClaim) -> Handled:
        """Run the body and commit what comes of it."""
        try:
            result = self._body(claim)
        except Exception:  # noqa: BLE001 - whatever a body raises is its step's failure
            self._finish(claim, StepStatus.FAILED, error=traceback.format_exc()[-_LONGEST_TRACEBACK:])
            return Handled.RAN
        if isinstance(result, Pending):
            # one transaction gives the claim up and makes the ledger's entry anew: the message will find a free step
            self.store.defer_step(claim, reason=result.reason, dispatch=True)
            self._dispatch_after(claim.run_id, claim.step_key, result.delay)
            return Handled.PARKED
        try:
            self._finish(claim, StepStatus.SUCCEEDED, output_json=result)
        except RecordTooLargeError as error:  # it would be too large every time
            self._finish(claim, StepStatus.FAILED, error=str(error))
        return Handled.RAN

    def _finish(
        self, claim: StepClaim, status: StepStatus, *, output_json: str | None = None, error: str | None = None
    ) -> None:
        """Complete the step and dispatch its successors in one transaction, then look again.

        Of two that finish at the same moment neither sees the other before; after it, the later one does.
        """
        known = self.store.get_step_statuses(claim.run_id)
        successors = self.flow.successors(claim.step_key, status, known)[:_MOST_SUCCESSORS]
        new = self.store.complete_step(claim, status, output_json=output_json, error=error, dispatch=successors)
        for key in successors:
            if key in new:
                self._dispatch(claim.run_id, key)
        self._progress.go_on(claim.run_id, sent=successors)

    def _step(self, step_key: str) -> Step:
        step = self.flow.steps.get(step_key)
        if step is None:
            raise ConfigurationError(f"flow {self.flow.name!r} has no step {step_key!r}")
        return step


def _refused(step_key: str, statuses: Mapping[str, StepStatus]) -> Handled:
    over = step_key in statuses and statuses[step_key].is_final
    return Handled.REFUSED_FINAL if over else Handled.REFUSED_HELD
