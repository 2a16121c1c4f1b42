"""Performs operations for asyncio."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc.aio
from tenacity import AsyncRetrying

from stepclaim._core.ops import Answered, InDoubt
from stepclaim._etcd.channel import NO_ACCESS, Access, Member, Members, attempt_timeout, final_error
from stepclaim._etcd.retry import Failed, policy
from stepclaim.errors import ResourceExhaustedError, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepclaim._etcd.status import Failure
    from stepclaim.settings import Settings


class AsyncClient:
    """Calls etcd from one event loop, with the same rules as the client for threads."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS) -> None:
        self.members = Members(
            settings,
            access,
            grpc.aio.insecure_channel,
            grpc.aio.secure_channel,
        )
        self._settings = settings
        self.closing = False
        self.streams: set[Any] = set()

    async def call(
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

        async def attempt() -> Any:
            nonlocal silent, in_doubt, earlier, last
            timeout = attempt_timeout(self._settings, deadline, silent, last, fenced=fenced)
            members = self.members
            member = members.current
            try:
                if members.needs_login:
                    began = time.monotonic()
                    await self._log_in(member, timeout)
                    timeout = max(0.05, timeout - (time.monotonic() - began))
                return await method(member)(request, timeout=timeout, metadata=members.metadata)
            except grpc.RpcError as error:
                last = failure = members.failed(error, member)
                silent += not failure.definite
                earlier, in_doubt = in_doubt, in_doubt or not failure.definite
                raise Failed(failure) from error
            except (grpc.aio.UsageError, asyncio.CancelledError) as error:
                if self.closed_beneath(error):
                    raise StoreClosedError("the store was closed meanwhile: open another one") from error
                raise

        try:
            try:
                return await attempt(), False
            except Failed as failed:
                rules = policy(deadline, fenced=fenced, attempts=attempts)
                if attempts == 1 or not rules["retry"].predicate(failed):
                    raise
            return await AsyncRetrying(**rules)(attempt), in_doubt
        except Failed as failed:
            error = failed.failure.error
            if fenced and not failed.failure.definite:
                raise (Answered(error) if isinstance(error, ResourceExhaustedError) else InDoubt()) from failed
            if isinstance(error, ResourceExhaustedError) and not earlier:
                raise error from failed.__cause__
            raise final_error(failed.failure, in_doubt=write and in_doubt) from failed.__cause__

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
