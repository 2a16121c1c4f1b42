"""Everything a store can do, for threads: each method names its program, `_run` runs it."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core import again, claims, control, finishing, retention, runs, steps
from stepclaim._core.ops import Compacted
from stepclaim._core.watching import Cursor
from stepclaim.abc import FlowRunRuntimeStore, RunId
from stepclaim.body import ActiveStep
from stepclaim.errors import ClaimLostError, DeadlineExceededError
from stepclaim.identity import cut, seconds
from stepclaim.models import StepStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from stepclaim._core.context import Context
    from stepclaim._core.ops import Batch, Program
    from stepclaim.events import RunEvent
    from stepclaim.models import ClaimInfo, RunControl, RunRecord, RunStatus, StepClaim

R = TypeVar("R")


class RunStore(FlowRunRuntimeStore):
    """Everything a store can do, whatever it stands on."""

    _ctx: Context

    def _run(self, program: Program[R], timeout: float | None = None) -> R:
        raise NotImplementedError

    def _run_later(self, program: Callable[[], Program[Any]]) -> None:
        raise NotImplementedError

    def _watch_claim(self, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        raise NotImplementedError

    def _batches(self, prefix: bytes, start: int, deadline: float | None) -> Iterator[Batch]:
        raise NotImplementedError

    # --- claims --------------------------------------------------------------------------------------------------

    def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        """Claim a step: True for exactly one caller, False for every other and for ever once the step is final.

        The store remembers the claim: its own `record_step_start` and `record_step_complete` are guarded by it.
        Raises `OutcomeUnknownError` if the deadline passed in doubt; no claim is left behind then.
        Costs one RPC and, when won, one write.
        """
        return self._run(claims.try_claim(self._ctx, run_id, step_key))

    def claim_step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> StepClaim | None:
        """Claim a step and start its next attempt, in one transaction; None if somebody else has it or it is final.

        Raises `OutcomeUnknownError` if the deadline passed in doubt; no claim is left behind then.
        Costs one RPC for a first attempt, two or three for a later one.
        """
        return self._run(claims.claim_step(self._ctx, run_id, step_key, step_type, input_json, job_id))

    def claim_steps(self, run_id: RunId, step_keys: Iterable[str]) -> Mapping[str, StepClaim]:
        """Claim and start several steps of a run, and give the claims that were won.

        Costs one RPC and one transaction for each 120 first attempts; one, two or three more for each later one.
        """
        return self._run(claims.claim_steps(self._ctx, run_id, step_keys))

    def wait_for_step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        timeout: float,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> StepClaim:
        """Claim and start a step, waiting by watch for at most `timeout` seconds while somebody else has it.

        A step that is final is waited for, too: a retry may free it. Raises `ClaimTimeoutError`. Costs a claim, and a
        watch and a claim each time that the step is given up.
        """
        return self._run(
            claims.wait_for_step(self._ctx, run_id, step_key, step_type, input_json, job_id), seconds(timeout)
        )

    def release_step_claim(self, run_id: RunId, step_key: str) -> None:
        """Remove the step's claim, whoever holds it and whether it is held or sealed. Doing it again does nothing.

        A claim made after this call has looked is never removed. Costs two RPCs and one write.
        """
        self._run(claims.release_step(self._ctx, run_id, step_key))

    def release_claim(self, claim: StepClaim) -> bool:
        """Give a claim back, only if it is still held by it; False if it was lost before.

        Raises `OutcomeUnknownError` if a reply was lost and the claim is gone: it is released, by whomever.
        Costs one RPC and one write.
        """
        return self._run(claims.release_claim(self._ctx, claim))

    def holds(self, claim: StepClaim) -> bool:
        """Ask etcd, linearizable, whether the claim is still held. Costs one read."""
        return self._run(claims.holds(self._ctx, claim))

    def get_claim(self, run_id: RunId, step_key: str) -> ClaimInfo | None:
        """Tell who holds a step, or what its claim was sealed with; None for an unclaimed one. Costs one read."""
        return self._run(claims.get_claim(self._ctx, run_id, step_key))

    def get_claims(self, run_id: RunId | None = None) -> Sequence[ClaimInfo]:
        """Tell all claims of a run, held and sealed, or of all runs at the cost of a look at every key."""
        return self._run(claims.list_claims(self._ctx, run_id))

    def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are claimed and not yet completed. Costs one read for up to 100 claims."""
        return self._run(claims.claimed_step_keys(self._ctx, run_id))

    # --- finishing -----------------------------------------------------------------------------------------------

    def complete_step(
        self,
        claim: StepClaim,
        status: StepStatus | str,
        *,
        output_json: str | None = None,
        error: str | None = None,
        dispatch: Iterable[str] = (),
    ) -> frozenset[str]:
        """Finish a claimed step: final status, attempt and the sealing of the claim, in one guarded transaction.

        `dispatch` names up to 100 steps that go into the dispatch ledger with it; those that were not in there yet are
        given back, and are the caller's to send on. Cancelled meanwhile, it is carried through in the background.
        Raises `ClaimLostError` if the claim is no longer held; nothing is written then. Telling the same result
        again does nothing. Costs one RPC and one transaction; from another store than the claiming one, one read more.
        """
        return self._run(finishing.complete(self._ctx, claim, status, output_json, error, dispatch))

    @contextmanager
    def step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
        wait: float | None = None,
    ) -> Iterator[ActiveStep | None]:
        """Claim a step for the body of a `with`, and record what becomes of it; gives None if it can't be claimed.

        With `wait` it is waited for, up to so many seconds. A body that ends has succeeded, unless it said otherwise;
        an exception fails the step with its traceback as error, and goes on; an interruption (KeyboardInterrupt,
        cancellation) sets it back to Pending. If the claim is lost meanwhile, `lost` is set within a few seconds (on
        asyncio the task is cancelled too), the result is refused and `ClaimLostError` raised. Whatever happens, nothing
        stays held. Costs two RPCs, as claiming and completing do.
        """
        if wait is None:
            claim = self.claim_step(run_id, step_key, step_type=step_type, input_json=input_json, job_id=job_id)
        else:
            claim = self.wait_for_step(
                run_id, step_key, timeout=wait, step_type=step_type, input_json=input_json, job_id=job_id
            )
        if claim is None:
            yield None
            return
        active = ActiveStep(claim, threading.Event())
        unwatch = self._watch_claim(claim, active.lost.set)
        try:
            yield active
        except Exception:
            active.fail(cut(traceback.format_exc(), self._ctx.value_limit))
            self._end(active)
            raise
        except BaseException:
            active.defer("the body was interrupted")
            self._end(active)
            raise
        else:
            self._end(active)
        finally:
            unwatch()

    def _end(self, active: ActiveStep) -> None:
        claim = active.claim
        try:
            if active.status is StepStatus.PENDING:
                self.defer_step(claim, reason=active.reason, dispatch=active.dispatch_again)
            else:
                self.complete_step(claim, active.status, output_json=active.output_json, error=active.error)
        except ClaimLostError:
            active.lost.set()
            raise
        except BaseException:
            self._run_later(partial(claims.release_claim, self._ctx, claim))
            raise

    def defer_step(self, claim: StepClaim, *, reason: str | None = None, dispatch: bool | datetime = False) -> None:
        """Set a claimed step back to Pending and give the claim up, in one guarded transaction.

        With `dispatch` its entry in the ledger is made anew in the same transaction, for the one who sends it again; a
        time says when that message is due, so that recovery finds it if it was lost.
        Raises `ClaimLostError` if the claim is no longer held. Costs one RPC and one transaction.
        """
        self._run(finishing.defer(self._ctx, claim, reason, dispatch))

    # --- the engine's writers ------------------------------------------------------------------------------------

    def start_run(
        self,
        flow_id: RunId,
        flow_name: str,
        run_id: RunId,
        trigger_key: str,
        trigger_data_json: str | None = None,
        job_id: str | None = None,
        *,
        source_run_id: RunId | None = None,
        idempotency_key: str | None = None,
    ) -> RunRecord:
        """Record a run as Running, or give the record that stands under its id, unchanged. Costs one RPC.

        With an `idempotency_key` run and key are written in one transaction, or the record is given of the run that
        the key stands for: of two triggers with one key the second gets the first's run.
        """
        return self._run(
            runs.start_run(
                self._ctx,
                flow_id,
                flow_name,
                run_id,
                trigger_key,
                trigger_data_json,
                job_id,
                source_run_id,
                idempotency_key,
            )
        )

    def complete_run(self, run_id: RunId, status: RunStatus | str) -> bool:
        """Give a run its final status; the first wins. False: unknown, or final already. Costs two RPCs."""
        return self._run(runs.complete_run(self._ctx, run_id, status))

    def record_step_start(
        self, run_id: RunId, step_key: str, step_type: str, input_json: str | None = None, job_id: str | None = None
    ) -> int:
        """Begin the step's next attempt and give its number, from 1 and without gaps.

        Works without claim, dispatch or run. Where this store took the step's claim the write is guarded by it and
        raises `ClaimLostError` once it is lost. Costs one RPC for a first attempt, two or three for a later one.
        """
        return self._run(steps.record_start(self._ctx, run_id, step_key, step_type, input_json, job_id))

    def record_step_complete(
        self,
        run_id: RunId,
        step_key: str,
        status: StepStatus | str,
        output_json: str | None = None,
        error: str | None = None,
    ) -> None:
        """Record what came of the current attempt. A final status seals the claim; Pending leaves it as it is.

        Without a start nothing happens. Where this store took the step's claim the write is guarded by it and raises
        `ClaimLostError` once it is lost. A second, different result raises `StepConflictError`. Costs one RPC where
        this store took the claim and began the attempt, else two.
        """
        self._run(finishing.record_complete(self._ctx, run_id, step_key, status, output_json, error))

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
        step is Succeeded or Failed or is claimed by somebody else. Costs one RPC for a step that is not recorded yet.
        """
        self._run(steps.skip(self._ctx, run_id, step_key, step_type, reason, evaluation_trace_json))

    def record_skipped_step_with_trace(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None,
    ) -> None:
        """Skip a step and keep the trace of the clause that decided it, byte for byte."""
        self._run(steps.skip(self._ctx, run_id, step_key, step_type, reason, evaluation_trace_json))

    def retry_step(self, run_id: RunId, step_key: str) -> None:
        """Set step and run back to Running, and let go of claim and dispatch, in one transaction.

        The old holder's writes are refused from then on. No attempt is added: the following start does that.
        Costs two RPCs.
        """
        self._run(again.retry_step(self._ctx, run_id, step_key))

    def reset_cascade_skipped_dependents(self, run_id: RunId, step_keys: Iterable[str]) -> None:
        """Let those of the steps be evaluated anew that were skipped only because a prerequisite was not met.

        They lose their row, claim and dispatch; their attempts stay, and all other steps keep all they have.
        Costs two RPCs for each 24 keys.
        """
        self._run(again.reset_skipped(self._ctx, run_id, step_keys))

    def configure_run(
        self,
        run_id: RunId,
        flow_id: RunId,
        trigger_key: str,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        """Write a run's control record; a cancellation or a time-out that stands there is kept. Costs two RPCs."""
        self._run(control.configure_run(self._ctx, run_id, flow_id, trigger_key, idempotency_key, timeout_at))

    def request_cancel(self, run_id: RunId, reason: str | None = None) -> bool:
        """Ask that a run be cancelled; True for the first who asks, whose reason stays. Costs two RPCs."""
        return self._run(control.request_cancel(self._ctx, run_id, reason))

    def mark_timed_out(self, run_id: RunId, reason: str | None = None) -> bool:
        """Say that a run's time is over; True for the first who says so. It is cancelled by that, too. Two RPCs."""
        return self._run(control.mark_timed_out(self._ctx, run_id, reason))

    def try_register_idempotency_key(
        self, flow_id: RunId, trigger_key: str, idempotency_key: str, run_id: RunId
    ) -> bool:
        """Let a key stand for a run: True for exactly one caller. Trigger and key are compared trimmed and caseless.

        `start_run(..., idempotency_key=...)` writes the run with it, so that no key stands for a run that is not there.
        Costs one RPC.
        """
        return self._run(control.register_key(self._ctx, flow_id, trigger_key, idempotency_key, run_id))

    def delete_run(self, run_id: RunId) -> bool:
        """Remove everything of a run, indexes and idempotency keys too; True if there was anything. Costs two RPCs."""
        return self._run(retention.delete_run(self._ctx, run_id))

    def purge_runs(self, completed_before: datetime, *, limit: int | None = None) -> int:
        """Remove the runs that were completed strictly before a time, oldest first, and give their number.

        Works in transactions of bounded size; one that was interrupted is finished by the next. Each call's deadline
        holds for it too: with thousands of runs give a `limit` and call again. Costs a look at every key.
        """
        return self._run(retention.purge_runs(self._ctx, completed_before, limit))

    def try_record_dispatch(self, run_id: RunId, step_key: str) -> bool:
        """Write the step into the dispatch ledger: True for exactly one caller until it is released. One RPC."""
        return self._run(runs.try_record_dispatch(self._ctx, run_id, step_key))

    def annotate_dispatch(self, run_id: RunId, step_key: str, job_id: str) -> None:
        """Note the job that a dispatch became; on a released dispatch nothing happens. Costs two RPCs."""
        self._run(runs.annotate_dispatch(self._ctx, run_id, step_key, job_id))

    def release_dispatch(self, run_id: RunId, step_key: str) -> None:
        """Take the step out of the dispatch ledger, so that it can be dispatched again. Costs two RPCs."""
        self._run(runs.release_dispatch(self._ctx, run_id, step_key))

    # --- watching ------------------------------------------------------------------------------------------------

    def watch_run(
        self, run_id: RunId, *, after_revision: int | None = None, timeout: float | None = None
    ) -> Iterator[RunEvent]:
        """Tell what happens to a run, as typed events in etcd's order: none lost, none twice.

        Begins with what stands, as events, or behind `after_revision`: the `resume` of the last event that was seen.
        Goes on through cut connections, failovers and compactions; after a compaction that outran it a `Relisted` says
        that what follows is the state, not each step to it. Ends after `timeout` seconds, or never. Costs a watch, and
        a list of the run at the beginning and after a compaction.
        """
        deadline = None if timeout is None else time.monotonic() + seconds(timeout)
        cursor = Cursor(self._ctx, run_id, after_revision)
        while deadline is None or time.monotonic() < deadline:
            try:
                if cursor.must_list:
                    yield from self._run(cursor.look())
                for batch in self._batches(cursor.prefix, cursor.revision + 1, deadline):
                    yield from cursor.take(batch.events)
            except Compacted:
                cursor.compacted()
            except DeadlineExceededError:
                if deadline is None or time.monotonic() < deadline:
                    raise

    # --- reading -------------------------------------------------------------------------------------------------

    def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        """Give every recorded step's status as one linearizable snapshot; empty for an unknown run.

        Costs one read for up to 100 steps, a few for thousands.
        """
        return self._run(steps.statuses(self._ctx, run_id))

    def get_run_status(self, run_id: RunId) -> str | None:
        """Give the run's status, "Running" to "TimedOut"; None for an unknown run. Costs one read."""
        return self._run(runs.run_status(self._ctx, run_id))

    def get_run(self, run_id: RunId) -> RunRecord | None:
        """Give a run with its steps and all their attempts, as of one revision; None for an unknown run."""
        return self._run(runs.get_run(self._ctx, run_id))

    def get_active_runs(self) -> Sequence[RunRecord]:
        """Give the runs that are Running, newest first, without steps. Costs reads of the active runs alone."""
        return self._run(runs.active_runs(self._ctx))

    def get_runs(self) -> Sequence[RunRecord]:
        """Give all runs, newest first, without steps. Costs a look at every key: for operators, not for workers."""
        return self._run(runs.list_runs(self._ctx))

    def orphaned_steps(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are Running without a claim that is held. Costs two reads for up to 100 steps."""
        return self._run(again.orphaned_steps(self._ctx, run_id))

    def get_run_control(self, run_id: RunId) -> RunControl | None:
        """Tell what was asked of a run: cancellation, time-out, limits; None if nothing was. Costs one read."""
        return self._run(control.get_control(self._ctx, run_id))

    def find_run_by_idempotency_key(self, flow_id: RunId, trigger_key: str, idempotency_key: str) -> str | None:
        """Tell which run a key stands for. Costs one read."""
        return self._run(control.find_key(self._ctx, flow_id, trigger_key, idempotency_key))

    def get_dispatched_step_keys(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are in the dispatch ledger. Costs one read for up to 100 entries."""
        return self._run(runs.dispatched_step_keys(self._ctx, run_id))
