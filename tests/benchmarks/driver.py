"""The near end of a driver: starts its process, asks it, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

DRIVERS = Path(__file__).with_name("drivers")
PATIENCE = 120.0


class DriverError(Exception):
    """A driver failed, or said nothing for too long; the text holds what it said."""


class Driver:
    """One process that does what it is asked. Use as a context manager."""

    def __init__(self, script: str, *arguments: str, python: str = sys.executable) -> None:
        """Start it. It is out of Ctrl-C's reach, and ends when this process does, because its input ends then."""
        self.name = " ".join((script, *arguments))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process; has no name
        quiet = {name: value for name, value in os.environ.items() if not name.startswith(("STEPCLAIM_", "PYTHONDEV"))}
        self._process = subprocess.Popen(
            [python, str(DRIVERS / f"{script}.py"), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True,
            env=quiet | {"PYTHONWARNINGS": "ignore", "GRPC_VERBOSITY": "NONE"},
        )  # fmt: skip
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    def ask(self, do: str, *, patience: float = PATIENCE, **arguments: Any) -> Any:
        """Have something done, and give what came of it."""
        self.tell(do, **arguments)
        return self.answer(patience)

    def tell(self, do: str, **arguments: Any) -> None:
        """Have something done without waiting for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DriverError(f"{self.name} has ended: {self._said()}") from None

    def answer(self, patience: float = PATIENCE) -> Any:
        """Wait for the answer to what was asked last."""
        try:
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            raise DriverError(f"{self.name} said nothing for {patience:.0f} s: {self._said()}") from None
        if not line:
            raise DriverError(f"{self.name} has ended: {self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise DriverError(f"{self.name} failed: {answer['error']}")
        return answer["told"]

    def close(self) -> None:
        """End the process: by the end of its input, or by force."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put("")

    def _said(self) -> str:
        with contextlib.suppress(ValueError, OSError):
            self._errors.seek(0)
            return self._errors.read().decode(errors="replace")[-3000:].strip() or "without a word"
        return "without a word"

    def __enter__(self) -> Self:
        """Give it: it runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
