"""The way to etcd: one channel a member, credentials, the token, and which member is asked."""

from __future__ import annotations

import random
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
from etcd3 import etcdrpc
from msgspec import Struct

from stepclaim._core.ops import Answered, InDoubt
from stepclaim._etcd.retry import Failed
from stepclaim._etcd.status import Failure, classify
from stepclaim.errors import (
    BackendError,
    ConfigurationError,
    DeadlineExceededError,
    OutcomeUnknownError,
    ResourceExhaustedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim.settings import Settings

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # while calls are under way a silent connection is noticed; etcd forbids pings more often than each 5 s
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # gRPC's core takes this one since it lost sight of the other
    ("grpc.http2.max_pings_without_data", 0),
    # a member that comes back is found again within a second, not within gRPC's two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)


class Access(Struct, frozen=True):
    """Credentials that settings can't carry: those of a client that the user already has."""

    credentials: Any = None
    token: str | None = None


NO_ACCESS = Access()


class Member:
    """One endpoint with its channel and stubs."""

    __slots__ = ("auth", "channel", "endpoint", "kv", "lease", "range", "txn", "watch")

    def __init__(self, endpoint: str, channel: Any) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self.kv = etcdrpc.KVStub(channel)
        self.txn = channel.unary_unary("/etcdserverpb.KV/Txn", response_deserializer=etcdrpc.TxnResponse.FromString)
        self.range = self.kv.Range
        self.lease = etcdrpc.LeaseStub(channel)
        self.watch = etcdrpc.WatchStub(channel)
        self.auth = etcdrpc.AuthStub(channel)


class Members:
    """All endpoints, the one in use, and the token: what the sync and the asyncio client share."""

    def __init__(
        self,
        settings: Settings,
        access: Access,
        connect: Callable[..., Any],
        secure: Callable[..., Any],
        pack: Callable[[tuple[tuple[str, str], ...]], Any] = tuple,
    ) -> None:
        self.settings = settings
        self._pack = pack
        """Makes of a call's metadata what gRPC would make of it at each call."""
        options: list[tuple[str, Any]] = list(OPTIONS)
        if settings.tls_server_name:
            options.append(("grpc.ssl_target_name_override", settings.tls_server_name))
        if access.credentials is not None or settings.uses_tls:
            credentials = access.credentials or _credentials(settings)
            self.all = [Member(each, secure(each, credentials, options)) for each in settings.endpoints]
        else:
            self.all = [Member(each, connect(each, options)) for each in settings.endpoints]
        self.current = random.choice(self.all)  # noqa: S311 - spreads load, guards nothing
        """The member that is asked now."""
        self._lock = threading.Lock()
        self.logged_in(access.token)
        self.needs_login = settings.user is not None

    def login_request(self) -> Any:
        """Make the message that asks for a token."""
        password = self.settings.password
        return etcdrpc.AuthenticateRequest(
            name=self.settings.user or "", password=password.get_secret_value() if password else ""
        )

    def logged_in(self, token: str | None) -> None:
        """Send the token with all calls from now on; None where the cluster knows no users."""
        self.metadata = self._pack((("hasleader", "true"), *((("token", token),) if token else ())))
        self.needs_login = False

    def login_failed(self, error: grpc.RpcError, member: Member) -> Failure | None:
        """Judge a failed login; None where authentication is switched off and nothing is to be done."""
        if "authentication is not enabled" in (error.details() or ""):
            self.logged_in(None)
            return None
        return self.failed(error, member)

    def stream_ended(self, reason: str) -> None:
        """Judge why etcd ended a stream: its token may be over, or the member without a leader."""
        if "auth token" in reason.lower():
            self.needs_login = self.settings.user is not None
        elif "leader" in reason.lower():
            self._turn_from(self.current)

    def _turn_from(self, member: Member) -> None:
        with self._lock:
            if self.current is member:
                self.current = self.all[(self.all.index(member) + 1) % len(self.all)]

    def failed(self, error: grpc.RpcError, member: Member) -> Failure:
        """Judge a failed attempt, and turn to the next member or to a new token where that may help."""
        failure = classify(error, member.endpoint)
        if failure.elsewhere:
            self._turn_from(member)
        if failure.log_in:
            if self.settings.user is None:
                return Failure(failure.error)
            self.needs_login = True
        return failure


def too_late() -> DeadlineExceededError:
    """Tell that there is no time left to send anything."""
    return DeadlineExceededError("the call's deadline has passed", code="DEADLINE_EXCEEDED", definite=True)


def first_timeout(settings: Settings, deadline: float, *, fenced: bool = False) -> float:
    """Give a call's first attempt its time; a fenced write leaves a part of the call's time for settling it."""
    left, whole = deadline - time.monotonic(), settings.attempt_timeout
    if left > 2.0 * whole:
        return whole
    if left <= 0:
        raise Failed(Failure(too_late()))
    return min(left * 0.6 if fenced else left, whole)


class Tries:
    """One call's attempts: how long each may take, what is known after each, and what its caller is told at the end."""

    __slots__ = ("_deadline", "_earlier", "_fenced", "_last", "_settings", "_silent", "_write", "in_doubt")

    def __init__(self, settings: Settings, deadline: float, *, write: bool, fenced: bool) -> None:
        self._settings = settings
        self._deadline = deadline
        self._write = write
        self._fenced = fenced
        self._silent = 0
        self._last: Failure | None = None
        self._earlier = False
        self.in_doubt = False
        """An attempt that failed may have been carried out."""

    def timeout(self) -> float:
        """Give one attempt's time: short first, so that a silent member costs little, then longer for slow answers.

        What counts are the attempts that got no answer, not those that were refused. What is sent during an election
        is often dropped by etcd: the second attempt is as short as the first, so that it is not waited for after the
        election. A fenced write leaves a part of the call's time for settling it.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Failed(self._last or Failure(too_late()))
        own = self._settings.attempt_timeout
        if self._silent > 1:
            own *= 2.0 ** min(self._silent - 1, 6)
        return min(left * 0.6 if self._fenced else left, own)

    def failed(self, failure: Failure) -> None:
        """Take note of an attempt."""
        self._last = failure
        self._silent += not failure.definite
        self._earlier, self.in_doubt = self.in_doubt, self.in_doubt or not failure.definite

    def error(self, failure: Failure) -> Exception:
        """Give the error that ends the call."""
        error = failure.error
        if self._fenced and not failure.definite:
            return Answered(error) if isinstance(error, ResourceExhaustedError) else InDoubt()
        if isinstance(error, ResourceExhaustedError) and not self._earlier:
            return error
        if self._write and self.in_doubt and isinstance(error, BackendError):
            return OutcomeUnknownError(
                f"the write may or may not have been carried out: {error}; look at what stands before writing again",
                code=error.code,
            )
        return error


def _credentials(settings: Settings) -> Any:
    def content(path: Any) -> bytes | None:
        if path is None:
            return None
        try:
            data: bytes = path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} can't be read: {error}") from error
        return data

    _check_certificates(settings)
    return grpc.ssl_channel_credentials(
        root_certificates=content(settings.ca_file),
        private_key=content(settings.key_file),
        certificate_chain=content(settings.cert_file),
    )


def _check_certificates(settings: Settings) -> None:
    """Have unusable files named: gRPC would only say that it can't make a handshaker."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.ca_file is not None:
        try:
            context.load_verify_locations(settings.ca_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError(f"ca_file {settings.ca_file} holds no certificate in PEM form") from error
    if settings.cert_file is not None and settings.key_file is not None:
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: "")
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError(
                f"cert_file {settings.cert_file} and key_file {settings.key_file} are no certificate and its own "
                "private key in PEM form, without a passphrase"
            ) from error
