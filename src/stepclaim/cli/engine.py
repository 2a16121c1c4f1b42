"""The small engine that the demo and the tests run on a store: claim, body, completion, and what comes next."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from stepclaim.cli.flow import Flow, Plan, Step
from stepclaim.errors import ClaimLostError, ConfigurationError, RecordTooLargeError, StepConflictError
from stepclaim.models import StepStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stepclaim.abc import RunId
    from stepclaim.models import RunRecord, StepClaim
    from stepclaim.run_store import RunStore

__all__ = ["Body", "Dispatch", "Engine", "Flow", "Handled", "Pending", "Plan", "Step"]

PREREQUISITE_NOT_MET = "Prerequisite status did not satisfy runAfter conditions."
_LONGEST_TRACEBACK = 16_000


class Handled(StrEnum):
    """What became of one message."""

    RAN = "ran"
    """The body ran and its result was committed, Succeeded or Failed."""
    PARKED = "parked"
    """The body ran and wants to be called again later."""
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

Dispatch: TypeAlias = Callable[[str, str], None]
"""Sends the message that has the step of the run handled, by whomever, at least once."""


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

    def trigger(self, run_id: RunId, trigger_key: str = "manual", data_json: str | None = None) -> RunRecord:
        """Start a run, or go on with the one that stands under its id, and dispatch what is ready."""
        run = self.store.start_run(self.flow.name, self.flow.name, run_id, trigger_key, data_json)
        if not run.status.is_final:
            self.advance(run.run_id)
        return run

    def handle(self, run_id: str, step_key: str) -> Handled:
        """Handle one message. A duplicate is a result, not an error; etcd's troubles are raised: send it again."""
        step = self.flow.steps.get(step_key)
        if step is None:
            raise ConfigurationError(f"flow {self.flow.name!r} has no step {step_key!r}")
        claim = self.store.claim_step(run_id, step_key, step_type=step.type)
        if claim is None:
            statuses = self.store.get_step_statuses(run_id)
            if step_key not in statuses or not statuses[step_key].is_final:
                return Handled.REFUSED_HELD
            # whoever finished the step may have died before it told the next ones: doing that again does no harm
            self.advance(run_id, statuses)
            return Handled.REFUSED_FINAL
        try:
            parked = self._run(claim)
        except ClaimLostError:
            return Handled.LOST
        if parked is not None:
            # the ledger's entry goes only after the claim, so that nobody dispatches into a claim that still stands
            self.store.release_dispatch(run_id, step_key)
            if self.store.try_record_dispatch(run_id, step_key):
                self._dispatch_after(run_id, step_key, parked.delay)
            return Handled.PARKED
        self.advance(run_id)
        return Handled.RAN

    def advance(self, run_id: str, statuses: Mapping[str, StepStatus] | None = None) -> Plan:
        """Look at where a run stands, skip, dispatch or complete what is due, and give the plan that this followed.

        Anybody may do this at any time, any number of times.
        """
        known = dict(self.store.get_step_statuses(run_id) if statuses is None else statuses)
        while (plan := self.flow.plan(known)).skip:
            for key in plan.skip:
                try:
                    self.store.record_skipped_step(run_id, key, self.flow.steps[key].type, PREREQUISITE_NOT_MET)
                except StepConflictError:  # somebody works on it all the same: what comes next is theirs to see to
                    return plan
                known[key] = StepStatus.SKIPPED
        if plan.ready:
            ready = plan.ready
            if len(ready) > 1:  # one read in place of many refusals; the ledger still decides
                dispatched = self.store.get_dispatched_step_keys(run_id)
                ready = tuple(key for key in ready if key not in dispatched)
            for key in ready:
                if self.store.try_record_dispatch(run_id, key):
                    self._dispatch(run_id, key)
        elif plan.status is not None:
            self.store.complete_run(run_id, plan.status)
        return plan

    def _run(self, claim: StepClaim) -> Pending | None:
        """Run the body and commit what comes of it, or give back that it wants to be called again."""
        try:
            result = self._body(claim)
        except Exception:  # noqa: BLE001 - whatever a body raises is its step's failure
            error = traceback.format_exc()[-_LONGEST_TRACEBACK:]
            self.store.complete_step(claim, StepStatus.FAILED, error=error)
            return None
        if isinstance(result, Pending):
            self.store.defer_step(claim, reason=result.reason)
            return result
        try:
            self.store.complete_step(claim, StepStatus.SUCCEEDED, output_json=result)
        except RecordTooLargeError as error:  # it would be too large every time
            self.store.complete_step(claim, StepStatus.FAILED, error=str(error))
        return None
