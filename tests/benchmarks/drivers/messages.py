"""Messages between the workers of one process, each delivered twice, and the F1 flow that they carry forward."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

F1 = {"a": (), **{f"b{number}": ("a",) for number in range(8)}, "join": tuple(f"b{number}" for number in range(8))}
"""Each step and what it comes after."""

COPIES = 2
TRIES = 3

Message = tuple[str, str | None]
"""A run and a step of it; without a step the run is to be started."""


class Messages:
    """A queue that delivers at least once, and knows when all is over."""

    def __init__(self, handle: Callable[[str, str | None], None]) -> None:
        self._handle = handle
        self._queue: queue.SimpleQueue[tuple[Message, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = 0
        self._over = threading.Event()
        self.published = 0
        self.failed: list[str] = []
        """What was raised by deliveries; they came again, up to three times."""

    def publish(self, run: str, step: str | None) -> None:
        """Send a step's message, to be delivered twice, or a run's, which is delivered once."""
        copies = 1 if step is None else COPIES
        with self._lock:
            self._left += copies
            self.published += step is not None
        for _ in range(copies):
            self._queue.put(((run, step), 1))

    def work_off(self, runs: Sequence[str], workers: int) -> float:
        """Start the runs, have so many threads handle all that comes of it, and give the seconds it took."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        began = time.perf_counter()
        for run in runs:
            self.publish(run, None)
        for thread in threads:
            thread.start()
        self._over.wait(300)
        took = time.perf_counter() - began
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()
        return took

    def _work(self) -> None:
        while (delivery := self._queue.get()) is not None:
            message, tried = delivery
            try:
                self._handle(*message)
            except Exception as error:  # noqa: BLE001 - told, and the message comes again
                self.failed.append(f"{type(error).__name__}: {error}")
                if tried < TRIES:
                    self._queue.put((message, tried + 1))
                    continue
            with self._lock:
                self._left -= 1
                if not self._left:
                    self._over.set()


def ready(statuses: dict[str, str]) -> list[str]:
    """Name the steps whose turn it is."""
    done = {step for step, status in statuses.items() if status == "Succeeded"}
    return [step for step, after in F1.items() if step not in statuses and done.issuperset(after)]
