"""The StatefulSet's own arguments, given to three real members of etcd on this machine, and its own probes."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from stepclaim.embedded import find_etcd

from .documents import applied_files, load, pod_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .documents import Manifest

(STATEFULSET,) = (manifest for manifest in load(applied_files()) if manifest["kind"] == "StatefulSet")
(CONTAINER,) = pod_of(STATEFULSET)["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
DEADLINE = 30.0
HEALTHY = 200
PROBES_SINCE = (3, 5, 11)


def _free_ports(count: int) -> list[int]:
    """Find ports below those that the kernel hands out, so that no passing connection takes one before etcd does."""
    free: set[int] = set()
    while len(free) < count:
        port = 15000 + secrets.randbelow(17000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.add(port)
    return list(free)


class Member(NamedTuple):
    """A pod's stand-in: its process, and where each of the pod's ports is here."""

    process: subprocess.Popen[bytes]
    ports: dict[int, int]

    def status(self, probe: Manifest) -> int | None:
        """Ask for the probe's HTTP status; None where nothing answers within the probe's own time."""
        asked = probe["httpGet"]
        port = PORTS.get(asked["port"], asked["port"])
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=probe["timeoutSeconds"])
        with contextlib.closing(connection):
            try:
                connection.request("GET", asked["path"])
                return connection.getresponse().status
            except (OSError, http.client.HTTPException):
                return None


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE:.0f} s: {what}"
        time.sleep(0.05)


def _version(binary: Path) -> tuple[int, ...]:
    asked = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=30, check=True)
    found = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", asked.stdout)
    assert found, asked.stdout
    return tuple(map(int, found.groups()))


def _etcd_with_probes() -> Path:
    """Find an etcd that has the paths which the probes ask."""
    fetched = Path(os.environ.get("STEPCLAIM_ETCD_VERSIONS", Path.home() / ".cache" / "stepclaim-tests" / "etcd"))
    for binary in (find_etcd(), *fetched.glob("*/etcd")):
        if _version(binary) >= PROBES_SINCE:
            return binary
    pytest.skip("no etcd 3.5.11 or newer, where /livez and /readyz are: .ci/etcd-versions fetches one")


def _here(text: str, name: str, places: dict[str, dict[int, int]]) -> str:
    """Put an argument's URLs on loopback: every name and port of the pods' network is a port here."""

    def place(url: re.Match[str]) -> str:
        host = url["host"].partition(".")[0]
        return f"http://127.0.0.1:{places.get(host, places[name])[int(url['port'])]}"

    return re.sub(r"http://(?P<host>[\w.-]+):(?P<port>\d+)", place, text.replace("$(POD_NAME)", name))


@contextlib.contextmanager
def _members(binary: Path, folder: Path) -> Iterator[list[Member]]:
    """Start as many members as the StatefulSet has replicas."""
    names = [f"{STATEFULSET['metadata']['name']}-{number}" for number in range(STATEFULSET["spec"]["replicas"])]
    free = iter(_free_ports(len(names) * len(PORTS)))
    places = {name: {port: next(free) for port in PORTS.values()} for name in names}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
    (mount,) = (mount["mountPath"] for mount in CONTAINER["volumeMounts"])
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            volume = folder / name
            volume.mkdir()
            arguments = [_here(argument, name, places).replace(mount, str(volume)) for argument in CONTAINER["args"]]
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen([str(binary), *arguments], env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(Member(process, places[name]))
        yield started


def test_members_form_a_cluster(tmp_path: Path) -> None:
    """Each member answers a linearizable read, on any etcd."""
    probe = {"httpGet": {"path": "/health", "port": "client"}, "timeoutSeconds": 5}
    with _members(find_etcd(), tmp_path) as members:
        _wait_until(lambda: all(member.status(probe) == HEALTHY for member in members), "every member is healthy")


def test_probes_tell_the_truth(tmp_path: Path) -> None:
    """All become ready; with the quorum gone the last one is not ready any more, yet is not to be restarted."""
    ready, alive, begun = (CONTAINER[f"{name}Probe"] for name in ("readiness", "liveness", "startup"))
    with _members(_etcd_with_probes(), tmp_path) as members:
        _wait_until(lambda: all(member.status(ready) == HEALTHY for member in members), "every member is ready")
        assert [member.status(probe) for member in members for probe in (begun, alive)] == [HEALTHY] * 2 * len(members)
        *lost, left = members
        for member in lost:
            member.process.kill()
            member.process.wait()
        _wait_until(lambda: left.status(ready) != HEALTHY, "the last member is not ready")
        assert left.status(alive) == HEALTHY
        assert left.process.poll() is None
