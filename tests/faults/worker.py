"""A worker process: does a workload with several tasks on one face, and records each call, until it is told to stop.

Its one argument is a JSON object (`Orders`). It says {"ready": true}, then hears `stop`: its tasks end and what they
hold stays held; and `close`: it closes its stores and ends. It also ends when nobody is there to tell it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.bugs import switch_on
from faults.history import Outcome, Recorder, judge_error
from faults.workloads import OWN_STORES, WORKLOADS, Do, Reopen, Rest, Task, Told
from stepclaim import AsyncEtcdRunStore, EtcdRunStore, StepClaim, StepClaimError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim.session import Session

_TICK = 0.05


@dataclass
class Orders:
    """What a worker is to do."""

    name: str
    face: str
    workload: str
    path: str
    """The file that it records into."""
    connection: dict[str, Any]
    seed: int
    epoch_zero: float
    tasks: int = 4
    lease_ttl: float | None = 3.0
    timeout: float = 5.0
    epoch: float = 1.5
    """Seconds that each epoch lasts."""
    extra: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Write them as the worker's argument."""
        return json.dumps(asdict(self))


class Work:
    """What both faces share: tasks, recording, and what came of a call."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.stop = threading.Event()
        self.recorder = Recorder(orders.path, orders.name)

    def tasks(self) -> list[Task]:
        """Make the tasks."""
        orders = self.orders

        def epoch() -> int:
            return int((time.monotonic() - orders.epoch_zero) / orders.epoch)

        return [
            Task(
                f"{orders.name}.{number}",
                number,
                Random(f"{orders.seed} {orders.name} {number}"),  # noqa: S311  # what is done, nothing secret
                epoch,
                self.stop.is_set,
                orders.lease_ttl or 3.0,
            )
            for number in range(orders.tasks)
        ]

    def settings(self, owner: str) -> dict[str, Any]:
        """Give what a store is opened with."""
        orders = self.orders
        return orders.connection | {"owner": owner, "lease_ttl": orders.lease_ttl, "timeout": orders.timeout}

    def begin(self, do: Do, owner: str) -> str:
        """Record that a call begins."""
        args: dict[str, Any] = {"run": do.run, "step": do.step}
        if do.claim is not None:
            args |= {"token": do.claim.fencing_token, "attempt": do.claim.attempt}
        names = {"output_json": "output"}
        args |= {names.get(name, name): value for name, value in do.options.items()}
        return self.recorder.invoke(do.call, timeout=do.timeout or self.orders.timeout, owner=owner, **args)

    def end(self, op: str, do: Do, value: Any) -> Told:
        """Record what a call gave."""
        outcome = Outcome.REFUSED if _is_refusal(do.call, value) else Outcome.OK
        self.recorder.returned(op, outcome, value=_plain(value))
        return Told(outcome, value)

    def fail(self, op: str, error: StepClaimError) -> Told:
        """Record what a call raised."""
        self.recorder.failed(op, error)
        return Told(judge_error(error)[0])

    def lost(self, session: Session) -> None:
        """Record that a session was told to be lost."""
        op = self.recorder.invoke("session_lost", owner=session.owner, session=session.session_id)
        self.recorder.returned(op, Outcome.OK)


_GIVE_A_BOOL = frozenset({"try_claim_step", "release_claim", "try_record_dispatch"})


def _is_refusal(call: str, value: Any) -> bool:
    return (call == "claim_step" and value is None) or (call in _GIVE_A_BOOL and value is False)


def _plain(value: Any) -> Any:
    """Write a result as JSON can hold it."""
    if isinstance(value, StepClaim):
        return {"token": value.fencing_token, "attempt": value.attempt, "lease": value.lease_id}
    if hasattr(value, "fencing_token"):
        return {"token": value.fencing_token, "state": str(value.state), "owner": value.owner}
    if isinstance(value, frozenset):
        return sorted(value)
    return value


def _arguments(do: Do) -> tuple[Any, ...]:
    if do.call == "complete_step":
        return do.claim, do.options["status"]
    if do.claim is not None:
        return (do.claim,)
    return (do.run, do.step) if do.step else (do.run,)


def _options(do: Do) -> dict[str, Any]:
    options = {name: value for name, value in do.options.items() if name != "status"}
    return options | ({"timeout": do.timeout} if do.timeout is not None else {})


def _told(event: Any) -> list[Any]:
    """Write one event of a watch: its revision, its kind, and what it is about."""
    told = {name: getattr(event, name) for name in ("step_key", "status", "attempt", "owner") if hasattr(event, name)}
    return [event.revision, type(event).__name__, told]


# --- threads ---------------------------------------------------------------------------------------------------------


class Threads(Work):
    """Tasks as threads."""

    def run(self, ready: Callable[[], None]) -> None:
        """Work until stopped; then wait for the word to close."""
        tasks = self.tasks()
        own = self.orders.workload in OWN_STORES
        opened = [self._open(self.orders.name)] if not own else [self._open(task.name) for task in tasks]
        stores = opened if own else opened * len(tasks)
        holders: list[list[Any]] = [[store] for store in stores]
        threads = [
            threading.Thread(target=self._work, args=(task, holder))
            for task, holder in zip(tasks, holders, strict=True)
        ]
        for thread in threads:
            thread.start()
        ready()
        for thread in threads:
            thread.join()
        print(json.dumps({"stopped": True}), flush=True)
        closing.wait()
        for (store,) in {id(holder[0]): holder for holder in holders}.values():
            store.close()

    def _open(self, owner: str) -> EtcdRunStore:
        while True:
            op = self.recorder.invoke("connect", timeout=self.orders.timeout, owner=owner)
            try:
                store = EtcdRunStore.connect(**self.settings(owner))
            except StepClaimError as error:
                self.fail(op, error)
                if self.stop.wait(0.2):
                    sys.exit(f"stopped before a store could be opened: {error}")
            else:
                store.session.on_lost(self.lost)
                self.recorder.returned(op, Outcome.OK, value=store.session.session_id)
                return store

    def _work(self, task: Task, holder: list[EtcdRunStore]) -> None:
        program = WORKLOADS[self.orders.workload](task)
        told = Told(Outcome.OK)
        asked = next(program, None)
        while asked is not None and not self.stop.is_set():
            if isinstance(asked, Rest):
                self.stop.wait(asked.seconds)
            elif isinstance(asked, Reopen):
                holder[0].close()
                holder[0] = self._open(task.name)
            else:
                told = self._do(holder[0], asked)
            try:
                asked = program.send(told)
            except StopIteration:
                return

    def _do(self, store: EtcdRunStore, do: Do) -> Told:
        op = self.begin(do, store.session.owner)
        try:
            value = getattr(store, do.call)(*_arguments(do), **_options(do))
            if do.call == "watch_run":
                value = [_told(event) for event in value]
        except StepClaimError as error:
            return self.fail(op, error)
        return self.end(op, do, value)


# --- asyncio ---------------------------------------------------------------------------------------------------------


class Tasks(Work):
    """Tasks of one event loop."""

    async def run(self, ready: Callable[[], None]) -> None:
        """Work until stopped; then wait for the word to close."""
        tasks = self.tasks()
        own = self.orders.workload in OWN_STORES
        opened = [await self._open(self.orders.name)] if not own else [await self._open(task.name) for task in tasks]
        stores = opened if own else opened * len(tasks)
        holders: list[list[Any]] = [[store] for store in stores]
        ready()
        await asyncio.gather(*(self._work(task, holder) for task, holder in zip(tasks, holders, strict=True)))
        print(json.dumps({"stopped": True}), flush=True)
        await asyncio.to_thread(closing.wait)
        for (store,) in {id(holder[0]): holder for holder in holders}.values():
            await store.close()

    async def _open(self, owner: str) -> AsyncEtcdRunStore:
        while True:
            op = self.recorder.invoke("connect", timeout=self.orders.timeout, owner=owner)
            try:
                store = await AsyncEtcdRunStore.connect(**self.settings(owner))
            except StepClaimError as error:
                self.fail(op, error)
                await self._rest(0.2)
                if self.stop.is_set():
                    sys.exit(f"stopped before a store could be opened: {error}")
            else:
                store.session.on_lost(self.lost)
                self.recorder.returned(op, Outcome.OK, value=store.session.session_id)
                return store

    async def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.sleep(0)
        while not self.stop.is_set() and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110  # set by a thread
            await asyncio.sleep(min(left, _TICK))

    async def _work(self, task: Task, holder: list[AsyncEtcdRunStore]) -> None:
        program = WORKLOADS[self.orders.workload](task)
        told = Told(Outcome.OK)
        asked = next(program, None)
        while asked is not None and not self.stop.is_set():
            if isinstance(asked, Rest):
                await self._rest(asked.seconds)
            elif isinstance(asked, Reopen):
                await holder[0].close()
                holder[0] = await self._open(task.name)
            else:
                told = await self._do(holder[0], asked)
            try:
                asked = program.send(told)
            except StopIteration:
                return

    async def _do(self, store: AsyncEtcdRunStore, do: Do) -> Told:
        op = self.begin(do, store.session.owner)
        try:
            if do.call == "watch_run":
                value: Any = [_told(event) async for event in store.watch_run(*_arguments(do), **_options(do))]
            else:
                value = await getattr(store, do.call)(*_arguments(do), **_options(do))
        except StepClaimError as error:
            return self.fail(op, error)
        return self.end(op, do, value)


closing = threading.Event()


def _hear(work: Work) -> None:
    """Do what the runner says; without a runner, end at once."""
    for line in sys.stdin:
        if line.strip() == "stop":
            work.stop.set()
        elif line.strip() == "close":
            closing.set()
            return
    os._exit(3)


def main() -> None:
    """Run one worker."""
    orders = Orders(**json.loads(sys.argv[1]))
    switch_on(os.environ.get("STEPCLAIM_FAULTS_BUG", ""))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner ends its workers itself

    def ready() -> None:
        print(json.dumps({"ready": True}), flush=True)

    work = Threads(orders) if orders.face == "threads" else Tasks(orders)
    threading.Thread(target=_hear, args=(work,), daemon=True).start()
    if isinstance(work, Threads):
        work.run(ready)
    else:
        asyncio.run(work.run(ready))


if __name__ == "__main__":
    main()
