"""Several processes at once: each with callers of its own, or all racing for the same steps."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.against_stub import started
from benchmarks.counters import read_counters
from benchmarks.driver import DriverError
from benchmarks.etcd import Etcd
from benchmarks.rounds import fresh

if TYPE_CHECKING:
    from benchmarks.against_stub import Bench
    from benchmarks.driver import Driver
    from benchmarks.field import Field
    from benchmarks.figures import Sample, Table
    from benchmarks.rounds import Group, Lengths, Measure

CALLERS = 64
RACERS = 8
STEPS = 10_000
TOGETHER = ("redis_lock", "redis_pipelined", "postgres", "postgres_pipelined", "aetcd_lock")
"""The peers that take part in several processes: those that are not far behind in one."""


def side_by_side(bench: Bench, field: Field, count: int) -> None:
    """Several processes with 64 callers each, every one on steps of its own."""
    table = bench.table(f"processes_{count}", f"{count} processes with {CALLERS} callers each")
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(Etcd())

        def own(name: str, *arguments: str) -> tuple[str, Measure]:
            drivers = [
                stack.enter_context(started(*arguments, address=etcd.address, callers=CALLERS)) for _ in range(count)
            ]
            return name, _all_at_once(drivers, bench.lengths, etcd.pids)

        groups: list[Group] = [
            (own("stub_async", "stub", "tasks"), own("ours_async", "ours", "tasks", "try_claim")),
        ]
        for peer in field.taking_part(CALLERS):
            if peer.name in TOGETHER:
                found = [field.start(stack, peer, etcd, CALLERS) for _ in range(count)]
                there = [driver for driver in found if driver is not None]
                if len(there) == count:
                    measure = _all_at_once(there, bench.lengths, field.pids(peer, etcd))
                    groups.append([(peer.name, field.tolerant(peer, measure))])
        bench.play(table, groups)
    bench.findings.ratio(
        f"processes_{count}",
        f"claims a second, {count} processes with {CALLERS} asyncio callers each / the bare asyncio stub's",
        table.ratios("claims_s", "ours_async", "stub_async"),
    )


def _all_at_once(drivers: list[Driver], lengths: Lengths, server_pids: list[int]) -> Measure:
    def measure() -> Sample:
        for driver in drivers:
            driver.tell(
                "slice",
                run=fresh(),
                callers=CALLERS,
                seconds=lengths.slice_seconds,
                warm_up=lengths.warm_up_seconds,
                server_pids=server_pids,
            )
        told: list[Sample] = [driver.answer() for driver in drivers]
        mean = ("mean_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms", "client_us", "server_us")
        sample: Sample = {name: statistics.fmean(each[name] for each in told) for name in mean}
        sample["server_us"] /= len(drivers)  # each saw what the server spent on all
        sample |= {name: sum(each[name] for each in told) for name in ("claims", "claims_s")}
        return sample

    return measure


def race(bench: Bench) -> None:
    """Eight processes with 64 callers each, all of them claiming the same 10,000 steps."""
    table = bench.table("race", f"{RACERS} processes with {CALLERS} callers each, racing for the same {STEPS:,} steps")
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(Etcd())
        fields = {
            name: [
                stack.enter_context(started(*arguments, address=etcd.address, callers=CALLERS)) for _ in range(RACERS)
            ]
            for name, arguments in (("stub_async", ("stub", "tasks")), ("ours_async", ("ours", "tasks", "try_claim")))
        }
        for number in range(bench.lengths.rounds + 1):
            for name in sorted(fields, reverse=number % 2 == 1):
                sample = _race(etcd, fields[name], STEPS if number else STEPS // 10)
                if number:
                    table.add(name, sample)
            bench.tell(f"{table.title}: {f'round {number} of {bench.lengths.rounds}' if number else 'warm-up'}")
    _judge_race(bench, table)


def _race(etcd: Etcd, drivers: list[Driver], steps: int) -> Sample:
    run = fresh()
    for driver in drivers:
        driver.tell("ready", run=run)
    for driver in drivers:
        driver.answer()
    before = read_counters(etcd.endpoint)
    start_at = time.monotonic() + 0.3
    for driver in drivers:
        driver.tell("race", steps=steps, callers=CALLERS, start_at=start_at)
    told = [driver.answer() for driver in drivers]
    counted = read_counters(etcd.endpoint) - before
    for driver in drivers:
        driver.tell("finish")
    for driver in drivers:
        driver.answer()
    won = sorted(step for each in told for step in each["won"])
    if won != list(range(steps)):
        raise DriverError(f"a race for {steps} steps was won {len(won)} times, {len(set(won))} of the steps at all")
    seconds = max(each["ended"] for each in told) - min(each["began"] for each in told)
    return {
        "seconds": seconds,
        "claims_s": steps * len(drivers) / seconds,
        "write_transactions": counted.entries,
        "revisions": counted.revisions,
        "rpcs": counted.rpcs,
    }


def _judge_race(bench: Bench, table: Table) -> None:
    bench.findings.ratio(
        "race",
        f"time of the race by bare asyncio stubs / by stepclaim ({RACERS} times {CALLERS} callers, {STEPS:,} steps)",
        table.ratios("seconds", "stub_async", "ours_async"),
        at_least=4.0,
    )
    bench.findings.ratio(
        "race_writes",
        f"write transactions in etcd for the {RACERS * STEPS:,} calls of the race (raft's entries)",
        table.values("ours_async", "write_transactions"),
        at_most=8000,
    )
