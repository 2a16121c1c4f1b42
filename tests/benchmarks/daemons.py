"""A server process that ends with this one, whatever ends it: by a watchdog that reads a pipe of ours."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

# The shell forks the watchdog and becomes the server, as in stepclaim.embedded. The kernel closes our end of the pipe
# however we die; both are of a session of their own, so that Ctrl-C reaches neither.
_WATCHED = """
signal=$1; folder=$2; shift 2
exec 3<&0
(
  read -r _ <&3
  kill -"$signal" $$
  for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 $$ || break; sleep 0.2; done
  kill -KILL $$
  rm -rf "$folder"
) 2>/dev/null &
exec "$@" 3<&- </dev/null
"""


class NotStartedError(Exception):
    """A server could not be started; the text says why."""


class Daemon:
    """A server in a folder of its own. Use as a context manager."""

    def __init__(
        self,
        command: Callable[[Path], Sequence[str]],
        *,
        prepare: Callable[[Path], Sequence[Sequence[str]]] = lambda _: (),
        ready: Callable[[Path], bool],
        user: str | None = None,
        stop: signal.Signals = signal.SIGTERM,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet. `user`: whom the server runs as where this process is root's."""
        self._command = command
        self._prepare = prepare
        self._ready = ready
        self._user = user if os.geteuid() == 0 else None
        self._stop = stop
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        """Start it and wait until it is ready; NotStartedError, with what it said, if it isn't within 40 seconds."""
        folder = self._folder = Path(tempfile.mkdtemp(prefix="stepclaim-bench-"))
        if self._user is not None:
            shutil.chown(folder, self._user)
        try:
            with (folder / "log").open("wb") as log:
                for command in self._prepare(folder):
                    subprocess.run(
                        command, check=True, stdout=log, stderr=log, user=self._user, cwd=folder, env=self._environment
                    )
                shell = ["/bin/sh", "-c", _WATCHED, "server", self._stop.name.removeprefix("SIG"), str(folder)]
                self._process = subprocess.Popen(
                    [*shell, *self._command(folder)], stdin=subprocess.PIPE, stdout=log, stderr=log, user=self._user,
                    cwd=folder, start_new_session=True, env=self._environment,
                )  # fmt: skip
            self._wait(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            said = self._said()
            self._end()
            raise NotStartedError(f"{error}; {said}") from error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it and remove its folder."""
        self._end()

    def _wait(self, folder: Path) -> None:
        deadline = time.monotonic() + 40
        assert self._process is not None
        while not self._ready(folder):
            if self._process.poll() is not None:
                raise NotStartedError(f"it ended at its start: {self._said()}")
            if time.monotonic() > deadline:
                raise NotStartedError(f"it was not ready within 40 s: {self._said()}")
            time.sleep(0.1)

    def _said(self) -> str:
        with contextlib.suppress(OSError):
            if self._folder is not None:
                return (self._folder / "log").read_text(encoding="utf-8", errors="replace")[-1500:].strip()
        return ""

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(self._stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def is_user(name: str) -> bool:
    """Tell whether the system has such a user."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
