"""The peers' servers: found on this machine, started with commits that are durable."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.daemons import Daemon, NotStartedError, is_user
from stepclaim.embedded import free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Backend:
    """A server that runs."""

    version: str
    settings: str
    address: dict[str, Any]
    pids: list[int]


@contextlib.contextmanager
def redis() -> Iterator[Backend]:
    """Redis that syncs its log before it answers."""
    binary = find("redis-server")
    (port,) = free_ports(1)
    settings = {"appendonly": "yes", "appendfsync": "always", "auto-aof-rewrite-percentage": "0", "save": ""}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    daemon = Daemon(
        lambda folder: [binary, "--bind", HOST, "--port", str(port), "--dir", str(folder), *flags],
        ready=lambda _: _answers(port, b"PING\r\n", b"+PONG"),
    )
    with daemon:
        yield Backend(
            _version(binary, "--version", r"v=(\S+)"),
            "appendonly yes, appendfsync always, no snapshots",
            {"host": HOST, "port": port},
            [daemon.pid],
        )


@contextlib.contextmanager
def postgres() -> Iterator[Backend]:
    """PostgreSQL as it comes, which is with fsync and synchronous_commit, and with room for the connections."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name), reverse=True)
    binary = find("postgres", *folders)
    initdb = find("initdb", Path(binary).parent, *folders)
    (port,) = free_ports(1)
    user = next((name for name in ("postgres", "nobody") if is_user(name)), None)
    settings = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "max_connections": "300"}
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    daemon = Daemon(
        lambda folder: [binary, "-D", f"{folder}/data", "-h", HOST, "-p", str(port), "-k", str(folder), *flags],
        prepare=lambda folder: [[initdb, "-D", f"{folder}/data", "-U", "bench", "-A", "trust", "-E", "UTF8"]],
        ready=_postgres_is_ready,
        user=user,
        stop=signal.SIGINT,  # its fast way, which doesn't wait for clients
        environment={"LC_ALL": "C.UTF-8"},
    )
    with daemon:
        yield Backend(
            _version(binary, "--version", r"\) (\S+)"),
            "fsync on, synchronous_commit on, full_page_writes on, 128 MiB shared buffers (as it comes)",
            {"conninfo": f"host={HOST} port={port} user=bench dbname=postgres"},
            [daemon.pid],
        )


@contextlib.contextmanager
def zookeeper() -> Iterator[Backend]:
    """ZooKeeper that syncs its log before it answers, alone."""
    java = find("java")
    jar = next((path for path in (Path("/usr/share/java/zookeeper.jar"), *_zookeeper_jars()) if path.exists()), None)
    if jar is None:
        raise NotStartedError("no zookeeper.jar is in /usr/share/java nor beside a zkServer.sh on PATH")
    (port,) = free_ports(1)

    def command(folder: Path) -> list[str]:
        lines = (
            f"dataDir={folder}", f"clientPort={port}", f"clientPortAddress={HOST}", "tickTime=2000",
            "maxClientCnxns=0", "forceSync=yes", "admin.enableServer=false", "4lw.commands.whitelist=srvr",
        )  # fmt: skip
        (folder / "zoo.cfg").write_text("\n".join(lines) + "\n", encoding="utf-8")
        properties = ["-Dzookeeper.forceSync=yes", "-Dzookeeper.jmx.log4j.disable=true", "-Xmx1g"]
        classes = ":".join((str(jar), *(str(each) for each in sorted(jar.parent.glob("slf4j-simple.jar")))))
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        return [java, *properties, "-cp", classes, main, str(folder / "zoo.cfg")]

    daemon = Daemon(command, ready=lambda _: _answers(port, b"srvr", b"Zookeeper version"))
    with daemon:
        told = _ask(port, b"srvr")
        found = re.search(rb"version: ([\d.]+)", told)
        yield Backend(
            found[1].decode() if found else "unknown",
            "forceSync yes, one server, 1 GiB heap",
            {"hosts": f"{HOST}:{port}"},
            [daemon.pid],
        )


def _zookeeper_jars() -> Iterator[Path]:
    script = shutil.which("zkServer.sh")
    if script:
        yield from sorted((Path(script).resolve().parents[1] / "lib").glob("zookeeper-[0-9]*.jar"))


def find(name: str, *folders: Path) -> str:
    """Find a program on PATH or in folders; NotStartedError if it is in none."""
    found = shutil.which(name) or next(filter(None, (shutil.which(name, path=str(each)) for each in folders)), None)
    if found is None:
        raise NotStartedError(f"{name} is not installed here")
    return found


def _version(binary: str, flag: str, pattern: str) -> str:
    told = subprocess.run([binary, flag], check=True, capture_output=True, text=True, timeout=20).stdout
    found = re.search(pattern, told)
    return found[1] if found else "unknown"


def _answers(port: int, question: bytes, answer: bytes) -> bool:
    try:
        return _ask(port, question).startswith(answer)
    except OSError:
        return False


def _ask(port: int, question: bytes) -> bytes:
    with socket.create_connection((HOST, port), timeout=2) as connection:
        connection.sendall(question)
        return connection.recv(4096)


def _postgres_is_ready(folder: Path) -> bool:
    """Look at what it notes about itself; it answers before it takes connections."""
    try:
        return "ready" in (folder / "data" / "postmaster.pid").read_text(encoding="utf-8").split()
    except OSError:
        return False


BACKENDS: dict[str, Callable[[], contextlib.AbstractContextManager[Backend]]] = {
    "redis": redis,
    "postgres": postgres,
    "zookeeper": zookeeper,
}
