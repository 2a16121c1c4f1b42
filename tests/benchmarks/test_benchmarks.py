"""The parts of the benchmarks that judge, draw up tables and check answers; nothing is measured here."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from benchmarks import document, tables
from benchmarks.driver import Driver, DriverError
from benchmarks.drivers.messages import F1, Messages, ready
from benchmarks.drivers.sharing import Sharing
from benchmarks.drivers.slices import Tasks, Threads, WrongAnswerError
from benchmarks.figures import Findings, Table
from benchmarks.rounds import DroppedOutError, play

if TYPE_CHECKING:
    from benchmarks.figures import Sample


class Honest:
    """Claims in memory."""

    def __init__(self) -> None:
        self.claimed: set[str] = set()

    def open(self, address: dict[str, object], callers: int) -> None:
        """Do nothing."""

    def begin(self, run: str) -> None:
        """Do nothing."""

    def claim(self, caller: int, step: str) -> bool:
        """Claim."""
        del caller
        free = step not in self.claimed
        self.claimed.add(step)
        return free

    def end(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Generous(Honest):
    """Lets everybody win."""

    def claim(self, caller: int, step: str) -> bool:
        """Claim."""
        del caller, step
        return True


class Async:
    """The same for tasks."""

    def __init__(self, sync: Honest) -> None:
        self._sync = sync

    async def open(self, address: dict[str, object], callers: int) -> None:
        """Do nothing."""

    async def begin(self, run: str) -> None:
        """Do nothing."""

    async def claim(self, caller: int, step: str) -> bool:
        """Claim."""
        await asyncio.sleep(0)
        return self._sync.claim(caller, step)

    async def end(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""


SLICE = {"run": "r", "callers": 4, "seconds": 0.05, "warm_up": 0.01, "server_pids": []}


@pytest.mark.parametrize("make", [Threads, lambda each: Tasks(Async(each))], ids=["threads", "tasks"])
def test_a_slice_counts_and_checks(make: type[Threads]) -> None:
    """What is answered rightly is counted; a step that can be claimed twice fails the slice."""
    honest, generous = make(Honest()).commands(), make(Generous()).commands()
    told = honest["slice"](**SLICE)
    assert told["claims"] > 0
    assert len(told["percentiles_ms"]) == 101
    assert told["percentiles_ms"] == sorted(told["percentiles_ms"])
    assert told["p50_ms"] == pytest.approx(told["percentiles_ms"][50], abs=1e-3)
    with pytest.raises(WrongAnswerError, match="won"):
        generous["slice"](**SLICE)
    honest["close"]()
    generous["close"]()


def test_a_race_is_won_once_a_step() -> None:
    claims = Async(Honest())
    racers = [Tasks(claims).commands() for _ in range(2)]
    won = [step for racer in racers for step in racer["race"](steps=50, callers=8, start_at=0.0)["won"]]
    assert sorted(won) == list(range(50))
    for racer in racers:
        racer["close"]()


def test_rounds_keep_neighbours_together_and_leave_out_who_fails() -> None:
    """All have a sample of each round that counts; one that drops out has none at all."""
    order: list[str] = []
    table = Table("case")

    def measure(name: str) -> Sample:
        order.append(name)
        if name == "weak" and order.count("weak") == 3:
            raise DroppedOutError
        return {"claims_s": float(order.count(name))}

    play(
        table,
        [
            [("stub", lambda: measure("stub")), ("ours", lambda: measure("ours"))],
            [("weak", lambda: measure("weak"))],
            [("peer", lambda: measure("peer"))],
        ],
        3,
        lambda _: None,
    )
    assert {name: len(samples) for name, samples in table.samples.items()} == {"stub": 3, "ours": 3, "peer": 3}
    places = [index for index, name in enumerate(order) if name == "stub"]
    assert all("ours" in (*order[index - 1 : index], *order[index + 1 : index + 2]) for index in places)
    assert table.ratios("claims_s", "ours", "stub") == [1.0, 1.0, 1.0]


def test_ratios_are_judged_by_their_medians() -> None:
    findings = Findings()
    findings.ratio("fast", "of this", [1.0, 5.0, 3.0], at_least=3.0)
    findings.ratio("slow", "of that", [1.0, 1.2, 1.4], at_most=1.1)
    findings.ratio("told", "beside it", [2.0])
    told = findings.told()
    assert told["ratios"] == {"fast": 3.0, "slow": 1.2, "told": 2.0}
    assert [ratio.kept for ratio in findings.ratios] == [True, False, None]
    lines = tables.ratios(told["ratios_in_full"])
    assert lines[2].split("|")[1:6] == [" `fast` ", "      3 ", "   1 to 5 ", " ≥ 3    ", " yes  "]
    assert "no" in lines[3]


def test_calls_share_what_is_sent() -> None:
    """The first goes alone, the others together behind it, and each gets its own answer."""
    sent: list[list[str]] = []

    async def send(steps: list[str]) -> list[bool]:
        sent.append(steps)
        await asyncio.sleep(0)
        return [step != "b" for step in steps]

    async def whole() -> list[bool]:
        sharing = Sharing(send)
        first = asyncio.create_task(sharing.call("a"))
        await asyncio.sleep(0.01)
        return [await first, *await asyncio.gather(*(sharing.call(step) for step in "bc"))]

    assert asyncio.run(whole()) == [True, False, True]
    assert sent == [["a"], ["b", "c"]]


def test_every_message_is_delivered_twice_and_a_failed_one_again() -> None:
    """F1 runs through, and one delivery that fails comes a second time."""
    statuses: dict[str, str] = {}
    seen: list[str] = []

    def handle(run: str, step: str | None) -> None:
        if step is None:
            messages.publish(run, "a")
            return
        seen.append(step)
        if seen == ["a"]:
            raise ValueError(step)
        if step not in statuses:
            statuses[step] = "Succeeded"
            for each in ready(statuses):
                if each not in published:
                    published.add(each)
                    messages.publish(run, each)

    published: set[str] = set()
    messages = Messages(handle)
    messages.work_off(["run"], workers=1)
    assert set(statuses) == set(F1)
    assert messages.failed == ["ValueError: a"]
    assert sorted(seen) == sorted([*F1, *F1, "a"])


def test_a_driver_that_fails_says_why() -> None:
    with Driver("stub", "threads") as driver:
        with pytest.raises(DriverError, match="KeyError: 'nothing'"):
            driver.ask("nothing")
        with pytest.raises(DriverError, match="TypeError"):
            driver.ask("open")


def test_the_page_holds_the_figures_that_are_kept_beside_it() -> None:
    if not document.KEPT.exists():
        pytest.skip("no run is kept")
    told = json.loads(document.KEPT.read_text(encoding="utf-8"))
    assert document.figures(told) in document.PAGE.read_text(encoding="utf-8")
