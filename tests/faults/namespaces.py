"""A cluster whose members and groups of workers each have a network namespace, cut apart by rules of nftables."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from faults.cluster import GROUPS, NAMES, Admin, Cluster, Impossible, Member
from servers import eventually
from stepclaim.embedded import EmbeddedEtcd, find_etcd

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_AWAY = "table inet faults\ndelete table inet faults\n"
_CHAIN = "table inet faults {{\nchain input {{\ntype filter hook input priority 0\n{rules}\n}}\n}}\n"
_CLIENT, _PEER = 2379, 2380


def _run(*words: str, said: str | None = None) -> None:
    done = subprocess.run(words, input=said, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Impossible(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")


class Rules:
    """The links: what comes from one namespace is dropped in another."""

    host = ""

    def __init__(self, spaces: dict[str, str], addresses: dict[str, str]) -> None:
        self.members: dict[str, str] = {}
        self._spaces, self._addresses = spaces, addresses
        self._cut: set[tuple[str, str]] = set()

    def cut(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Drop all packets from the first to the second of each pair."""
        self._turn(self._cut | set(pairs))

    def mend(self, pairs: Iterable[tuple[str, str]] | None = None) -> None:
        """Let them pass again, on some ways or on all."""
        self._turn(set() if pairs is None else self._cut - set(pairs))

    def _turn(self, cut: set[tuple[str, str]]) -> None:
        changed = {target for _, target in cut ^ self._cut}
        self._cut = cut
        for name in changed:
            sources = sorted(source for source, target in cut if target == name)
            rules = "\n".join(f"ip saddr {self._addresses[source]} drop" for source in sources)
            said = _AWAY + _CHAIN.format(rules=rules)
            _run("ip", "netns", "exec", self._spaces[name], "nft", "-f", "-", said=said)


class _Etcd(EmbeddedEtcd):
    """An etcd whose binary puts itself into a namespace."""

    def __init__(self, address: str, binary: Path, args: Sequence[str]) -> None:
        super().__init__(binary=binary, extra_args=args, startup_timeout=30)
        self._address = address

    @property
    def endpoint(self) -> str:
        """Host and port."""
        return f"{self._address}:{_CLIENT}"


class NamespaceCluster(Cluster):
    """Three members, each in a namespace of its own at one bridge; the runner stands at it, too, and sees all."""

    kind = "namespaces"

    def make_links(self, stack: contextlib.ExitStack) -> Any:
        """Lay the bridge and the namespaces."""
        for program in ("ip", "nft"):
            if shutil.which(program) is None:
                raise Impossible(f"there is no {program}: install iproute2 and nftables")
        if os.geteuid() != 0:
            raise Impossible("only root can make network namespaces")
        if self.options.tls:
            raise Impossible("the test's certificates are for the loopback address alone")
        mark = f"sc{os.getpid() % 100000}"
        net = f"10.{180 + os.getpid() % 60}.{os.getpid() // 60 % 250}"
        # the bridge has a namespace, too: the machine's own firewall may drop what bridges of its own pass on
        switch = f"{mark}-sw"
        stack.callback(_forget, "netns", "del", switch)
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        stack.callback(_forget, "link", "del", mark)
        _run("ip", "link", "add", mark, "type", "veth", "peer", "name", "root", "netns", switch)
        _run("ip", "-n", switch, "link", "set", "root", "master", "br0", "up")
        _run("ip", "addr", "add", f"{net}.1/24", "dev", mark)
        _run("ip", "link", "set", mark, "up")
        self.spaces = {name: f"{mark}-{name}" for name in (*NAMES, *GROUPS)}
        self.addresses = {name: f"{net}.{10 + number}" for number, name in enumerate((*NAMES, *GROUPS))}
        for name, space in self.spaces.items():
            stack.callback(_forget, "netns", "del", space)
            _run("ip", "netns", "add", space)
            pair = ("type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "-n", switch, "link", "add", name, *pair)
            _run("ip", "-n", switch, "link", "set", name, "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
            _run("ip", "netns", "exec", space, "nft", "-f", "-", said=_CHAIN.format(rules=""))
        return Rules(self.spaces, self.addresses)

    def _start(self, stack: contextlib.ExitStack) -> None:
        peers = {name: f"http://{self.addresses[name]}:{_PEER}" for name in NAMES}
        together = ",".join(f"{name}={peer}" for name, peer in peers.items())
        etcds = []
        for name in NAMES:
            client = f"http://{self.addresses[name]}:{_CLIENT}"
            args = [
                f"--name={name}",
                f"--initial-cluster={together}",
                f"--listen-peer-urls={peers[name]}",
                f"--initial-advertise-peer-urls={peers[name]}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                *self.options.flags,
            ]
            etcds.append(_Etcd(self.addresses[name], self._inside(name), args))
        for etcd in etcds:
            stack.callback(etcd.close)
            etcd.start(wait=False)
        self.members = tuple(
            Member(name, etcd, Admin(etcd.endpoint, None, auth=False)) for name, etcd in zip(NAMES, etcds, strict=True)
        )
        for member in self.members:
            eventually(member.admin.serves, 30)

    def _inside(self, name: str) -> Path:
        """Write a program that is etcd in a namespace."""
        etcd = find_etcd(self.options.binary)
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        script = folder / "etcd"
        script.write_text(f'#!/bin/sh\nexec ip netns exec {self.spaces[name]} {etcd} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        with contextlib.suppress(FileExistsError):
            (folder / "etcdctl").symlink_to(etcd.with_name("etcdctl"))
        return script

    def endpoints(self, group: str) -> list[str]:
        """Name the members themselves: what cuts them off is in between."""
        del group
        return [member.etcd.endpoint for member in self.members]

    def launcher(self, group: str) -> Sequence[str]:
        """Put workers into their group's namespace."""
        return ("ip", "netns", "exec", self.spaces[group])


def _forget(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=False)
