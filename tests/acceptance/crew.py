"""Workers as threads around one queue, each with a store and an engine of its own; every message comes twice."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING

from stepclaim import StepStatus
from stepclaim.cli.engine import Body, Engine, Handled, Pending
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from stepclaim import RunRecord, StepClaim
    from stepclaim.run_store import RunStore

    Open = Callable[[], RunStore]
    Hire = Callable[..., "Crew"]

ABC = Flow.from_json('{"name": "abc", "steps": {"a": [], "b": ["a"], "c": ["b"]}}')
OK, FAILED, SKIPPED = StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED
COPIES = 2


@dataclass(frozen=True)
class Message:
    """One delivery of a dispatched step."""

    run_id: str
    step_key: str


class Crew:
    """The queue and its workers; `settle` waits until nothing is left to deliver."""

    def __init__(self, stores: Sequence[RunStore], flow: Flow, body: Body | None = None, copies: int = COPIES) -> None:
        self.sent: list[Message] = []
        self.parked: list[tuple[Message, float]] = []
        self.ran: list[Message] = []
        self.handled: list[Handled] = []
        self.errors: list[BaseException] = []
        self._body = body
        self._copies = copies
        self._queue: Queue[Message | None] = Queue()
        self.engines = [Engine(store, flow, self._run, self.send, self._later) for store in stores]
        self._threads = [threading.Thread(target=self._work, args=(engine,)) for engine in self.engines]

    @property
    def engine(self) -> Engine:
        """The engine of the first worker, for what users ask for."""
        return self.engines[0]

    def send(self, run_id: str, step_key: str) -> None:
        """Take a dispatch."""
        message = Message(run_id, step_key)
        self.sent.append(message)
        for _ in range(self._copies):
            self._queue.put(message)

    def steps_sent(self, run_id: str) -> list[str]:
        """Name a run's steps in the order of their dispatch."""
        return [message.step_key for message in self.sent if message.run_id == run_id]

    def steps_ran(self, run_id: str) -> list[str]:
        """Name a run's steps in the order in which their bodies ran."""
        return [message.step_key for message in self.ran if message.run_id == run_id]

    def settle(self) -> None:
        """Wait until every message was handled, and all that came of it."""
        self._queue.join()
        if self.errors:
            raise self.errors[0]

    def _later(self, run_id: str, step_key: str, delay: float) -> None:
        self.parked.append((Message(run_id, step_key), delay))
        self.send(run_id, step_key)

    def _run(self, claim: StepClaim) -> str | Pending | None:
        self.ran.append(Message(claim.run_id, claim.step_key))
        return None if self._body is None else self._body(claim)

    def _work(self, engine: Engine) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self.handled.append(engine.handle(message.run_id, message.step_key))
            except BaseException as error:  # noqa: BLE001 - the test's thread raises it
                self.errors.append(error)
            finally:
                self._queue.task_done()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


def alone(store: RunStore, flow: Flow = ABC, body: Body = lambda _: None) -> tuple[Engine, list[str]]:
    """Give an engine without workers, and the steps that it dispatches."""
    sent: list[str] = []
    return Engine(store, flow, body, lambda _, step: sent.append(step)), sent


def read(crew: Crew, run_id: str) -> RunRecord:
    """Read a run that is there."""
    run: RunRecord | None = crew.engine.store.get_run(run_id)
    assert run is not None
    return run


def statuses(run: RunRecord) -> dict[str, StepStatus]:
    """Tell every step's status."""
    return {step.step_key: step.status for step in run.steps}


def reasons(run: RunRecord) -> dict[str, str | None]:
    """Tell why steps were skipped."""
    return {step.step_key: step.error for step in run.steps if step.status is SKIPPED}


def failing(times: dict[str, int]) -> Callable[[StepClaim], str]:
    """Make bodies of which the named ones fail so many times."""
    left = dict(times)

    def body(claim: StepClaim) -> str:
        if left.get(claim.step_key, 0) > 0:
            left[claim.step_key] -= 1
            raise RuntimeError("out of luck")
        return f'{{"attempt": {claim.attempt}}}'

    return body
