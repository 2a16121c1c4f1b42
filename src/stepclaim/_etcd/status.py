"""gRPC's and etcd's status to our errors, and to what may be done about each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import grpc
from msgspec import Struct

from stepclaim._core.ops import Compacted
from stepclaim.errors import (
    AuthenticationError,
    BackendError,
    DeadlineExceededError,
    PermissionDeniedError,
    RecordTooLargeError,
    ResourceExhaustedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from stepclaim.errors import StepClaimError

Code = grpc.StatusCode


class Failure(Struct, frozen=True):
    """A failed attempt: its error, and what it means for the next one."""

    error: StepClaimError | Compacted
    transient: bool = False
    """Another attempt may do better."""
    definite: bool = True
    """The request certainly had no effect."""
    elsewhere: bool = False
    """Another member may do better."""
    log_in: bool = False
    """The token is not accepted any more."""


_NEVER_SENT = (
    "failed to connect to all addresses",
    "connection refused",
    "dns resolution failed",
    "errors resolving",
    "no leader",
)
_LOG_IN = ("invalid auth token", "revision of auth store is old", "auth old revision", "user name is empty")
_REFUSED_OURS = ("bad_certificate", "certificate_required", "unknown_ca", "certificate_unknown", "access_denied")
_REFUSED_NAME = ("hostname verification", "not in peer certificate")
_REFUSED_THEIRS = (
    "certificate_verify_failed",
    "certificate signature failure",
    "bad_signature",
    "certificate has expired",
)
_NO_TLS_HERE = ("wrong_version_number", "handshake read failed", "socket closed", "connection reset", "http1.x server")
# etcd's own clock may run out before ours, and then it answers with these words under UNKNOWN
_TOO_LATE = ("context deadline exceeded", "context canceled")
_BROKEN_STREAM = ("rst_stream", "stream removed", "goaway", "socket closed", "connection reset")

_WRAPPING = re.compile(
    r"^failed to connect to all addresses; last error: (?:[A-Z_]+: )?(?:ipv[46]:\S+: )?"
    r"(?:Failed to connect to remote host: )?(?:Custom verification check failed with error: [A-Z_]+: )?"
)
_UNANSWERED = re.compile(r"connection attempt timed out.*")
_HANDSHAKE = re.compile(r"^Tls handshake failed .*OPENSSL_internal:(.+?)(?:: OK)?$")
_RESOLVER = re.compile(r"^(?:DNS resolution failed for|errors resolving) .*: ([^:\]]+)\]?$")


def _words(said: str) -> str:
    """Give the words of etcd, of the system or of TLS, without what gRPC wraps around them."""
    bare = _WRAPPING.sub("", said).removeprefix("grpc: ").removesuffix(".")
    bare = _UNANSWERED.sub("it takes connections but does not answer", bare)
    bare = _RESOLVER.sub(r"its name can't be resolved: \1", bare)
    return _HANDSHAKE.sub(r"TLS handshake failed: \1", bare)


def _distrust(low: str) -> str | None:
    """Tell what to do about certificates that one side does not accept, or None where it is not about them."""
    if any(sign in low for sign in _REFUSED_OURS):
        return "etcd refuses the client's certificate: give cert_file and key_file, signed by an authority etcd trusts"
    if any(sign in low for sign in _REFUSED_NAME):
        return "its certificate is for another name: give tls_server_name, or an endpoint that the certificate names"
    if any(sign in low for sign in _REFUSED_THEIRS):
        return "its certificate is not trusted: give the ca_file of the authority that signed it"
    return None


def timed_out(error: grpc.RpcError) -> bool:
    """Tell whether a call's time was over, by our clock or by etcd's."""
    low = (error.details() or "").lower()
    return error.code() is Code.DEADLINE_EXCEEDED or any(sign in low for sign in _TOO_LATE)


def classify(error: grpc.RpcError, endpoint: str) -> Failure:
    """Judge one failed attempt."""
    code: grpc.StatusCode = error.code()
    said: str = _words(error.details() or "")
    low = (error.details() or "").lower()
    name = code.name
    where = f"etcd at {endpoint}"
    if any(sign in low for sign in _LOG_IN):
        return Failure(
            AuthenticationError(
                f"{where} wants to know who asks: {said}; give user and password", code=name, definite=True
            ),
            transient=True,
            log_in=True,
        )
    advice = _distrust(low)
    if advice is not None:
        return Failure(
            AuthenticationError(f"no trusted connection to {where}: {said}; {advice}", code=name, definite=True),
            elsewhere=True,
        )
    if code is Code.UNAVAILABLE:
        definite = any(sign in low for sign in _NEVER_SENT)
        not_connected = "failed to connect" in low and any(sign in low for sign in _NO_TLS_HERE)
        tls = ", and that both sides use TLS or neither does" if not_connected else ""
        return Failure(
            UnavailableError(
                f"{where} can't serve requests: {said}; check the endpoints and that etcd is up{tls}",
                code=name,
                definite=definite,
            ),
            transient=True,
            definite=definite,
            elsewhere=True,
        )
    if code is Code.CANCELLED or timed_out(error) or any(sign in low for sign in _BROKEN_STREAM):
        why = "" if code is Code.DEADLINE_EXCEEDED else f": {said}"  # gRPC has only its own words for it
        return Failure(
            DeadlineExceededError(
                f"{where} did not answer in time{why}; check that it is up and has a leader, or give more time",
                code=name,
            ),
            transient=True,
            definite=False,
            elsewhere=True,
        )
    if "request is too large" in low or "received message larger than max" in low:
        return Failure(RecordTooLargeError(f"{where} refuses a transaction of this size: {said}; write less at once"))
    if code is Code.RESOURCE_EXHAUSTED:
        crowded = "too many requests" in low
        # the transaction that crosses the quota is carried out, and answered with the same error as those after it
        definite = "space exceeded" not in low
        advice = "" if crowded else "; free space (compact, defragment, disarm the alarm) or raise its limits"
        return Failure(
            ResourceExhaustedError(f"{where} is out of resources: {said}{advice}", code=name, definite=definite),
            transient=crowded,
            definite=definite,
        )
    if code is Code.OUT_OF_RANGE and "compacted" in low:
        return Failure(Compacted(said))
    if code is Code.PERMISSION_DENIED:
        return Failure(
            PermissionDeniedError(
                f"{where} refuses these keys to this user: {said}; grant its role readwrite on the prefix",
                code=name,
                definite=True,
            )
        )
    if "authentication failed" in low or code is Code.UNAUTHENTICATED:
        return Failure(
            AuthenticationError(
                f"{where} does not accept the credentials: {said}; check user and password", code=name, definite=True
            )
        )
    # only what etcd is known to say before it does anything counts as without effect
    definite = code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION, Code.UNIMPLEMENTED)
    return Failure(BackendError(f"{where} answered {name}: {said}", code=name, definite=definite), definite=definite)
