"""Everything a store can do, for asyncio: the same methods as for threads, and their docstrings."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core import again, claims, control, finishing, retention, runs, steps
from stepclaim._core.ops import Compacted
from stepclaim._core.watching import Cursor
from stepclaim.abc import AsyncFlowRunRuntimeStore, RunId
from stepclaim.body import ActiveStep
from stepclaim.errors import ClaimLostError, DeadlineExceededError
from stepclaim.identity import cut, seconds
from stepclaim.models import StepStatus
from stepclaim.run_store import RunStore

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Coroutine,
        Iterable,
        Mapping,
        Sequence,
    )
    from datetime import datetime

    from stepclaim._core.context import Context
    from stepclaim._core.ops import Batch, Program
    from stepclaim.events import RunEvent
    from stepclaim.models import ClaimInfo, RunControl, RunRecord, RunStatus, StepClaim

R = TypeVar("R")


class AsyncRunStore(AsyncFlowRunRuntimeStore):
    """Everything a store can do, whatever it stands on."""

    _ctx: Context

    async def _run(self, program: Program[R], timeout: float | None = None) -> R:
        raise NotImplementedError

    def _run_later(self, program: Callable[[], Program[Any]]) -> None:
        raise NotImplementedError

    def _watch_claim(self, claim: StepClaim, lost: Callable[[], None]) -> Callable[[], None]:
        raise NotImplementedError

    def _batches(self, prefix: bytes, start: int, deadline: float | None) -> AsyncGenerator[Batch]:
        raise NotImplementedError

    # --- claims --------------------------------------------------------------------------------------------------

    async def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        return await self._run(claims.try_claim(self._ctx, run_id, step_key))

    async def claim_step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> StepClaim | None:
        return await self._run(claims.claim_step(self._ctx, run_id, step_key, step_type, input_json, job_id))

    async def claim_steps(self, run_id: RunId, step_keys: Iterable[str]) -> Mapping[str, StepClaim]:
        return await self._run(claims.claim_steps(self._ctx, run_id, step_keys))

    async def wait_for_step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        timeout: float,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> StepClaim:
        return await self._run(
            claims.wait_for_step(self._ctx, run_id, step_key, step_type, input_json, job_id), seconds(timeout)
        )

    async def release_step_claim(self, run_id: RunId, step_key: str) -> None:
        await self._run(claims.release_step(self._ctx, run_id, step_key))

    async def release_claim(self, claim: StepClaim) -> bool:
        return await self._run(claims.release_claim(self._ctx, claim))

    async def holds(self, claim: StepClaim) -> bool:
        return await self._run(claims.holds(self._ctx, claim))

    async def get_claim(self, run_id: RunId, step_key: str) -> ClaimInfo | None:
        return await self._run(claims.get_claim(self._ctx, run_id, step_key))

    async def get_claims(self, run_id: RunId | None = None) -> Sequence[ClaimInfo]:
        return await self._run(claims.list_claims(self._ctx, run_id))

    async def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        return await self._run(claims.claimed_step_keys(self._ctx, run_id))

    # --- finishing -----------------------------------------------------------------------------------------------

    async def complete_step(
        self,
        claim: StepClaim,
        status: StepStatus | str,
        *,
        output_json: str | None = None,
        error: str | None = None,
        dispatch: Iterable[str] = (),
    ) -> frozenset[str]:
        return await self._run(finishing.complete(self._ctx, claim, status, output_json, error, dispatch))

    @asynccontextmanager
    async def step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
        wait: float | None = None,
    ) -> AsyncIterator[ActiveStep | None]:
        if wait is None:
            claim = await self.claim_step(run_id, step_key, step_type=step_type, input_json=input_json, job_id=job_id)
        else:
            claim = await self.wait_for_step(
                run_id, step_key, timeout=wait, step_type=step_type, input_json=input_json, job_id=job_id
            )
        if claim is None:
            yield None
            return
        active = ActiveStep(claim, asyncio.Event())
        task = asyncio.current_task()
        assert task is not None
        running, cancelled_here = True, False

        def tell() -> None:
            nonlocal cancelled_here
            active.lost.set()
            if running:
                cancelled_here = True
                task.cancel()

        unwatch = self._watch_claim(claim, tell)
        try:
            yield active
        except BaseException as error:
            running = False
            by_loss = False
            if cancelled_here:
                cancelled_here = False
                by_loss = task.uncancel() == 0 and isinstance(error, asyncio.CancelledError)
            if isinstance(error, Exception):
                active.fail(cut(traceback.format_exc(), self._ctx.value_limit))
                await carried_through(self._end(active))
                raise
            active.defer("the body was interrupted")
            with contextlib.suppress(ClaimLostError):
                await carried_through(self._end(active))
            if by_loss:
                what = f"step {claim.step_key!r} of run {claim.run_id!r}"
                raise ClaimLostError(f"{claim.owner} no longer holds {what}: drop this result", claim) from error
            raise
        else:
            running = False
            await carried_through(self._end(active))
        finally:
            unwatch()
            if cancelled_here:
                task.uncancel()  # the body got over it: no one further out may take it for a cancellation

    async def _end(self, active: ActiveStep) -> None:
        claim = active.claim
        try:
            if active.status is StepStatus.PENDING:
                await self.defer_step(claim, reason=active.reason, dispatch=active.dispatch_again)
            else:
                await self.complete_step(claim, active.status, output_json=active.output_json, error=active.error)
        except ClaimLostError:
            active.lost.set()
            raise
        except BaseException:
            self._run_later(partial(claims.release_claim, self._ctx, claim))
            raise

    async def defer_step(
        self, claim: StepClaim, *, reason: str | None = None, dispatch: bool | datetime = False
    ) -> None:
        await self._run(finishing.defer(self._ctx, claim, reason, dispatch))

    # --- the engine's writers ------------------------------------------------------------------------------------

    async def start_run(
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
        return await self._run(
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

    async def complete_run(self, run_id: RunId, status: RunStatus | str) -> bool:
        return await self._run(runs.complete_run(self._ctx, run_id, status))

    async def record_step_start(
        self, run_id: RunId, step_key: str, step_type: str, input_json: str | None = None, job_id: str | None = None
    ) -> int:
        return await self._run(steps.record_start(self._ctx, run_id, step_key, step_type, input_json, job_id))

    async def record_step_complete(
        self,
        run_id: RunId,
        step_key: str,
        status: StepStatus | str,
        output_json: str | None = None,
        error: str | None = None,
    ) -> None:
        await self._run(finishing.record_complete(self._ctx, run_id, step_key, status, output_json, error))

    async def record_skipped_step(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None = None,
    ) -> None:
        await self._run(steps.skip(self._ctx, run_id, step_key, step_type, reason, evaluation_trace_json))

    async def record_skipped_step_with_trace(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None,
    ) -> None:
        await self._run(steps.skip(self._ctx, run_id, step_key, step_type, reason, evaluation_trace_json))

    async def retry_step(self, run_id: RunId, step_key: str) -> None:
        await self._run(again.retry_step(self._ctx, run_id, step_key))

    async def reset_cascade_skipped_dependents(self, run_id: RunId, step_keys: Iterable[str]) -> None:
        await self._run(again.reset_skipped(self._ctx, run_id, step_keys))

    async def configure_run(
        self,
        run_id: RunId,
        flow_id: RunId,
        trigger_key: str,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        await self._run(control.configure_run(self._ctx, run_id, flow_id, trigger_key, idempotency_key, timeout_at))

    async def request_cancel(self, run_id: RunId, reason: str | None = None) -> bool:
        return await self._run(control.request_cancel(self._ctx, run_id, reason))

    async def mark_timed_out(self, run_id: RunId, reason: str | None = None) -> bool:
        return await self._run(control.mark_timed_out(self._ctx, run_id, reason))

    async def try_register_idempotency_key(
        self, flow_id: RunId, trigger_key: str, idempotency_key: str, run_id: RunId
    ) -> bool:
        return await self._run(control.register_key(self._ctx, flow_id, trigger_key, idempotency_key, run_id))

    async def delete_run(self, run_id: RunId) -> bool:
        return await self._run(retention.delete_run(self._ctx, run_id))

    async def purge_runs(self, completed_before: datetime, *, limit: int | None = None) -> int:
        return await self._run(retention.purge_runs(self._ctx, completed_before, limit))

    async def try_record_dispatch(self, run_id: RunId, step_key: str) -> bool:
        return await self._run(runs.try_record_dispatch(self._ctx, run_id, step_key))

    async def annotate_dispatch(self, run_id: RunId, step_key: str, job_id: str) -> None:
        await self._run(runs.annotate_dispatch(self._ctx, run_id, step_key, job_id))

    async def release_dispatch(self, run_id: RunId, step_key: str) -> None:
        await self._run(runs.release_dispatch(self._ctx, run_id, step_key))

    # --- watching ------------------------------------------------------------------------------------------------

    async def watch_run(
        self, run_id: RunId, *, after_revision: int | None = None, timeout: float | None = None
    ) -> AsyncIterator[RunEvent]:
        deadline = None if timeout is None else time.monotonic() + seconds(timeout)
        cursor = Cursor(self._ctx, run_id, after_revision)
        while deadline is None or time.monotonic() < deadline:
            try:
                if cursor.must_list:
                    for event in await self._run(cursor.look()):
                        yield event
                async with contextlib.aclosing(self._batches(cursor.prefix, cursor.revision + 1, deadline)) as batches:
                    async for batch in batches:
                        for event in cursor.take(batch.events):
                            yield event
            except Compacted:
                cursor.compacted()
            except DeadlineExceededError:
                if deadline is None or time.monotonic() < deadline:
                    raise

    # --- reading -------------------------------------------------------------------------------------------------

    async def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        return await self._run(steps.statuses(self._ctx, run_id))

    async def get_run_status(self, run_id: RunId) -> str | None:
        return await self._run(runs.run_status(self._ctx, run_id))

    async def get_run(self, run_id: RunId) -> RunRecord | None:
        return await self._run(runs.get_run(self._ctx, run_id))

    async def get_active_runs(self) -> Sequence[RunRecord]:
        return await self._run(runs.active_runs(self._ctx))

    async def get_runs(self) -> Sequence[RunRecord]:
        return await self._run(runs.list_runs(self._ctx))

    async def orphaned_steps(self, run_id: RunId) -> frozenset[str]:
        return await self._run(again.orphaned_steps(self._ctx, run_id))

    async def get_run_control(self, run_id: RunId) -> RunControl | None:
        return await self._run(control.get_control(self._ctx, run_id))

    async def find_run_by_idempotency_key(self, flow_id: RunId, trigger_key: str, idempotency_key: str) -> str | None:
        return await self._run(control.find_key(self._ctx, flow_id, trigger_key, idempotency_key))

    async def get_dispatched_step_keys(self, run_id: RunId) -> frozenset[str]:
        return await self._run(runs.dispatched_step_keys(self._ctx, run_id))


async def carried_through(work: Coroutine[Any, Any, R] | asyncio.Future[R]) -> R:
    """Await something to its end, also when the task is cancelled meanwhile; only then let the cancellation go on."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()


def share_docstrings(face: type, twin: type) -> None:
    """Give each method of the twin the docstring that it has on the face for threads."""
    for name, member in vars(face).items():
        mirrored = vars(twin).get(name)
        if mirrored is None or name.startswith("_"):
            continue
        target = mirrored if isinstance(mirrored, property) else getattr(mirrored, "__func__", mirrored)
        target.__doc__ = getattr(member, "__func__", member).__doc__


share_docstrings(RunStore, AsyncRunStore)
