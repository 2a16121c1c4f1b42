"""gRPC's and etcd's status to our errors, and to what may be done about each."""

from __future__ import annotations

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


_NEVER_SENT = ("failed to connect to all addresses", "connection refused", "dns resolution failed", "no leader")
_LOG_IN = ("invalid auth token", "revision of auth store is old", "auth old revision")
_DISTRUST = ("certificate_verify_failed", "wrong_version_number", "certificate required", "bad certificate")
_BROKEN_STREAM = ("rst_stream", "stream removed", "goaway", "socket closed", "connection reset")


def classify(error: grpc.RpcError, endpoint: str) -> Failure:
    """Judge one failed attempt."""
    code: grpc.StatusCode = error.code()
    said: str = error.details() or ""
    low = said.lower()
    name = code.name
    where = f"etcd at {endpoint}"
    if any(sign in low for sign in _LOG_IN):
        return Failure(
            AuthenticationError(f"{where} no longer accepts the token: {said}", code=name, definite=True),
            transient=True,
            log_in=True,
        )
    if any(sign in low for sign in _DISTRUST):
        return Failure(
            AuthenticationError(
                f"{where} and this client do not trust each other: {said}; check TLS, ca_file and certificates",
                code=name,
                definite=True,
            ),
            elsewhere=True,
        )
    if code is Code.UNAVAILABLE:
        definite = any(sign in low for sign in _NEVER_SENT)
        return Failure(
            UnavailableError(
                f"{where} can't serve requests: {said}; check the endpoints and that etcd is up",
                code=name,
                definite=definite,
            ),
            transient=True,
            definite=definite,
            elsewhere=True,
        )
    if code in (Code.DEADLINE_EXCEEDED, Code.CANCELLED) or any(sign in low for sign in _BROKEN_STREAM):
        return Failure(
            DeadlineExceededError(f"{where} did not answer in time: {said}", code=name),
            transient=True,
            definite=False,
            elsewhere=True,
        )
    if code is Code.RESOURCE_EXHAUSTED:
        crowded = "too many requests" in low
        advice = "" if crowded else "; free space (compact, defragment, disarm the alarm) or raise its limits"
        return Failure(
            ResourceExhaustedError(f"{where} is out of resources: {said}{advice}", code=name, definite=True),
            transient=crowded,
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
    if "authentication failed" in low or "user name is empty" in low or code is Code.UNAUTHENTICATED:
        return Failure(
            AuthenticationError(
                f"{where} does not accept the credentials: {said}; check user and password", code=name, definite=True
            )
        )
    if "request is too large" in low:
        return Failure(RecordTooLargeError(f"{where} refuses a transaction of this size: {said}; write less at once"))
    return Failure(BackendError(f"{where} answered {name}: {said}", code=name, definite=code is Code.INVALID_ARGUMENT))
