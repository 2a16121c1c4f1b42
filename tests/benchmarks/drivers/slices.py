"""Slices: so many callers claim one step after the other for a second or two, and every call is timed and checked."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.drivers.cpu import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

LONGEST = 20.0
CHECKED_AGAIN = 10
"""Steps of a slice that are claimed once more afterwards, and must be refused."""

Address = dict[str, Any]


class WrongAnswerError(Exception):
    """A claim that should have been won was refused, or the other way round."""


class Claimer(Protocol):
    """What a client for threads must do. `begin` and `end` enclose a slice and are not measured."""

    def open(self, address: Address, callers: int) -> None:
        """Connect for at most so many callers."""

    def begin(self, run: str) -> None:
        """Get ready to claim steps of a run."""

    def claim(self, caller: int, step: str) -> bool:
        """Claim a step of that run: True for exactly one caller."""

    def end(self) -> None:
        """Give back what the slice took."""

    def close(self) -> None:
        """Disconnect."""


class AsyncClaimer(Protocol):
    """The same for tasks."""

    async def open(self, address: Address, callers: int) -> None:
        """Connect for at most so many callers."""

    async def begin(self, run: str) -> None:
        """Get ready to claim steps of a run."""

    async def claim(self, caller: int, step: str) -> bool:
        """Claim a step of that run: True for exactly one caller."""

    async def end(self) -> None:
        """Give back what the slice took."""

    async def close(self) -> None:
        """Disconnect."""


class Window:
    """The measured time: what went on before counts as warm-up."""

    def __init__(self, server_pids: list[int]) -> None:
        self._pids = server_pids
        self.running = True
        self.calls: list[tuple[float, float]] = []
        """When each call began and ended; lists are appended to by all threads at once without harm."""

    def begin(self) -> None:
        """Start the clocks."""
        self._server = cpu_seconds(self._pids)
        self._client = time.process_time()
        self._began = time.perf_counter()

    @property
    def empty(self) -> bool:
        """Whether no call has ended since the clocks were started: then it is too early to stop them."""
        if time.perf_counter() - self._began > LONGEST:
            raise WrongAnswerError(f"not one call was answered within {LONGEST} s")
        return not any(ended >= self._began for _, ended in reversed(self.calls))

    def end(self) -> None:
        """Stop the clocks, and let the callers end."""
        self._ended = time.perf_counter()
        self._client = time.process_time() - self._client
        self._server = cpu_seconds(self._pids) - self._server
        self.running = False

    def told(self) -> dict[str, Any]:
        """Tell what happened between the two."""
        inside = sorted(ended - began for began, ended in self.calls if self._began <= ended < self._ended)
        seconds = self._ended - self._began
        cuts = [inside[min(len(inside) - 1, len(inside) * percent // 100)] * 1000 for percent in range(101)]
        return {
            "claims": len(inside),
            "claims_s": len(inside) / seconds,
            "mean_ms": statistics.fmean(inside) * 1000,
            "p50_ms": cuts[50],
            "p90_ms": cuts[90],
            "p99_ms": cuts[99],
            "max_ms": cuts[100],
            **self.spent(len(inside)),
            "percentiles_ms": [round(each, 4) for each in cuts],
        }

    def spent(self, claims: int) -> dict[str, float]:
        """Tell the CPU time of a claim on both sides."""
        return {"client_us": self._client / claims * 1e6, "server_us": self._server / claims * 1e6}


def checked(won: bool, expected: bool, step: str) -> None:
    """Refuse a wrong answer."""
    if won is not expected:
        raise WrongAnswerError(f"the claim of step {step} was {'won' if won else 'refused'}")


class Threads:
    """Runs slices of a client for threads."""

    def __init__(self, claimer: Claimer) -> None:
        self._claimer = claimer

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Give what can be asked for."""
        return {"open": self._open, "slice": self._slice, "close": self._close}

    def _open(self, address: Address, callers: int) -> None:
        self._claimer.open(address, callers)

    def _close(self) -> None:
        self._claimer.close()

    def _slice(self, run: str, callers: int, seconds: float, warm_up: float, server_pids: list[int]) -> dict[str, Any]:
        window = Window(server_pids)
        failures: list[BaseException] = []

        def call(caller: int) -> None:
            claim, tell, now, number = self._claimer.claim, window.calls.append, time.perf_counter, 0
            try:
                while window.running:
                    began = now()
                    checked(claim(caller, f"{caller}-{number}"), True, f"{caller}-{number}")
                    tell((began, now()))
                    number += 1
            except BaseException as failure:  # noqa: BLE001 - told by the slice
                failures.append(failure)

        self._claimer.begin(run)
        try:
            threads = [threading.Thread(target=call, args=(caller,), daemon=True) for caller in range(callers)]
            for thread in threads:
                thread.start()
            time.sleep(warm_up)
            window.begin()
            time.sleep(seconds)
            while window.empty and not failures:
                time.sleep(0.05)
            window.end()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]
            for caller in range(min(callers, CHECKED_AGAIN)):
                checked(self._claimer.claim(caller, f"{caller}-0"), False, f"{caller}-0")
        finally:
            window.running = False
            self._claimer.end()
        return window.told()


class Tasks:
    """Runs slices of a client for asyncio, and races of several processes for the same steps."""

    def __init__(self, claimer: AsyncClaimer) -> None:
        self._claimer = claimer
        self._runner = asyncio.Runner()  # one loop for all: gRPC does not like a second one

    def commands(self) -> dict[str, Callable[..., Any]]:
        """Give what can be asked for."""
        return {
            "open": self._open,
            "slice": self._slice,
            "ready": self._ready,
            "race": self._race,
            "work": self._work,
            "finish": self._finish,
            "close": self._close,
        }

    def run(self, work: Awaitable[Any]) -> Any:
        """Run something in the loop."""

        async def wrapped() -> Any:
            return await work

        return self._runner.run(wrapped())

    def _open(self, address: Address, callers: int) -> None:
        self.run(self._claimer.open(address, callers))

    def _close(self) -> None:
        self.run(self._claimer.close())
        self._runner.close()

    def _slice(self, run: str, callers: int, seconds: float, warm_up: float, server_pids: list[int]) -> dict[str, Any]:
        window = Window(server_pids)

        async def call(caller: int) -> None:
            claim, tell, now, number = self._claimer.claim, window.calls.append, time.perf_counter, 0
            while window.running:
                began = now()
                checked(await claim(caller, f"{caller}-{number}"), True, f"{caller}-{number}")
                tell((began, now()))
                number += 1

        async def clock() -> None:
            await asyncio.sleep(warm_up)
            window.begin()
            await asyncio.sleep(seconds)
            while window.empty:  # noqa: ASYNC110 - an event would cost every call something
                await asyncio.sleep(0.05)
            window.end()

        async def whole() -> None:
            await self._claimer.begin(run)
            try:
                await asyncio.gather(clock(), *(call(caller) for caller in range(callers)))
                for caller in range(min(callers, CHECKED_AGAIN)):
                    checked(await self._claimer.claim(caller, f"{caller}-0"), False, f"{caller}-0")
            finally:
                window.running = False
                await self._claimer.end()

        self.run(whole())
        return window.told()

    def _ready(self, run: str) -> None:
        """Get ready for a race; a connection that is used for the first time is slow."""

        async def whole() -> None:
            await self._claimer.begin(run)
            checked(await self._claimer.claim(0, f"warm-up-{os.getpid()}"), True, "warm-up")

        self.run(whole())

    def _race(self, steps: int, callers: int, start_at: float) -> dict[str, Any]:
        """Claim steps that others claim, too; all begin at a time of the machine's clock."""
        won: list[int] = []
        times: list[float] = []

        async def call(caller: int, numbers: Iterator[int]) -> None:
            won.extend([number for number in numbers if await self._claimer.claim(caller, f"step-{number}")])

        async def whole() -> None:
            numbers = iter(range(steps))
            await asyncio.sleep(max(0.0, start_at - time.monotonic()))
            times.append(time.monotonic())
            await asyncio.gather(*(call(caller, numbers) for caller in range(callers)))
            times.append(time.monotonic())

        self.run(whole())
        return {"won": won, "began": times[0], "ended": times[1]}

    def _work(self, steps: int, callers: int, server_pids: list[int]) -> dict[str, Any]:
        """Claim so many steps of one's own, and tell the time and CPU that it took."""
        window = Window(server_pids)

        async def call(caller: int, numbers: Iterator[int]) -> None:
            for number in numbers:
                checked(await self._claimer.claim(caller, f"step-{number}"), True, f"step-{number}")

        async def whole() -> float:
            numbers = iter(range(steps))
            began = time.perf_counter()
            window.begin()
            await asyncio.gather(*(call(caller, numbers) for caller in range(callers)))
            window.end()
            return time.perf_counter() - began

        seconds = self.run(whole())
        return {"seconds": seconds, **window.spent(steps)}

    def _finish(self) -> None:
        """Give back what the race took, once it is over for all."""
        self.run(self._claimer.end())
