"""Calls of many tasks that wait together and are sent together: what a client's pipelining makes possible."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Sharing:
    """Sends what has gathered as soon as what was sent before is answered; a lone call goes at once."""

    def __init__(self, send: Callable[[list[str]], Awaitable[list[bool]]]) -> None:
        self._send = send
        self._waiting: list[tuple[str, asyncio.Future[bool]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def call(self, step: str) -> bool:
        """Have one step claimed with others."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((step, future))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())
        return await future

    async def _send_all(self) -> None:
        while self._waiting:
            together, self._waiting = self._waiting, []
            try:
                answers = await self._send([step for step, _ in together])
            except Exception as error:  # noqa: BLE001 - told to each
                for _, future in together:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(together, answers, strict=True):
                    future.set_result(answer)
        self._sender = None
