"""When to try again, by tenacity: transient failures, exponential backoff with full jitter, one deadline a call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tenacity import RetryCallState, retry_if_exception, wait_random_exponential

if TYPE_CHECKING:
    from stepclaim._etcd.status import Failure

FIRST_WAIT = 0.04
LONGEST_WAIT = 1.0

_jitter = wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)


class Failed(Exception):  # noqa: N818 - carries a judged failure to the policy, never leaves the package
    """One attempt failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def policy(deadline: float, *, fenced: bool = False, attempts: int = 0) -> dict[str, Any]:
    """Give tenacity's arguments for one call.

    A fenced write is tried again only where the failure was definite. With `attempts` the call also ends after that
    many, so that opening a store tells at once of a cluster that refuses.
    """

    def again(error: BaseException) -> bool:
        if not isinstance(error, Failed) or not error.failure.transient:
            return False
        return error.failure.definite or not fenced

    def stop(state: RetryCallState) -> bool:
        return time.monotonic() >= deadline or bool(attempts and state.attempt_number >= attempts)

    def wait(state: RetryCallState) -> float:
        return min(_jitter(state), max(0.0, deadline - time.monotonic()))

    return {"retry": retry_if_exception(again), "stop": stop, "wait": wait, "reraise": True}
