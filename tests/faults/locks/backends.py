"""The servers behind the locks, and what each of them holds, read past every client that is judged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import grpc
from etcd3.etcdrpc import KVStub, RangeRequest

from faults.locks.actor import Actor
from faults.locks.environments import CannotRunError
from servers import eventually
from stepclaim.embedded import EmbeddedEtcd, free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HOST = "127.0.0.1"


class Backend(Protocol):
    """A running server."""

    version: str
    port: int

    def holders(self, name: str) -> list[str]:
        """Name who stands in the lock's queue by what they wrote there, the holder first; empty if it is free."""

    def value(self, name: str) -> str | None:
        """Read the protected value."""

    def leases(self) -> set[str]:
        """Name the leases or sessions that live."""


class Etcd:
    """etcd, by ranges over a channel of the judge's own, and by `etcdctl`."""

    def __init__(self, server: EmbeddedEtcd, channel: grpc.Channel) -> None:
        self.version = f"etcd {server.version}"
        self.port = int(server.endpoint.rpartition(":")[2])
        self._server, self._kv = server, KVStub(channel)

    def _range(self, key: str, *, prefix: bool = False) -> list[Any]:
        first = key.encode()
        end = first[:-1] + bytes([first[-1] + 1]) if prefix else b""
        return list(self._kv.Range(RangeRequest(key=first, range_end=end), timeout=10).kvs)

    def holders(self, name: str) -> list[str]:
        """Read the lock's key, or the step's claim as our store writes it, which counts while it is held."""
        locks = [each.value.hex() for each in self._range(f"/locks/{name}")]
        claims = self._range(f"/stepclaim/runs/{name}/claims/", prefix=True)
        held = [each for each in claims if json.loads(each.value)["state"] == "held"]
        return locks + [f"token {each.create_revision}" for each in held]

    def value(self, name: str) -> str | None:
        """Read the key, or the step's output."""
        for each in self._range(f"/stepclaim/runs/{name}/payloads/", prefix=True):
            return str(json.loads(json.loads(each.value)["output"]))
        for each in self._range(f"/values/{name}"):
            return str(each.value.decode())
        return None

    def leases(self) -> set[str]:
        """List the leases."""
        found = json.loads(self._server.etcdctl("lease", "list", "-w=json")).get("leases") or []
        return {f"{each['id']:x}" for each in found}


class Redis:
    """Redis, as `redis-cli` sees it."""

    def __init__(self, cli: str, port: int, version: str) -> None:
        self._cli, self.port, self.version = cli, port, f"redis {version}"

    def _get(self, key: str) -> str | None:
        command = [self._cli, "-h", _HOST, "-p", str(self.port), "--json", "GET", key]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        found: str | None = json.loads(done.stdout)
        return found

    def holders(self, name: str) -> list[str]:
        """Read the lock's key."""
        found = self._get(f"locks:{name}")
        return [] if found is None else [found]

    def value(self, name: str) -> str | None:
        """Read the key."""
        return self._get(f"values:{name}")

    def leases(self) -> set[str]:
        """Give none: a key's time to live is its own."""
        return set()


class ZooKeeper:
    """ZooKeeper, as a client of the judge's own and the word `dump` see it."""

    def __init__(self, port: int, version: str, reader: Actor) -> None:
        self.port, self.version, self._reader = port, f"ZooKeeper {version}", reader
        asked = reader.ask("connect", host=_HOST, port=port, ttl=60, timeout=1.0)
        assert asked.yes, asked

    def _read(self, do: str, name: str) -> Any:
        answer = self._reader.ask(do, name=name)
        assert answer.yes, answer
        return answer.value

    def holders(self, name: str) -> list[str]:
        """List the lock's children by their sequence."""
        return list(self._read("children", name))

    def value(self, name: str) -> str | None:
        """Read the node."""
        return self._read("read", name) or None

    def leases(self) -> set[str]:
        """List the sessions."""
        told = _four_letters(self.port, "dump").partition("ephemeral nodes dump")[0]
        return set(re.findall(r"^\t(0x[0-9a-f]+)$", told, re.MULTILINE))


@contextlib.contextmanager
def run_etcd() -> Iterator[Etcd]:
    """Run the etcd that the tests run on."""
    with EmbeddedEtcd() as server, grpc.insecure_channel(server.endpoint) as channel:
        yield Etcd(server, channel)


@contextlib.contextmanager
def run_redis(folder: Path) -> Iterator[Redis]:
    """Run Debian's Redis in memory only."""
    server, cli = _on_path("redis-server", "redis-server"), _on_path("redis-cli", "redis-tools")
    version = subprocess.run([server, "--version"], check=True, capture_output=True, text=True).stdout
    (port,) = free_ports(1)
    command = [server, "--port", str(port), "--bind", _HOST, "--save", "", "--appendonly", "no", "--dir", str(folder)]
    found = re.search(r"v=(\S+)", version)
    with _running(command, folder):
        redis = Redis(cli, port, found[1] if found else "")
        eventually(lambda: _connects(port), 10)
        yield redis


@contextlib.contextmanager
def run_zookeeper(folder: Path, python: Path) -> Iterator[ZooKeeper]:
    """Run Debian's ZooKeeper alone, with ticks of half a second: sessions of 1 s and longer."""
    java = _on_path("java", "default-jre-headless")
    jars = [Path("/usr/share/java/zookeeper.jar"), *Path("/usr/share/zookeeper").glob("*.jar")]
    found = [jar for jar in jars if jar.exists()]
    if not found:
        raise CannotRunError("no zookeeper.jar in /usr/share/java or /usr/share/zookeeper: Debian's package zookeeper")
    (port,) = free_ports(1)
    settings = {
        "tickTime": 500, "minSessionTimeout": 1000, "maxSessionTimeout": 60000, "dataDir": folder / "data",
        "clientPort": port, "clientPortAddress": _HOST, "admin.enableServer": "false",
        "4lw.commands.whitelist": "ruok,dump,srvr",
    }  # fmt: skip
    path = folder / "zoo.cfg"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
    command = [java, "-Xmx128m", "-cp", os.pathsep.join(map(str, found)), main, str(path)]
    with _running(command, folder) as log:
        eventually(lambda: _four_letters(port, "ruok") == "imok", 30, interval=0.2)
        version = eventually(lambda: re.search(r"version: ([\d.]+)", _four_letters(port, "srvr")), 30, interval=0.2)
        assert version is not None
        with Actor(python, ["with_kazoo"], log) as reader:
            yield ZooKeeper(port, version[1], reader)


def _on_path(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise CannotRunError(f"no {program} on PATH: Debian's package {package}")
    return found


@contextlib.contextmanager
def _running(command: list[str], folder: Path) -> Iterator[IO[bytes]]:
    """Run a server that ends when we do, however that is: a shell waits for our end of its pipe to close."""
    watched = ["/bin/sh", "-c", '"$@" </dev/null & read -r _; kill $!; wait', "sh", *command]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(watched, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        assert process.stdin is not None
        try:
            yield log
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((_HOST, port), 1):
        return True
    return False


def _four_letters(port: int, word: str) -> str:
    """Ask ZooKeeper one of its four-letter words; empty if nobody is there."""
    try:
        with socket.create_connection((_HOST, port), 2) as asked:
            asked.sendall(word.encode())
            read: Callable[[], bytes] = lambda: asked.recv(1 << 16)  # noqa: E731
            return b"".join(iter(read, b"")).decode()
    except OSError:
        return ""
