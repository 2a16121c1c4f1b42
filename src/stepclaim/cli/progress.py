"""What follows from where a run stands: steps are skipped or dispatched, and the run is completed, by anybody.

It is judged again after each write, by whoever wrote: of workers that finish at the same moment the last one sees all
that the others did. The dispatch ledger makes that harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

from stepclaim.errors import StepConflictError
from stepclaim.models import PREREQUISITES_UNMET, NextSteps, RunStatus, StepStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stepclaim.cli.flow import Flow
    from stepclaim.cli.when import Verdict
    from stepclaim.models import RunRecord
    from stepclaim.run_store import RunStore

Dispatch: TypeAlias = Callable[[str, str], None]
"""Sends the message that has the step of the run handled, by whomever, at least once."""


class Progress:
    """Brings the runs of a flow forward on a store."""

    def __init__(self, store: RunStore, flow: Flow, dispatch: Dispatch) -> None:
        """Do nothing yet."""
        self._store = store
        self._flow = flow
        self._dispatch = dispatch

    def advance(self, run_id: str, statuses: Mapping[str, StepStatus] | None = None) -> None:
        """Skip, dispatch or complete what is due, at any time, any number of times.

        `statuses` are the run's if they were just read.
        """
        stopped = self.stopped(run_id)
        if stopped is None:
            self.go_on(run_id, statuses)
        else:
            self.stop(run_id, stopped)

    def go_on(self, run_id: str, statuses: Mapping[str, StepStatus] | None = None, sent: Iterable[str] = ()) -> None:
        """Advance a run that nobody has stopped. `sent` is known to be in the ledger."""
        while True:
            plan = self._flow.plan(self._store.get_step_statuses(run_id) if statuses is None else statuses)
            due = [key for key in plan.ready if key not in sent]
            if len(due) > 1:  # one read in place of many refusals; the ledger still decides
                dispatched = self._store.get_dispatched_step_keys(run_id)
                due = [key for key in due if key not in dispatched]
            verdicts = self._judge(run_id, due)
            off = {key: verdict for key, verdict in verdicts.items() if not verdict.result}
            self.send(run_id, (key for key in due if key not in off))
            if not off and not plan.skip:
                break
            skipped = [self.skip(run_id, key, PREREQUISITES_UNMET) for key in plan.skip]
            skipped += [self.skip(run_id, key, each.reason, each.trace_json) for key, each in off.items()]
            if not all(skipped):  # somebody works on it all the same: what comes next is theirs to see to
                return
            statuses = None
        if plan.status is not None:
            self._store.complete_run(run_id, self.stopped(run_id) or plan.status)

    def stopped(self, run_id: str) -> RunStatus | None:
        """Tell whether a run was cancelled or has timed out; a time that is over is noted where nobody did."""
        control = self._store.get_run_control(run_id)
        if control is None:
            return None
        if control.timed_out_at is not None:
            return RunStatus.TIMED_OUT
        if control.timeout_at is not None and control.timeout_at <= datetime.now(UTC):
            if self._store.get_run_status(run_id) != RunStatus.RUNNING:
                return None
            self._store.mark_timed_out(run_id)
            return RunStatus.TIMED_OUT
        return RunStatus.CANCELLED if control.cancel_requested else None

    def stop(self, run_id: str, status: RunStatus) -> None:
        """Skip all that was not begun in a run that was cancelled or timed out; complete it once no body runs."""
        if self._store.get_run_status(run_id) != RunStatus.RUNNING:
            return
        statuses = self._store.get_step_statuses(run_id)
        unstarted = [key for key in self._flow.steps if statuses.get(key) in (None, StepStatus.PENDING)]
        skipped = [self.skip(run_id, key, stop_reason(status)) for key in unstarted]
        if skipped:
            statuses = self._store.get_step_statuses(run_id)
        if all(skipped) and all(each.is_final for each in statuses.values()):
            self._store.complete_run(run_id, status)

    def skip(self, run_id: str, step_key: str, reason: str, trace_json: str | None = None) -> bool:
        """Skip a step; False if it is over otherwise, or somebody has it."""
        step_type = self._flow.steps[step_key].type
        try:
            self._store.record_skipped_step_with_trace(run_id, step_key, step_type, reason, trace_json)
        except StepConflictError:
            return False
        return True

    def revive(self, run_id: str, step_key: str) -> None:
        """Have the steps evaluated anew that were skipped because of one that runs again."""
        revived = self._flow.revived(step_key, self._store.get_step_statuses(run_id))
        if revived:
            self._store.reset_cascade_skipped_dependents(run_id, revived)

    def send(self, run_id: str, step_keys: Iterable[str]) -> None:
        """Dispatch those of the steps that nobody has dispatched."""
        for key in step_keys:
            if self._store.try_record_dispatch(run_id, key):
                self._dispatch(run_id, key)

    def next_steps(self, run: RunRecord, statuses: Mapping[str, StepStatus]) -> NextSteps:
        """Tell recovery what the flow says of a run as it stands; nothing of a run of another flow."""
        if run.flow_name != self._flow.name:
            return NextSteps()
        plan = self._flow.plan(statuses)
        verdicts = self._judge(run.run_id, plan.ready)
        ready = frozenset(key for key in plan.ready if key not in verdicts or verdicts[key].result)
        outcome = None if plan.status is None else self.stopped(run.run_id) or plan.status
        return NextSteps(ready, frozenset(plan.skip), outcome)

    def _judge(self, run_id: str, keys: Iterable[str]) -> dict[str, Verdict]:
        """Judge the When clauses of those of the steps that have one."""
        clauses = {key: when for key in keys if (when := self._flow.steps[key].when) is not None}
        run = self._store.get_run(run_id) if clauses else None
        data = None if run is None else run.trigger_data_json
        ended = {step.step_key: (step.status, step.output_json) for step in (run.steps if run else ())}
        return {key: when.judge(data, ended) for key, when in clauses.items()}


def stop_reason(status: RunStatus) -> str:
    """Tell why a step of a stopped run was skipped; public, byte for byte."""
    return f"Run is {status}."
