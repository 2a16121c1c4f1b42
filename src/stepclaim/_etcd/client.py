"""Performs operations for threads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import grpc
from etcd3 import etcdrpc
from tenacity import Retrying

from stepclaim._core.ops import Answered, InDoubt
from stepclaim._etcd.channel import NO_ACCESS, Access, Member, Members, attempt_timeout, final_error
from stepclaim._etcd.retry import Failed, policy
from stepclaim.errors import ResourceExhaustedError, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim._etcd.status import Failure
    from stepclaim.settings import Settings


class Client:
    """Calls etcd from threads: one attempt after the other, on one member after the other, until the deadline."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS) -> None:
        self.members = Members(
            settings,
            access,
            grpc.insecure_channel,
            grpc.secure_channel,
        )
        self._settings = settings
        self.closing = False
        self.streams: set[Any] = set()

    def call(
        self,
        method: Callable[[Member], Callable[..., Any]],
        request: Any,
        deadline: float,
        *,
        write: bool = False,
        fenced: bool = False,
        attempts: int = 0,
    ) -> tuple[Any, bool]:
        """Give the answer, and whether an earlier attempt may have been carried out.

        Raises `InDoubt` for a fenced write whose outcome is not known, `OutcomeUnknownError` for another write whose
        deadline passed in doubt, and else the last attempt's error.
        """
        silent = 0
        in_doubt = earlier = False
        last: Failure | None = None

        def attempt() -> Any:
            nonlocal silent, in_doubt, earlier, last
            timeout = attempt_timeout(self._settings, deadline, silent, last, fenced=fenced)
            members = self.members
            member = members.current
            try:
                if members.needs_login:
                    began = time.monotonic()
                    self._log_in(member, timeout)
                    timeout = max(0.05, timeout - (time.monotonic() - began))
                return method(member)(request, timeout=timeout, metadata=members.metadata)
            except grpc.RpcError as error:
                last = failure = members.failed(error, member)
                silent += not failure.definite
                earlier, in_doubt = in_doubt, in_doubt or not failure.definite
                raise Failed(failure) from error
            except ValueError as error:  # gRPC's word for a channel that was closed
                if self.closing:
                    raise StoreClosedError("the store was closed meanwhile: open another one") from error
                raise

        try:
            try:
                return attempt(), False
            except Failed as failed:
                rules = policy(deadline, fenced=fenced, attempts=attempts)
                if attempts == 1 or not rules["retry"].predicate(failed):
                    raise
            return Retrying(**rules)(attempt), in_doubt
        except Failed as failed:
            error = failed.failure.error
            if fenced and not failed.failure.definite:
                raise (Answered(error) if isinstance(error, ResourceExhaustedError) else InDoubt()) from failed
            if isinstance(error, ResourceExhaustedError) and not earlier:
                raise error from failed.__cause__
            raise final_error(failed.failure, in_doubt=write and in_doubt) from failed.__cause__

    def _log_in(self, member: Member, timeout: float) -> None:
        try:
            answer = member.auth.Authenticate(self.members.login_request(), timeout=timeout)
        except grpc.RpcError as error:
            failure = self.members.login_failed(error, member)
            if failure is not None:
                raise Failed(failure) from error
        else:
            self.members.logged_in(answer.token)

    def keep_alive(self, lease: int, timeout: float) -> int:
        """Renew a lease once and give the seconds granted; 0 says that there is no such lease."""

        def renew(member: Member) -> Callable[..., Any]:
            def call(request: Any, *, timeout: float, metadata: Any) -> Any:
                stream = member.lease.LeaseKeepAlive(iter((request,)), timeout=timeout, metadata=metadata)
                try:
                    return next(stream)
                finally:
                    stream.cancel()

            return call

        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)
        answer, _ = self.call(renew, request, time.monotonic() + timeout)
        return int(answer.TTL)

    def stop_waiting(self) -> None:
        """End all watch streams: the store is being closed."""
        self.closing = True
        for call in tuple(self.streams):
            call.cancel()

    def close(self) -> None:
        """Close all channels."""
        self.closing = True
        for member in self.members.all:
            member.channel.close()
