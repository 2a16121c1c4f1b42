"""After a crash: find what it left behind in the active runs, and, on request, put it right.

Found are steps that are Running though nobody holds them, dispatches that were recorded and never started, and, given
the engine's `plan`, steps that are ready but not in the ledger, steps that can't be reached any more, and runs whose
every step is final but that were never completed. A parked Pending step, a step that lives on a worker, and a step
whose prerequisites are not met are never touched. Any number of recoveries may run at once: each finding is mended,
and dispatched, by one of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepclaim._core.recovering import recover_run
from stepclaim.models import Finding, FindingKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from stepclaim.async_run_store import AsyncRunStore
    from stepclaim.models import NextSteps, RunRecord, StepStatus
    from stepclaim.run_store import RunStore

    Plan = Callable[[RunRecord, Mapping[str, StepStatus]], NextSteps]

_DISPATCHED = (FindingKind.ORPHANED_STEP, FindingKind.LOST_DISPATCH, FindingKind.UNDISPATCHED_STEP)


def recover(
    store: RunStore,
    *,
    plan: Plan | None = None,
    dispatch: Callable[[str, str], None] | None = None,
    mend: bool = False,
    grace: float = 60.0,
) -> list[Finding]:
    """Look through all active runs and report what a crash left; with `mend`, put it right.

    `plan` tells what a run's graph says of its statuses. `dispatch` is called with run id and step key for each step
    whose entry in the ledger this call made anew. `grace`: seconds for which a dispatch may be under way.
    Costs three reads a run, and one transaction for each thing that is mended.
    """
    found: list[Finding] = []
    for run in store.get_active_runs():
        for finding in store._run(recover_run(store._ctx, run, plan, mend=mend, grace=grace)):  # noqa: SLF001
            found.append(finding)
            if dispatch is not None and _to_dispatch(finding):
                dispatch(finding.run_id, finding.step_key or "")
    return found


async def recover_async(
    store: AsyncRunStore,
    *,
    plan: Plan | None = None,
    dispatch: Callable[[str, str], Awaitable[None]] | None = None,
    mend: bool = False,
    grace: float = 60.0,
) -> list[Finding]:
    """Do the same as `recover` on the asyncio face; `dispatch` is awaited."""
    found: list[Finding] = []
    for run in await store.get_active_runs():
        for finding in await store._run(recover_run(store._ctx, run, plan, mend=mend, grace=grace)):  # noqa: SLF001
            found.append(finding)
            if dispatch is not None and _to_dispatch(finding):
                await dispatch(finding.run_id, finding.step_key or "")
    return found


def _to_dispatch(finding: Finding) -> bool:
    return finding.mended and finding.kind in _DISPATCHED
