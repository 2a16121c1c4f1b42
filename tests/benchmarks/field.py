"""The peers that can be had on this machine, with their servers and clients; and who is missing, and why."""

from __future__ import annotations

import contextlib
import subprocess
from typing import TYPE_CHECKING

from benchmarks.backends import BACKENDS, Backend
from benchmarks.daemons import NotStartedError
from benchmarks.driver import Driver, DriverError
from benchmarks.peers import PEERS, Peer, python_of
from benchmarks.rounds import DroppedOutError, Lengths, slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.etcd import Etcd
    from benchmarks.figures import Findings, Sample
    from benchmarks.rounds import Group, Measure


class Field:
    """All of them."""

    def __init__(self, findings: Findings, lengths: Lengths, tell: Callable[[str], None]) -> None:
        self._findings = findings
        self._lengths = lengths
        self._tell = tell
        self._backends: dict[str, Backend] = {}
        self._pythons: dict[Peer, str] = {}

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        """Install the clients and run the servers; a peer that can't be had is noted and left out."""
        with contextlib.ExitStack() as stack:
            for name, backend in BACKENDS.items():
                try:
                    self._backends[name] = stack.enter_context(backend())
                except (NotStartedError, OSError, subprocess.SubprocessError) as error:
                    self._leave_out([peer for peer in PEERS if peer.backend == name], f"{name}: {error}")
            for peer in PEERS:
                if peer.name not in self._findings.left_out:
                    try:
                        self._pythons[peer] = python_of(peer, self._tell)
                    except (OSError, subprocess.SubprocessError) as error:
                        said = getattr(error, "stderr", None) or str(error)
                        self._leave_out([peer], f"its client can't be installed: {said.strip()[-300:]}")
            yield

    def _leave_out(self, peers: list[Peer], why: str) -> None:
        for peer in peers:
            self._tell(f"left out: {peer.title}: {why}")
            self._findings.left_out[peer.name] = why

    def backend(self, name: str) -> Backend | None:
        """Give a server, if it runs."""
        return self._backends.get(name)

    def python(self, name: str) -> str | None:
        """Give the interpreter of a peer, if it takes part."""
        return next((python for peer, python in self._pythons.items() if peer.name == name), None)

    @property
    def titles(self) -> dict[str, str]:
        """Name those that take part, for people; a client that is used in two ways has the name of the second."""
        return {peer.name: peer.title for peer in self._pythons}

    @property
    def about(self) -> dict[str, dict[str, str]]:
        """Tell the servers' versions and settings, and the clients' versions."""
        servers = {name: {"version": each.version, "settings": each.settings} for name, each in self._backends.items()}
        clients = {}
        for peer in self._pythons:
            name, _, version = peer.packages[0].partition("==")
            clients[name] = {"version": version, "settings": f"client of {peer.backend}"}
        return {**servers, **clients}

    def start(self, stack: contextlib.ExitStack, peer: Peer, etcd: Etcd, callers: int) -> Driver | None:
        """Start and connect one's driver; None, and left out from then on, if that fails."""
        backend = self._backends.get(peer.backend)
        address = etcd.address if backend is None else backend.address
        driver = stack.enter_context(Driver(peer.script, *peer.arguments, python=self._pythons[peer]))
        try:
            driver.ask("open", address=address, callers=callers)
        except DriverError as error:
            self._drop(peer, error)
            return None
        stack.callback(_leave, driver)
        return driver

    def tolerant(self, peer: Peer, measure: Measure) -> Measure:
        """Have a failure of a peer leave it out, while one of our own would end the run."""

        def tried() -> Sample:
            try:
                return measure()
            except DriverError as error:
                self._drop(peer, error)
                raise DroppedOutError from error

        return tried

    def _drop(self, peer: Peer, error: DriverError) -> None:
        self._pythons.pop(peer, None)
        self._leave_out([peer], str(error).strip().splitlines()[-1])

    def taking_part(self, callers: int) -> list[Peer]:
        """Name those that can be measured with so many callers."""
        return [peer for peer in self._pythons if (peer.one if callers == 1 else peer.many)]

    def pids(self, peer: Peer, etcd: Etcd) -> list[int]:
        """Give the processes of a peer's server."""
        backend = self._backends.get(peer.backend)
        return etcd.pids if backend is None else backend.pids

    def groups(self, stack: contextlib.ExitStack, etcd: Etcd, callers: int) -> list[Group]:
        """Give everybody's slices for a case, each as a group of its own."""
        groups: list[Group] = []
        for peer in self.taking_part(callers):
            driver = self.start(stack, peer, etcd, callers)
            if driver is not None:
                measure = slices(driver, callers, self._lengths, self.pids(peer, etcd))
                groups.append([(peer.name, self.tolerant(peer, measure))])
        return groups


def _leave(driver: Driver) -> None:
    with contextlib.suppress(DriverError):  # it may have failed before
        driver.ask("close", patience=20)
