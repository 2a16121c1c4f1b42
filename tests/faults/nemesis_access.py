"""Faults of replies, tokens and certificates."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import subprocess
from typing import TYPE_CHECKING, Any, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from faults.cluster import GROUPS, NAMES, PASSWORD
from faults.nemesis import Fault, Repeated
from proxy import EtcdProxy
from servers import eventually
from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path


class DropReplies(Repeated):
    """Transactions are carried out, and their answers never come: the connection is reset, or the stream is silent."""

    name = "drop-replies"
    proxies = True
    excludes = frozenset({"certificate-expiry"})  # its proxies read what TLS would hide

    def begin(self) -> str:
        cluster = self.scene.cluster
        self._stack = contextlib.ExitStack()
        self._proxies = [self._stack.enter_context(EtcdProxy(member.etcd.endpoint)) for member in cluster.members]
        self._before = {}
        for name, proxy in zip(NAMES, self._proxies, strict=True):
            host, _, port = proxy.endpoint.rpartition(":")
            for group in GROUPS:
                self._before[group, name] = self.links.retarget(group, name, (host, int(port)))
        return "dropped the answers of transactions and of lease calls"

    def once(self) -> None:
        random = self.scene.random
        for proxy in self._proxies:
            method = random.choice(("Txn", "Txn", "Txn", "Txn", "Range", "LeaseKeepAlive"))
            proxy.drop_reply(method, random.randint(1, 6), random.choice(("cut", "silence")))

    def heal(self) -> None:
        super().heal()
        for (group, name), upstream in self._before.items():
            self.links.retarget(group, name, upstream)
        with contextlib.suppress(AssertionError):  # they end by themselves, as their dialler is gone
            eventually(lambda: not any(proxy._tasks for proxy in self._proxies), 3)
        self._stack.close()


class TokenExpiry(Repeated):
    """All auth tokens are forgotten at once, again and again; between that they end by themselves when not used."""

    name = "token-expiry"
    excludes = frozenset({"certificate-expiry"})
    needs: ClassVar[dict[str, Any]] = {"auth": True}
    every = 1.5

    def begin(self) -> str:
        return "forgot all tokens again and again"

    def once(self) -> None:
        self._auth(f"--user=root:{PASSWORD}", "auth", "disable")
        self._auth("auth", "enable")

    def heal(self) -> None:
        super().heal()
        members = self.scene.cluster.members
        eventually(lambda: any(each.admin.serves() for each in members) or self._auth("auth", "enable"), 20)

    def _auth(self, *words: str) -> bool:
        for member in self.scene.cluster.members:
            with contextlib.suppress(subprocess.SubprocessError, ConfigurationError):
                member.etcd.etcdctl("--command-timeout=2s", "--dial-timeout=1s", *words)
                return True
        return False


class CertificateExpiry(Fault):
    """Members' certificates are over: no new connection is trusted, until they are renewed."""

    name = "certificate-expiry"
    excludes = frozenset({"drop-replies", "token-expiry"})
    needs: ClassVar[dict[str, Any]] = {"tls": True}

    def inject(self) -> str:
        cluster = self.scene.cluster
        self.names = list(NAMES) if self.scene.random.random() < 0.5 else [cluster.leader().name]
        for name in self.names:
            cert, key = cluster.server_files(name)
            for path, content in zip((cert, key), _expired(cluster.folder), strict=True):
                path.write_bytes(content)
            for group in GROUPS:
                self.links.reset(group, name)
        return f"let the certificates of {', '.join(self.names)} end"

    def heal(self) -> None:
        files = self.scene.cluster.files
        assert files is not None
        for name in self.names:
            cert, key = self.scene.cluster.server_files(name)
            cert.write_bytes(files.server_cert.read_bytes())
            key.write_bytes(files.server_key.read_bytes())


def _expired(folder: Path) -> tuple[bytes, bytes]:
    """Give a server's certificate whose time is over, and its key."""
    return signed(folder, dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))


def signed(folder: Path, until: dt.datetime) -> tuple[bytes, bytes]:
    """Give a certificate of the loopback address that the cluster's authority signed, and its key."""
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    loopback = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(
            issuer_name=authority.subject,
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=until - dt.timedelta(days=2),
            not_valid_after=until,
        )
        .add_extension(x509.SubjectAlternativeName(loopback), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), private
