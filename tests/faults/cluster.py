"""Three members behind links of our own, and what a test may do to them and ask of them.

Members are named m0, m1, m2; workers stand in two groups, A and B, each with links of its own to every member, so that
either group can be cut off from any member. Members dial each other through links, too.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from etcd3 import etcdrpc

from faults.links import Links
from servers import Certificates, eventually
from stepclaim.embedded import EmbeddedEtcd, free_ports
from stepclaim.errors import ConfigurationError, UnavailableError

GROUPS = ("A", "B")
NAMES = ("m0", "m1", "m2")
PREFIX = "/stepclaim"
PASSWORD = "password"  # noqa: S105  # of servers that live for a minute
TOKEN_TTL = 2
_TRIES = 3
_FATAL = '"level":"fatal"'
KNOWN = "panic: unexpected error during txn"
"""A member before 3.5.5 ends by this if the caller of a transaction that only reads goes away: etcd issue 14110."""


class Impossible(Exception):  # noqa: N818  # not an error: what this machine can't do, and why
    """What was asked for can't be done on this machine; the text says why."""


@dataclass(frozen=True)
class Options:
    """What a cluster is made of: which etcd, and what the faults to come need."""

    binary: Path | None = None
    auth: bool = False
    tls: bool = False
    quota: int = 0
    """Bytes of the space quota; 0 is etcd's default."""
    small_disk: str | None = None
    """The member whose data lies on a small file system of its own."""
    disk_bytes: int = 170 << 20
    """Its size: etcd lays out two files of 64 MiB before it writes anything."""
    seed: int = 0

    @property
    def flags(self) -> list[str]:
        """The flags that etcd is started with."""
        flags = [f"--quota-backend-bytes={self.quota}"] if self.quota else []
        return flags + ([f"--auth-token-ttl={TOKEN_TTL}", "--bcrypt-cost=4"] if self.auth else [])


class Admin:
    """Raw calls to one member, past all links, as root."""

    def __init__(self, endpoint: str, files: Certificates | None, *, auth: bool) -> None:
        self.endpoint = endpoint
        self._files, self._auth = files, auth

    @contextlib.contextmanager
    def channel(self) -> Iterator[Any]:
        """Give a channel of its own: a broken one would keep its back-off."""
        if self._files is None:
            channel = grpc.insecure_channel(self.endpoint, [("grpc.use_local_subchannel_pool", 1)])
        else:
            read = [each.read_bytes() for each in (self._files.ca, self._files.client_key, self._files.client_cert)]
            credentials = grpc.ssl_channel_credentials(*read)
            channel = grpc.secure_channel(self.endpoint, credentials, [("grpc.use_local_subchannel_pool", 1)])
        try:
            yield channel
        finally:
            channel.close()

    def metadata(self, channel: Any) -> tuple[tuple[str, str], ...]:
        """Log in, where the cluster has users."""
        if not self._auth:
            return ()
        request = etcdrpc.AuthenticateRequest(name="root", password=PASSWORD)
        return (("token", etcdrpc.AuthStub(channel).Authenticate(request, timeout=3).token),)

    def call(self, stub: Any, method: str, request: Any, *, timeout: float = 3.0) -> Any:
        """Make one call; grpc.RpcError if it fails."""
        with self.channel() as channel:
            return getattr(stub(channel), method)(request, timeout=timeout, metadata=self.metadata(channel))

    def status(self) -> Any:
        """Ask the member about itself: answers also without a quorum."""
        with self.channel() as channel:  # needs no token
            return etcdrpc.MaintenanceStub(channel).Status(etcdrpc.StatusRequest(), timeout=1)

    def serves(self) -> bool:
        """Tell whether the member answers a linearizable read."""
        request = etcdrpc.RangeRequest(key=b"\0", limit=1, keys_only=True)
        try:
            self.call(etcdrpc.KVStub, "Range", request, timeout=1.5)
        except grpc.RpcError:
            return False
        return True


@dataclass
class Member:
    """One member: its process, and the way past the links."""

    name: str
    etcd: EmbeddedEtcd
    admin: Admin

    def kill(self) -> None:
        """End it as a crash would."""
        self.etcd.kill()

    def restart(self) -> None:
        """Start it again, without waiting."""
        self.etcd.restart(wait=False)

    def pause(self) -> None:
        """Stop it in its tracks."""
        self.etcd.pause()

    def resume(self) -> None:
        """Let it go on."""
        self.etcd.resume()

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        process = self.etcd._process
        return process is not None and process.poll() is None

    @property
    def last_words(self) -> str:
        """What it said when it ended."""
        words = [line for line in self.etcd.log_tail(200).splitlines() if line.startswith("panic: ") or _FATAL in line]
        return words[-1] if words else "without a word"


@dataclass
class Cluster:
    """A context manager around three members; everything that it started ends with it."""

    options: Options = field(default_factory=Options)
    kind = "proxies"

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stepclaim-faults-"))
        self.files: Certificates | None = None
        self.members: tuple[Member, ...] = ()
        self.ports: dict[tuple[str, str], int] = {}
        self.crashes: list[str] = []
        """The members that ended by themselves, and why."""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start all; ConfigurationError or UnavailableError if they can't be had."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            if self.options.tls:
                self.files = Certificates.make(self.folder)
            if self.options.small_disk:
                self._mount(stack)
            self.links: Any = self.make_links(stack)
            for left in reversed(range(_TRIES)):
                try:
                    with contextlib.ExitStack() as inner:
                        self._start(inner)
                        inner_all = inner.pop_all()
                except UnavailableError:  # somebody took a port between our look and etcd's
                    if not left:
                        raise
                else:
                    stack.push(inner_all)
                    break
            if self.options.auth:
                self._make_users()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all."""
        self._stack.close()

    # --- how it is made ------------------------------------------------------------------------------------------

    def make_links(self, stack: contextlib.ExitStack) -> Any:
        """Give what workers and members reach members through."""
        return stack.enter_context(Links(seed=self.options.seed))

    def _start(self, stack: contextlib.ExitStack) -> None:
        ports = free_ports(6)
        clients, peers = ports[:3], ports[3:]
        advertised = [self.links.listen(name, ("127.0.0.1", peers[i]), client=None) for i, name in enumerate(NAMES)]
        together = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in zip(NAMES, advertised, strict=True))
        etcds = []
        for i, name in enumerate(NAMES):
            args = [
                f"--name={name}",
                f"--initial-cluster={together}",
                f"--initial-cluster-token={advertised[0]}",
                f"--listen-peer-urls=http://127.0.0.1:{peers[i]}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{advertised[i]}",
                *self.options.flags,
            ]
            if self.files is not None:
                cert, key = self.server_files(name)
                shutil.copy(self.files.server_cert, cert)
                shutil.copy(self.files.server_key, key)
                trusted = f"--trusted-ca-file={self.files.ca}"
                args += [f"--cert-file={cert}", f"--key-file={key}", trusted, "--client-cert-auth"]
            data = self.folder / "disk" / "data" if name == self.options.small_disk else None
            etcds.append(
                EmbeddedEtcd(data, clients[i], binary=self.options.binary, extra_args=args, startup_timeout=30)
            )
        for etcd in etcds:
            stack.callback(etcd.close)
            etcd.start(wait=False)
        for etcd in etcds:
            etcd.start()
        self.members = tuple(
            Member(name, etcd, Admin(etcd.endpoint, self.files, auth=False))
            for name, etcd in zip(NAMES, etcds, strict=True)
        )
        for i, name in enumerate(NAMES):
            self.links.members[f"{self.members[i].admin.status().header.member_id:x}"] = name
            for group in GROUPS:
                self.ports[group, name] = self.links.listen(name, ("127.0.0.1", clients[i]), client=group)

    def _mount(self, stack: contextlib.ExitStack) -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        if os.geteuid() != 0:
            raise Impossible("only root can mount a small file system")
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.options.disk_bytes}", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Impossible(f"no small file system can be mounted: {done.stderr.strip()}")
        stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=False)
        (disk / "data").mkdir(mode=0o700)

    def _make_users(self) -> None:
        run = self.members[0].etcd.etcdctl
        for user in ("root", "worker"):
            run("user", "add", f"{user}:{PASSWORD}")
            run("role", "add", user)
            run("user", "grant-role", user, user)
        run("role", "grant-permission", "worker", "readwrite", "--prefix", f"{PREFIX}/")
        run("auth", "enable")
        for member in self.members:
            member.admin = Admin(member.etcd.endpoint, self.files, auth=True)

    def server_files(self, name: str) -> tuple[Path, Path]:
        """Name a member's own certificate and key; etcd reads them anew for each handshake."""
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    # --- what may be asked ---------------------------------------------------------------------------------------

    def connection(self, group: str) -> dict[str, Any]:
        """Give the settings with which a group's workers connect."""
        settings: dict[str, Any] = {"endpoints": self.endpoints(group), "prefix": PREFIX}
        if self.files is not None:
            named = {"ca_file": self.files.ca, "cert_file": self.files.client_cert, "key_file": self.files.client_key}
            settings |= {name: str(path) for name, path in named.items()}
        if self.options.auth:
            settings |= {"user": "worker", "password": PASSWORD}
        return settings

    def endpoints(self, group: str) -> list[str]:
        """Name the links of a group."""
        return [f"{self.links.host}:{self.ports[group, name]}" for name in NAMES]

    def launcher(self, group: str) -> Sequence[str]:
        """Give the words before a worker's command."""
        del group
        return ()

    def member(self, name: str) -> Member:
        """Find one by name."""
        return self.members[NAMES.index(name)]

    def leader(self, timeout: float = 15.0) -> Member:
        """Return the member that leads, waiting until one says that it does."""
        found = eventually(self._leader, timeout, interval=0.1)
        assert found is not None
        return found

    def _leader(self) -> Member | None:
        for member in self.members:
            with contextlib.suppress(grpc.RpcError, ConfigurationError):
                status = member.admin.status()
                if status.leader == status.header.member_id:
                    return member
        return None

    def anyone(self, do: Callable[[Admin], Any], timeout: float = 20.0) -> Any:
        """Ask one member after the other until one answers."""
        deadline = time.monotonic() + timeout
        while True:
            for member in self.members:
                try:
                    return do(member.admin)
                except grpc.RpcError:
                    if time.monotonic() > deadline:
                        raise
            time.sleep(0.1)

    def revive(self) -> None:
        """Start members again that ended by themselves."""
        for member in self.members:
            if not member.runs:
                self.crashes.append(f"{member.name} ended by itself: {member.last_words}")
                member.restart()

    def whole(self, timeout: float = 30.0) -> float:
        """Wait until each member answers a linearizable read, and tell how long that took."""
        started = time.monotonic()
        self.revive()
        for member in self.members:
            try:
                eventually(member.admin.serves, timeout, interval=0.1)
            except AssertionError as error:
                error.add_note(f"{member.name} does not answer. Its log ends:\n{member.etcd.log_tail(15)}")
                raise
        return time.monotonic() - started
