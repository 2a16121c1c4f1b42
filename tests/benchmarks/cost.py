"""What a step costs: RPCs, transactions and bytes as etcd counts them, CPU on both sides, memory for what is held."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from benchmarks.against_stub import MANY, started
from benchmarks.counters import read_counters
from benchmarks.etcd import Etcd
from benchmarks.rounds import fresh

if TYPE_CHECKING:
    from benchmarks.against_stub import Bench
    from benchmarks.driver import Driver
    from benchmarks.figures import Sample
    from benchmarks.rounds import Group, Measure

WAYS = {
    "stub": ("stub", "tasks"),
    "try_claim": ("ours", "tasks", "try_claim"),
    "claim_step": ("ours", "tasks", "claim"),
    "whole_step": ("ours", "tasks", "whole"),
}


def of_a_step(bench: Bench) -> None:
    """Count while one caller works, and while 64 do."""
    for callers in (1, 64):
        table = bench.table(f"cost_{callers}", f"Cost of a step, {callers} asyncio caller{'s' if callers > 1 else ''}")
        with contextlib.ExitStack() as stack:
            etcd = stack.enter_context(Etcd())
            group: list[tuple[str, Measure]] = []
            for name, way in WAYS.items():
                driver = stack.enter_context(started(*way, address=etcd.address, callers=callers))
                group.append((name, _counted(driver, callers, etcd)))
            groups: list[Group] = [group]
            bench.play(table, groups)
    bench.findings.ratio(
        "whole_step_rpcs_64",
        "RPCs a whole step (claim, start, complete), 64 asyncio callers",
        bench.findings.tables["cost_64"].values("whole_step", "rpcs"),
        at_most=2.0,
    )


def _counted(driver: Driver, callers: int, etcd: Etcd) -> Measure:
    """Make what does a fixed number of steps, so that etcd's counters can be divided by it."""
    steps = 300 if callers == 1 else 6000

    def measure() -> Sample:
        driver.ask("ready", run=fresh())
        before = read_counters(etcd.endpoint)
        told = driver.ask("work", steps=steps, callers=callers, server_pids=etcd.pids)
        counted = read_counters(etcd.endpoint) - before
        driver.ask("finish")
        return {
            "claims_s": steps / told["seconds"],
            "client_us": told["client_us"],
            "server_us": told["server_us"],
            "rpcs": counted.rpcs / steps,
            "transactions": counted.txns / steps,
            "write_transactions": counted.entries / steps,
            "bytes_in": counted.bytes_in / steps,
            "bytes_out": counted.bytes_out / steps,
        }

    return measure


def of_memory(bench: Bench) -> None:
    """Hold 10,000 claims in a fresh process, and see what it grows by."""
    table = bench.table("memory", f"Client memory with {MANY:,} held claims")
    with Etcd() as etcd:
        for name in ("try_claim", "claim_step"):
            for _ in range(3):
                with started(*WAYS[name], address=etcd.address, callers=64) as driver:
                    told = driver.ask("held", run=fresh(), count=MANY)
                grown = told["after_bytes"] - told["before_bytes"]
                table.add(
                    name,
                    {
                        "mib_before": told["before_bytes"] / 2**20,
                        "mib_after": told["after_bytes"] / 2**20,
                        "bytes_a_claim": grown / MANY,
                    },
                )
            bench.tell(f"{table.title}: {name}")
