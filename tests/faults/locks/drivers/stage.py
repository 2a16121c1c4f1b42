"""The peer's side of the talk: does what a line of JSON on stdin says, and answers with one on stdout.

`{"do": "acquire", "name": "x"}` calls the holder's method of that name; the answer is `{"value": ...}`, or `{"error":
..., "message": ...}` with what it raised. Ends with stdin.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import sys
from typing import Any, Protocol


class Holder(Protocol):
    """One caller with one lock; each method may be a coroutine. `name` is the lock's, `True` means told as done."""

    def connect(self, host: str, port: int, ttl: int, timeout: float | None) -> Any:
        """Connect; `timeout` is what a careful user sets, None is what the library does by itself."""

    def prepare(self, name: str) -> Any:
        """Make what has to be there before."""

    def acquire(self, name: str) -> Any:
        """Try once, without waiting for another holder: True or False. Again: the same lock object tries again."""

    def look(self) -> Any:
        """Ask as the library's user would whether the lock is still held."""

    def write(self, name: str, value: str) -> Any:
        """Write the protected value as the lock's user would."""

    def guarded(self, name: str, value: str) -> Any:
        """Write it in one step with a check that the lock is still held: True or False."""

    def release(self) -> Any:
        """Release: True, or False if told that it was not the holder's."""

    def close(self) -> Any:
        """Close the client."""


async def _do(holder: Any, do: str, arguments: dict[str, Any]) -> Any:
    if do == "look_then_write":
        if not await _do(holder, "look", {}):
            return False
        await _do(holder, "write", arguments)
        return True
    given = getattr(holder, do)(**arguments)
    return await given if inspect.isawaitable(given) else given


async def _play(holder: Holder) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        try:
            answer = {"value": await _do(holder, order.pop("do"), order)}
        except Exception as error:  # noqa: BLE001  # whatever a library raises is its answer
            answer = {"error": type(error).__name__, "message": str(error)[:300]}
        print(json.dumps(answer), flush=True)


def play(holder: Holder) -> None:
    """Play a holder until stdin ends."""
    logging.basicConfig(level=logging.CRITICAL)
    asyncio.run(_play(holder))
