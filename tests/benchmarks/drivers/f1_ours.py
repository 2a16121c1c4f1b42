"""F1 on stepclaim: the package's own engine, 16 threads on one store; or the same calls by 16 tasks."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.drivers.cpu import cpu_seconds
from benchmarks.drivers.messages import COPIES, F1, Messages
from benchmarks.drivers.serving import serve
from stepclaim import AsyncEtcdRunStore, EtcdRunStore, RunStatus, StepStatus
from stepclaim.cli.engine import Engine
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stepclaim import StepClaim

TTL = 600.0
PREFIX = "/bench"
OUTPUT = '{"ok": true}'
_runner = asyncio.Runner()


def threads(endpoint: str, runs: list[str], workers: int, server_pids: list[int]) -> dict[str, Any]:
    """Work the runs off with the package's engine."""
    flow = Flow.default()
    bodies: list[str] = []

    def body(claim: StepClaim) -> str:
        bodies.append(claim.step_key)
        return OUTPUT

    def handle(run: str, step: str | None) -> None:
        if step is None:
            engine.trigger(run)
        else:
            engine.handle(run, step)

    messages = Messages(handle)
    with EtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:
        engine = Engine(store, flow, body, messages.publish)
        client, server = time.process_time(), cpu_seconds(server_pids)
        took = messages.work_off(runs, workers)
        client, server = time.process_time() - client, cpu_seconds(server_pids) - server
        finished = sum(_is_finished(store.get_run_status(run), store.get_step_statuses(run)) for run in runs)
    return _told(took, finished, len(bodies), client, server, messages.failed)


def tasks(endpoint: str, runs: list[str], workers: int, server_pids: list[int]) -> dict[str, Any]:
    """Work the runs off with the engine's calls on asyncio."""
    return _runner.run(_tasks(endpoint, runs, workers, server_pids))


async def _tasks(endpoint: str, runs: list[str], workers: int, server_pids: list[int]) -> dict[str, Any]:
    async with AsyncEtcdRunStore.connect(endpoint, prefix=PREFIX, lease_ttl=TTL) as store:
        flow = AsyncFlow(store)
        client, server = time.process_time(), cpu_seconds(server_pids)
        began = time.perf_counter()
        for run in runs:
            flow.queue.put_nowait((run, None))
        working = [asyncio.create_task(flow.work()) for _ in range(workers)]
        joining = asyncio.create_task(flow.queue.join())
        done, _ = await asyncio.wait([joining, *working], return_when=asyncio.FIRST_COMPLETED, timeout=300)
        took = time.perf_counter() - began
        client, server = time.process_time() - client, cpu_seconds(server_pids) - server
        for task in done - {joining}:
            task.result()  # a worker ends only by an error
        for task in working:
            task.cancel()
        finished = 0
        for run in runs:
            finished += _is_finished(await store.get_run_status(run), await store.get_step_statuses(run))
    return _told(took, finished, flow.bodies, client, server, [])


class AsyncFlow:
    """What the package's engine does with a message, in the same order, on asyncio."""

    def __init__(self, store: AsyncEtcdRunStore) -> None:
        self._store = store
        self._flow = Flow.default()
        self.queue: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        self.bodies = 0

    async def work(self) -> None:
        """Handle messages for ever."""
        while True:
            run, step = await self.queue.get()
            if step is None:
                await self._store.start_run(self._flow.name, self._flow.name, run, "manual")
                await self._go_on(run)
            else:
                await self._handle(run, step)
            self.queue.task_done()

    async def _handle(self, run: str, step: str) -> None:
        store = self._store
        control = await store.get_run_control(run)
        if control is not None and control.cancel_requested:
            return
        claim = await store.claim_step(run, step, step_type="Demo")
        if claim is None:
            statuses = await store.get_step_statuses(run)
            if step in statuses and statuses[step].is_final:
                await self._go_on(run, statuses)
            return
        self.bodies += 1
        known = await store.get_step_statuses(run)
        successors = self._flow.successors(step, StepStatus.SUCCEEDED, known)
        new = await store.complete_step(claim, "Succeeded", output_json=OUTPUT, dispatch=successors)
        for key in successors:
            if key in new:
                self._publish(run, key)
        await self._go_on(run, sent=successors)

    async def _go_on(
        self, run: str, statuses: Mapping[str, StepStatus] | None = None, sent: tuple[str, ...] = ()
    ) -> None:
        store = self._store
        plan = self._flow.plan(await store.get_step_statuses(run) if statuses is None else statuses)
        due = [key for key in plan.ready if key not in sent]
        if len(due) > 1:
            dispatched = await store.get_dispatched_step_keys(run)
            due = [key for key in due if key not in dispatched]
        for key in due:
            if await store.try_record_dispatch(run, key):
                self._publish(run, key)
        if plan.status is not None:
            await store.complete_run(run, plan.status)

    def _publish(self, run: str, step: str) -> None:
        for _ in range(COPIES):
            self.queue.put_nowait((run, step))


def _is_finished(status: str | None, statuses: Mapping[str, StepStatus]) -> bool:
    return status == RunStatus.SUCCEEDED and statuses == dict.fromkeys(F1, StepStatus.SUCCEEDED)


def _told(took: float, finished: int, bodies: int, client: float, server: float, failed: list[str]) -> dict[str, Any]:
    steps = max(1, finished * len(F1))
    return {
        "seconds": took,
        "steps_s": finished * len(F1) / took,
        "finished_runs": finished,
        "bodies": bodies,
        "failed_deliveries": len(failed),
        "client_us": client / steps * 1e6,
        "server_us": server / steps * 1e6,
        "failures": sorted(set(failed))[:3],
    }


if __name__ == "__main__":
    serve({"threads": threads, "tasks": tasks})
