"""A cluster of three containers on a real Docker engine; links lead to their published ports, among members, too."""

from __future__ import annotations

import contextlib
import os
import subprocess
from ipaddress import ip_network
from typing import Any

from faults.cluster import GROUPS, NAMES, Admin, Cluster, Impossible, Member
from faults.links import Links
from servers import NoContainerEngineError, container_engine, container_image, eventually
from stepclaim.embedded import free_ports

_LOOPBACK = "127.0.0.1"


class _ContainerMember(Member):
    """A member whose process is the engine's."""

    @property
    def runs(self) -> bool:
        """Whether its container runs."""
        return bool(self.etcd.runs)  # type: ignore[attr-defined]


class _Container:
    """A member in a container, with the face of an embedded one."""

    def __init__(self, container: Any, port: int) -> None:
        self._container = container
        self.endpoint = f"{_LOOPBACK}:{port}"

    def kill(self) -> None:
        """End it by SIGKILL; its files stay."""
        self._container.kill()

    def restart(self, *, wait: bool = True) -> None:
        """Start it again; nobody waits here."""
        del wait
        self._container.start()

    def pause(self) -> None:
        """Stop it in its tracks."""
        self._container.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._container.unpause()

    @property
    def runs(self) -> bool:
        """Whether the engine says so."""
        self._container.reload()
        return bool(self._container.status == "running")

    def log_tail(self, lines: int) -> str:
        """Return the last lines of the server's log."""
        return bytes(self._container.logs(tail=lines)).decode()

    def etcdctl(self, *words: str) -> str:
        """Run the container's own etcdctl."""
        done = self._container.exec_run(["/etcdctl", *words])
        if done.exit_code:
            raise subprocess.CalledProcessError(done.exit_code, words, done.output)
        return bytes(done.output).decode()


class ContainerCluster(Cluster):
    """Three members in containers."""

    kind = "containers"

    def make_links(self, stack: contextlib.ExitStack) -> Any:
        """Listen where containers can reach us: on their bridge's own address."""
        os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"  # its image can't be pulled everywhere
        try:
            self._image = container_image()
            with contextlib.closing(container_engine()) as client:
                bridge = client.networks.get("bridge").attrs["IPAM"]["Config"][0]
        except NoContainerEngineError as error:
            raise Impossible(str(error)) from error
        if self.options.tls or self.options.small_disk or self.options.auth:
            raise Impossible("TLS, users and a small disk are done where members are processes")
        # an engine that has just made its bridge names no gateway: it is the first address
        gateway = bridge.get("Gateway") or next(ip_network(bridge["Subnet"]).hosts())
        return stack.enter_context(Links(host=str(gateway), seed=self.options.seed))

    def _start(self, stack: contextlib.ExitStack) -> None:
        from testcontainers.core.container import DockerContainer  # noqa: PLC0415  # after the setting above

        ports = free_ports(6)
        clients, peers = ports[:3], ports[3:]
        links = {name: self.links.listen(name, (_LOOPBACK, peers[i]), client=None) for i, name in enumerate(NAMES)}
        urls = {name: f"http://{self.links.host}:{port}" for name, port in links.items()}
        members = []
        for i, name in enumerate(NAMES):
            container = (
                DockerContainer(self._image)
                .with_bind_ports(2379, clients[i])
                .with_bind_ports(2380, peers[i])
                .with_command(self._words(name, urls))
            )
            stack.callback(container.stop)
            container.start()
            etcd: Any = _Container(container.get_wrapped_container(), clients[i])
            members.append(_ContainerMember(name, etcd, Admin(etcd.endpoint, None, auth=False)))
        self.members = tuple(members)
        for i, member in enumerate(members):
            eventually(member.admin.serves, 40)
            self.links.members[f"{member.admin.status().header.member_id:x}"] = member.name
            for group in GROUPS:
                self.ports[group, member.name] = self.links.listen(member.name, (_LOOPBACK, clients[i]), client=group)

    def _words(self, name: str, urls: dict[str, str]) -> list[str]:
        return [
            "/etcd",
            f"--name={name}",
            "--data-dir=/data",
            f"--initial-cluster={','.join(f'{each}={url}' for each, url in urls.items())}",
            "--listen-client-urls=http://0.0.0.0:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://0.0.0.0:2380",
            f"--initial-advertise-peer-urls={urls[name]}",
            *self.options.flags,
        ]
