"""A caller as a process: asked by lines of JSON, with a deadline for every answer; stopped, woken and killed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_TESTS = Path(__file__).parents[2]


@dataclass(frozen=True)
class Answer:
    """What a caller was told: a value, an error, or nothing in time."""

    value: Any = None
    error: str = ""
    message: str = ""
    hung: bool = False
    seconds: float = 0.0

    @property
    def yes(self) -> bool:
        """Told that it was done (a write says nothing but that)."""
        return not self.error and not self.hung and self.value is not False

    def __str__(self) -> str:
        """Say it in a word: yes, no, the error's name, or hung."""
        return "hung" if self.hung else self.error or ("yes" if self.yes else "no")


class Actor:
    """A context manager around one driver's process. One that hung or was killed answers nothing any more."""

    def __init__(self, python: Path, driver: Sequence[str], log: IO[bytes]) -> None:
        """Start it; `driver` is a module of `drivers` with its arguments."""
        module = f"faults.locks.drivers.{driver[0]}"
        self._process = subprocess.Popen(
            [python, "-m", module, *driver[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(_TESTS), "PYTHONWARNINGS": "ignore", "GRPC_VERBOSITY": "NONE"},
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._asked = 0.0

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def send(self, do: str, **arguments: Any) -> None:
        """Ask without waiting for the answer; also while it is stopped."""
        assert self._process.stdin is not None
        self._asked = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, limit: float) -> Answer:
        """Wait for the answer, so many seconds from now."""
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.kill()
            return Answer(hung=True, seconds=limit)
        taken = round(time.monotonic() - self._asked, 2)
        return Answer(**json.loads(line), seconds=taken) if line else Answer(error="ProcessEnded", seconds=taken)

    def ask(self, do: str, limit: float = 30.0, **arguments: Any) -> Answer:
        """Ask and wait."""
        self.send(do, **arguments)
        return self.hear(limit)

    def stop(self) -> None:
        """Stop it in its tracks."""
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        """Nothing to do: it runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.kill()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
