"""The workers of one round: started in two groups, killed, stopped, replaced, asked to end, and always ended."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from faults.cluster import GROUPS, Cluster
from faults.history import Event, merge
from faults.worker import Orders

_WORKER = Path(__file__).with_name("worker.py")
_WRITES = frozenset(
    {"claim_step", "try_claim_step", "complete_step", "release_claim", "defer_step", "try_record_dispatch"}
)


@dataclass
class Worker:
    """One worker process."""

    name: str
    group: str
    process: subprocess.Popen[str]
    path: Path
    words: "queue.Queue[dict[str, Any]]" = field(default_factory=queue.Queue)
    stops: list[tuple[int, int]] = field(default_factory=list)
    """When it was stopped and continued, in nanoseconds."""
    alive: bool = True
    _stopped_at: int = 0

    def say(self, word: str) -> None:
        """Tell it what to do; one that is dead hears nothing."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()

    def hears(self, word: str, timeout: float) -> bool:
        """Wait until it says a word."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                if word in self.words.get(timeout=min(left, 0.2)):
                    return True
            if self.process.poll() is not None and self.words.empty():
                return False
        return False

    def kill(self) -> None:
        """End it as a crash would."""
        self.alive = False
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Stop it in its tracks."""
        self._stopped_at = time.monotonic_ns()
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)
        if self._stopped_at:
            self.stops.append((self._stopped_at, time.monotonic_ns()))
            self._stopped_at = 0


class Fleet:
    """A context manager around all workers of one round."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        workload: str,
        seed: int,
        *,
        size: int = 4,
        lease_ttl: float | None = 3.0,
        timeout: float = 5.0,
        bug: str = "",
    ) -> None:
        self._cluster, self._folder, self._workload, self._seed = cluster, folder, workload, seed
        self._size, self.lease_ttl, self.timeout, self._bug = size, lease_ttl, timeout, bug
        self._epoch_zero = time.monotonic()
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        """Start them all, half of them in each group and on each face, and wait until they work."""
        try:
            for number in range(self._size):
                self.start(GROUPS[number % 2], "threads" if number // 2 % 2 == 0 else "asyncio")
            for worker in self.workers:
                assert worker.hears("ready", 30), f"{worker.name} did not begin:\n{self.errors(worker)}"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what is left."""
        self._end()

    def start(self, group: str, face: str) -> Worker:
        """Start one more, without waiting."""
        name = f"w{len(self.workers)}-{face}-{group}"
        orders = Orders(
            name=name,
            face=face,
            workload=self._workload,
            path=str(self._folder / f"{name}.jsonl"),
            connection=self._cluster.connection(group),
            seed=self._seed,
            epoch_zero=self._epoch_zero,
            lease_ttl=self.lease_ttl,
            timeout=self.timeout,
        )
        command = [*self._cluster.launcher(group), sys.executable, str(_WORKER), orders.text()]
        with (self._folder / f"{name}.err").open("w", encoding="utf-8") as err:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=os.environ | {"STEPCLAIM_FAULTS_BUG": self._bug},
                start_new_session=True,  # a Ctrl-C is the runner's business
            )
        worker = Worker(name, group, process, Path(orders.path))
        self.workers.append(worker)
        threading.Thread(target=_listen, args=(worker,), daemon=True).start()
        return worker

    @property
    def alive(self) -> list[Worker]:
        """Those that were not killed."""
        return [each for each in self.workers if each.alive]

    def replace(self, worker: Worker) -> Worker:
        """Start another one in a killed one's place."""
        return self.start(worker.group, "threads" if "threads" in worker.name else "asyncio")

    def stop(self, timeout: float) -> list[str]:
        """Have all tasks end; return what did not happen in time."""
        for worker in self.alive:
            worker.say("stop")
        return [
            f"{worker.name} did not come to an end within {timeout:.0f} s of being told to"
            for worker in self.alive
            if not worker.hears("stopped", timeout)
        ]

    def close(self, timeout: float) -> list[str]:
        """Have all stores closed and the processes ended; return what went wrong."""
        wrong = []
        for worker in self.alive:
            worker.say("close")
        for worker in self.alive:
            try:
                code = worker.process.wait(timeout)
            except subprocess.TimeoutExpired:
                wrong.append(f"{worker.name} did not close within {timeout:.0f} s")
                continue
            if code:
                wrong.append(f"{worker.name} ended with {code}: {self.errors(worker)[-600:]}")
        return wrong

    def errors(self, worker: Worker) -> str:
        """Read what a worker said on its error output."""
        return (self._folder / f"{worker.name}.err").read_text(encoding="utf-8", errors="replace")

    def events(self) -> list[Event]:
        """Put all records together. The time in which a process was stopped counts for no deadline."""
        events = merge([worker.path for worker in self.workers])
        stops = {worker.name: worker.stops for worker in self.workers if worker.stops}
        for event in events:
            for stopped, continued in stops.get(event.process, ()):
                end = event.returned if event.returned is not None else continued
                if event.timeout is not None and event.invoked < continued and stopped < end:
                    event.timeout += (continued - max(stopped, event.invoked)) / 1e9
        return events

    def first_success(self, since: int) -> dict[str, int | None]:
        """Tell for each living worker when the first write that it began after a moment was answered."""
        return {worker.name: _first_success(worker.path, since) for worker in self.alive}

    def _end(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
        for worker in self.workers:
            worker.process.wait()
            for pipe in (worker.process.stdin, worker.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _listen(worker: Worker) -> None:
    assert worker.process.stdout is not None
    with contextlib.suppress(ValueError, OSError):
        for line in worker.process.stdout:
            worker.words.put(json.loads(line))


def _first_success(path: Path, since: int) -> int | None:
    begun: set[str] = set()
    for line in _lines(path):
        if line.get("invoked", 0) >= since and line.get("call") in _WRITES:
            begun.add(line["op"])
        elif line["op"] in begun and line.get("outcome") in {"ok", "refused", "lost"}:
            return int(line["returned"])
    return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(text)
