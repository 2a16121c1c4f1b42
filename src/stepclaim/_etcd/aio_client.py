"""Performs operations for asyncio."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
from tenacity import AsyncRetrying

from stepclaim._etcd.channel import NO_ACCESS, Access, Member, Members, Tries, first_timeout
from stepclaim._etcd.commit import AsyncCommitter
from stepclaim._etcd.retry import Failed, policy
from stepclaim.errors import StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stepclaim.settings import Settings

R = TypeVar("R")


class AsyncClient:
    """Calls etcd from one event loop, with the same rules as the client for threads."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS) -> None:
        self.members = Members(
            settings,
            access,
            grpc.aio.insecure_channel,
            grpc.aio.secure_channel,
            lambda pairs: grpc.aio.Metadata(*pairs),
        )
        self.settings = settings
        self.committer = AsyncCommitter(self, settings.attempt_timeout)
        self.closing = False
        self.streams: set[Any] = set()

    async def attempt(self, method: Callable[[Member], Callable[..., Any]], request: Any, timeout: float) -> Any:
        """Ask the member in use once, after logging in where that is needed; raises `Failed`."""
        members = self.members
        member = members.current
        try:
            if members.needs_login:
                began = time.monotonic()
                await self._log_in(member, timeout)
                timeout = max(0.05, timeout - (time.monotonic() - began))
            return await method(member)(request, timeout=timeout, metadata=members.metadata)
        except grpc.RpcError as error:
            raise Failed(members.failed(error, member)) from error
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            if self.closed_beneath(error):
                raise StoreClosedError("the store was closed meanwhile: open another one") from error
            raise

    async def call(
        self,
        method: Callable[[Member], Callable[..., Any]],
        request: Any,
        deadline: float,
        *,
        attempts: int = 0,
    ) -> Any:
        """Ask until there is an answer; raises the last attempt's error."""
        try:
            return await self.attempt(method, request, first_timeout(self.settings, deadline))
        except Failed as failed:
            answer, _ = await self.persist(
                lambda timeout: self.attempt(method, request, timeout), deadline, failed=failed, attempts=attempts
            )
        return answer

    async def persist(
        self,
        attempt: Callable[[float], Awaitable[R]],
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

        async def once() -> R:
            timeout = tries.timeout()
            try:
                return await attempt(timeout)
            except Failed as again:
                tries.failed(again.failure)
                raise

        try:
            tries.failed(failed.failure)
            rules = policy(deadline, fenced=fenced, attempts=attempts)
            if attempts == 1 or not rules["retry"].predicate(failed):
                raise failed
            return await AsyncRetrying(**rules)(once), tries.in_doubt
        except Failed as last:
            raise tries.error(last.failure) from last.__cause__

    async def _log_in(self, member: Member, timeout: float) -> None:
        try:
            answer = await member.auth.Authenticate(self.members.login_request(), timeout=timeout)
        except grpc.RpcError as error:
            failure = self.members.login_failed(error, member)
            if failure is not None:
                raise Failed(failure) from error
        else:
            self.members.logged_in(answer.token)

    def closed_beneath(self, error: BaseException) -> bool:
        """Tell whether a call ended because the store closed its channel: gRPC says so as if the task was cancelled."""
        task = asyncio.current_task()
        ours = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
        return self.closing and not ours

    def stop_waiting(self) -> None:
        """End all watch streams: the store is being closed."""
        self.closing = True
        for call in tuple(self.streams):
            call.cancel()

    async def close(self) -> None:
        """Close all channels."""
        self.closing = True
        for member in self.members.all:
            await member.channel.close()
