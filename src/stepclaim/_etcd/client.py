"""Performs operations for threads."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from etcd3 import etcdrpc
from tenacity import Retrying

from stepclaim._etcd.channel import NO_ACCESS, Access, Member, Members, Tries, first_timeout
from stepclaim._etcd.commit import Committer
from stepclaim._etcd.retry import Failed, policy
from stepclaim.errors import StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim.settings import Settings

R = TypeVar("R")


def _raised(failed: Failed) -> Any:
    raise failed


class Client:
    """Calls etcd from threads: one attempt after the other, on one member after the other, until the deadline."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS) -> None:
        self.members = Members(
            settings,
            access,
            grpc.insecure_channel,
            grpc.secure_channel,
        )
        self.settings = settings
        self.committer = Committer(self, settings.attempt_timeout)
        self.closing = False
        self.streams: set[Any] = set()

    def attempt(self, method: Callable[[Member], Callable[..., Any]], request: Any, timeout: float) -> Any:
        """Ask the member in use once, after logging in where that is needed; raises `Failed`."""
        members = self.members
        member = members.current
        try:
            if members.needs_login:
                timeout = self._log_in_first(member, timeout)
            return method(member)(request, timeout=timeout, metadata=members.metadata)
        except grpc.RpcError as error:
            raise Failed(members.failed(error, member)) from error
        except ValueError as error:
            self._check_open(error)
            raise

    def begin(self, method: Callable[[Member], Any], request: Any, timeout: float) -> Callable[[], Any]:
        """Ask as `attempt` does without waiting; what is given back does that, and raises what there is to raise."""
        try:
            return self._begun(method, request, timeout)
        except Failed as failed:
            return partial(_raised, failed)

    def _begun(self, method: Callable[[Member], Any], request: Any, timeout: float) -> Callable[[], Any]:
        members = self.members
        member = members.current
        try:
            if members.needs_login:
                timeout = self._log_in_first(member, timeout)
            call = method(member).future(request, timeout=timeout, metadata=members.metadata)
        except grpc.RpcError as error:
            raise Failed(members.failed(error, member)) from error
        except ValueError as error:
            self._check_open(error)
            raise

        def answer() -> Any:
            try:
                return call.result()
            except grpc.RpcError as error:
                raise Failed(members.failed(error, member)) from error
            except grpc.FutureCancelledError as error:
                self._check_open(error)
                raise

        return answer

    def _check_open(self, error: Exception) -> None:
        """Tell of a channel that was closed, which gRPC has other words for."""
        if self.closing:
            raise StoreClosedError("the store was closed meanwhile: open another one") from error

    def call(
        self,
        method: Callable[[Member], Callable[..., Any]],
        request: Any,
        deadline: float,
        *,
        attempts: int = 0,
        begun: Callable[[], Any] | None = None,
    ) -> Any:
        """Ask until there is an answer; raises the last attempt's error. The first attempt may be under way."""
        try:
            if begun is not None:
                return begun()
            return self.attempt(method, request, first_timeout(self.settings, deadline))
        except Failed as failed:
            answer, _ = self.persist(
                lambda timeout: self.attempt(method, request, timeout), deadline, failed=failed, attempts=attempts
            )
        return answer

    def persist(
        self,
        attempt: Callable[[float], R],
        deadline: float,
        *,
        failed: Failed,
        write: bool = False,
        fenced: bool = False,
        attempts: int = 0,
    ) -> tuple[R, bool]:
        """Attempt again after a first failure, each time with so many seconds, until it works.

        Also tells whether an earlier attempt may have worked, too.

        Raises `InDoubt` for a fenced write whose outcome is not known, `OutcomeUnknownError` for another write whose
        deadline passed in doubt, and else the last attempt's error.
        """
        tries = Tries(self.settings, deadline, write=write, fenced=fenced)

        def once() -> R:
            timeout = tries.timeout()
            try:
                return attempt(timeout)
            except Failed as again:
                tries.failed(again.failure)
                raise

        try:
            tries.failed(failed.failure)
            rules = policy(deadline, fenced=fenced, attempts=attempts)
            if attempts == 1 or not rules["retry"].predicate(failed):
                raise failed
            return Retrying(**rules)(once), tries.in_doubt
        except Failed as last:
            raise tries.error(last.failure) from last.__cause__

    def _log_in_first(self, member: Member, timeout: float) -> float:
        """Get a token; gives the time that is left."""
        began = time.monotonic()
        self._log_in(member, timeout)
        return max(0.05, timeout - (time.monotonic() - began))

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
        return int(self.call(renew, request, time.monotonic() + timeout).TTL)

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
