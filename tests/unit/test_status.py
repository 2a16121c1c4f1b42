"""What a gRPC status means: the error, whether another attempt may do better, whether the request had no effect."""

import time

import grpc
import pytest

from stepclaim._core.ops import Compacted
from stepclaim._etcd.channel import Tries
from stepclaim._etcd.status import Failure, classify, timed_out
from stepclaim.errors import (
    AuthenticationError,
    BackendError,
    DeadlineExceededError,
    OutcomeUnknownError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from stepclaim.settings import Settings

Code = grpc.StatusCode
NO_EFFECT = {
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.UNIMPLEMENTED,
    Code.PERMISSION_DENIED,
    Code.UNAUTHENTICATED,
    Code.RESOURCE_EXHAUSTED,
}
"""Codes that etcd gives before it does anything."""


class Answer(grpc.RpcError):  # type: ignore[misc]
    """What a call raises."""

    def __init__(self, code: grpc.StatusCode, said: str = "something") -> None:
        super().__init__(said)
        self._code = code
        self._said = said

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._said


def judged(code: grpc.StatusCode, said: str = "something") -> Failure:
    return classify(Answer(code, said), "host:2379")


@pytest.mark.parametrize("code", [each for each in Code if each is not Code.OK], ids=lambda code: code.name)
def test_only_what_is_said_before_anything_is_done_counts_as_without_effect(code: grpc.StatusCode) -> None:
    failure = judged(code)
    assert isinstance(failure.error, BackendError)
    assert failure.error.code == code.name
    assert failure.definite is failure.error.definite is (code in NO_EFFECT)


@pytest.mark.parametrize(
    "code", [Code.INTERNAL, Code.UNKNOWN, Code.ABORTED, Code.DATA_LOSS], ids=lambda code: code.name
)
def test_a_write_that_ends_without_a_clear_answer_is_in_doubt(code: grpc.StatusCode) -> None:
    tries = Tries(Settings(endpoints="host:2379"), time.monotonic() + 10, write=True, fenced=False)
    failure = judged(code)
    tries.failed(failure)
    error = tries.error(failure)
    assert isinstance(error, OutcomeUnknownError)
    assert (error.code, error.definite) == (code.name, False)


@pytest.mark.parametrize("said", ["context deadline exceeded", "context canceled", "rpc: context deadline exceeded"])
def test_etcds_own_clock_may_run_out_first(said: str) -> None:
    assert timed_out(Answer(Code.UNKNOWN, said))
    failure = judged(Code.UNKNOWN, said)
    assert isinstance(failure.error, DeadlineExceededError)
    assert (failure.transient, failure.definite, failure.error.definite) == (True, False, False)


@pytest.mark.parametrize(
    ("code", "said", "kind", "transient", "definite"),
    [
        (Code.UNAVAILABLE, "etcdserver: no leader", UnavailableError, True, True),
        (Code.UNAVAILABLE, "etcdserver: request timed out", UnavailableError, True, False),
        (Code.UNAVAILABLE, "etcdserver: leader changed", UnavailableError, True, False),
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: refused", UnavailableError, True, True),
        (Code.UNAVAILABLE, "Socket closed", UnavailableError, True, False),
        (Code.INTERNAL, "Received RST_STREAM with error code 2", DeadlineExceededError, True, False),
        (Code.CANCELLED, "Channel closed!", DeadlineExceededError, True, False),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests", ResourceExhaustedError, True, True),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", ResourceExhaustedError, False, False),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", PermissionDeniedError, False, True),
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", AuthenticationError, True, True),
        (Code.INVALID_ARGUMENT, "etcdserver: authentication failed, bad password", AuthenticationError, False, True),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", BackendError, False, True),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Compacted, False, True),
        (Code.INTERNAL, "transport: something broke", BackendError, False, False),
    ],
)
def test_what_etcd_says(
    code: grpc.StatusCode, said: str, kind: type[Exception], transient: bool, definite: bool
) -> None:
    failure = judged(code, said)
    assert type(failure.error) is kind
    assert (failure.transient, failure.definite) == (transient, definite)
    if isinstance(failure.error, BackendError):
        assert failure.error.definite is definite
