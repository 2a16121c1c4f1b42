"""stepclaim against the bare stub: what `--quick` measures, and the full run too."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.counters import read_counters
from benchmarks.driver import Driver, DriverError
from benchmarks.etcd import Etcd
from benchmarks.figures import Findings, Table
from benchmarks.rounds import fresh, play, slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.figures import Sample
    from benchmarks.rounds import Group, Lengths, Measure

MANY = 10_000
SAME = 64


@dataclass(frozen=True)
class Bench:
    """What every case needs: where its findings go, how long it measures, whom it tells of its progress."""

    findings: Findings
    lengths: Lengths
    tell: Callable[[str], None]

    def table(self, name: str, title: str) -> Table:
        """Begin a case's table."""
        table = self.findings.tables[name] = Table(title)
        return table

    def play(self, table: Table, groups: list[Group], rounds: int | None = None) -> None:
        """Play a case's rounds."""
        play(table, groups, rounds or self.lengths.rounds, self.tell)


@contextlib.contextmanager
def started(script: str, *arguments: str, address: dict[str, Any], callers: int) -> Iterator[Driver]:
    """Start one of the project's own drivers and connect it."""
    with Driver(script, *arguments) as driver:
        driver.ask("open", address=address, callers=callers)
        yield driver
        driver.ask("close")


def alone(bench: Bench) -> None:
    """One caller: call by call in one process, on both faces."""
    lengths = bench.lengths
    for face, said in (("sync", "threads"), ("async", "asyncio")):
        table = bench.table(f"alone_{face}", f"One caller, {said}, call by call in turns")
        with Etcd() as etcd, Driver("side_by_side") as driver:
            for number in range(lengths.rounds):
                told = driver.ask(
                    f"alone_{face}", endpoint=etcd.endpoint, run=fresh(), calls=lengths.lone_calls, warm_up=100
                )
                table.add("ours", {"p50_ms": told["ours_ms"]})
                table.add("stub", {"p50_ms": told["stub_ms"]})
                bench.tell(f"{table.title}: round {number + 1} of {lengths.rounds}")
        bench.findings.ratio(
            f"alone_{face}",
            f"median time of a lone try_claim_step ({said}) / of the bare stub's transaction",
            table.ratios("p50_ms", "ours", "stub"),
            at_most=1.10,
        )


def together(
    bench: Bench, callers: int, peers: Callable[[contextlib.ExitStack, Etcd], list[Group]] | None = None
) -> None:
    """So many callers in one process: tasks and threads, and whoever else takes part."""
    table = bench.table(f"callers_{callers}", f"{callers} caller{'s' if callers > 1 else ''} in one process")
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(Etcd())

        def own(name: str, *arguments: str) -> tuple[str, Measure]:
            driver = stack.enter_context(started(*arguments, address=etcd.address, callers=callers))
            return name, slices(driver, callers, bench.lengths, etcd.pids)

        groups: list[Group] = [
            (own("stub_async", "stub", "tasks"), own("ours_async", "ours", "tasks", "try_claim")),
            (own("stub_threads", "stub", "threads"), own("ours_threads", "ours", "threads", "try_claim")),
        ]
        if callers == SAME:
            bulk = stack.enter_context(started("ours", "tasks", "claim", address=etcd.address, callers=callers))
            groups.append(
                (
                    own("stub_async_beside_claim_step", "stub", "tasks"),
                    own("ours_claim_step", "ours", "tasks", "claim"),
                    ("ours_claim_steps", claim_steps(bulk, bench.lengths)),
                )
            )
        if peers is not None:
            groups += peers(stack, etcd)
        bench.play(table, groups)
    _judge(bench, table, callers)


def claim_steps(driver: Driver, lengths: Lengths) -> Measure:
    """Make what has 10,000 steps claimed by one call."""

    def measure() -> Sample:
        sample: Sample = driver.ask("claim_steps", run=fresh(), count=MANY, seconds=lengths.slice_seconds)
        return sample

    return measure


def _judge(bench: Bench, table: Table, callers: int) -> None:
    ratio = bench.findings.ratio
    wanted = {64: 3.0, 256: 3.5}.get(callers)
    tasks = f"{callers} asyncio callers" if callers > 1 else "one asyncio caller"
    threads = f"{callers} threads" if callers > 1 else "one thread"
    ratio(
        f"async_{callers}",
        f"claims a second, {tasks} / the bare asyncio stub's",
        table.ratios("claims_s", "ours_async", "stub_async"),
        at_least=wanted,
    )
    ratio(
        f"async_{callers}_latency",
        f"median time of a claim, {tasks} / the bare asyncio stub's",
        table.ratios("p50_ms", "ours_async", "stub_async"),
        at_most=0.4 if callers == SAME else None,
    )
    ratio(
        f"threads_{callers}",
        f"claims a second, {threads} / the bare sync stub's",
        table.ratios("claims_s", "ours_threads", "stub_threads"),
        at_least=2.5 if callers == SAME else None,
    )
    ratio(
        f"threads_{callers}_latency",
        f"median time of a claim, {threads} / the bare sync stub's",
        table.ratios("p50_ms", "ours_threads", "stub_threads"),
    )
    if callers != SAME:
        return
    ratio(
        "claim_step_64",
        "claim_step (claim, status and attempt in one) a second, 64 asyncio callers / the bare asyncio stub's claims",
        table.ratios("claims_s", "ours_claim_step", "stub_async_beside_claim_step"),
        at_least=2.0,
    )
    ratio(
        "claim_steps_10000",
        "steps a second by claim_steps of 10,000 keys / the bare asyncio stub's claims with 64 callers",
        table.ratios("claims_s", "ours_claim_steps", "stub_async_beside_claim_step"),
        at_least=4.0,
    )
    ratio(
        "claim_steps_10000_by_claim_step",
        "steps a second by claim_steps of 10,000 keys / by claim_step with 64 asyncio callers",
        table.ratios("claims_s", "ours_claim_steps", "ours_claim_step"),
    )


def statuses(bench: Bench, sizes: tuple[int, ...], calls: int) -> None:
    """Statuses of a run, against reading the same keys in pages."""
    table = bench.table("statuses", "get_step_statuses of a run, call by call in turns")
    with Etcd() as etcd, Driver("side_by_side") as driver:
        for steps in sizes:
            run = f"statuses-{steps}"
            driver.ask("prepare_statuses", endpoint=etcd.endpoint, run=run, steps=steps, patience=300)
            for number in range(bench.lengths.rounds):
                told = driver.ask("statuses", endpoint=etcd.endpoint, run=run, steps=steps, calls=calls)
                table.add(f"ours_{steps}", {"p50_ms": told["ours_ms"]})
                table.add(f"stub_{steps}", {"p50_ms": told["stub_ms"]})
                bench.tell(f"{table.title}: {steps:,} steps, round {number + 1} of {bench.lengths.rounds}")
            bench.findings.ratio(
                f"statuses_{steps}",
                f"time of get_step_statuses of {steps:,} steps / of a bare paged range read of the same bytes",
                table.ratios("p50_ms", f"ours_{steps}", f"stub_{steps}"),
                at_most=1.3 if steps == MANY else None,
            )


def identical(bench: Bench) -> None:
    """64 claims of one step at one moment in one process: how many transactions they cost."""
    table = bench.table("identical_64", "64 identical concurrent claims of one step in one process")
    with Etcd() as etcd, Driver("side_by_side") as driver:
        for face in ("stub", "tasks", "threads"):
            for _ in range(bench.lengths.rounds):
                run = fresh()
                driver.ask("identical", endpoint=etcd.endpoint, run=f"{run}-one", face=face, callers=1)
                before = read_counters(etcd.endpoint)
                driver.ask("identical", endpoint=etcd.endpoint, run=f"{run}-again", face=face, callers=1)
                middle = read_counters(etcd.endpoint)
                told = driver.ask("identical", endpoint=etcd.endpoint, run=run, face=face, callers=SAME)
                after = read_counters(etcd.endpoint)
                if told["won"] != 1:
                    raise DriverError(f"{told['won']} of {SAME} identical claims were won ({face})")
                lone, all_of_them = middle - before, after - middle  # the session's own are in both
                table.add(
                    face,
                    {
                        "transactions": all_of_them.txns - lone.txns + 1,
                        "write_transactions": all_of_them.entries - lone.entries + 1,
                    },
                )
            bench.tell(f"{table.title}: {face}")
    for face, said in (("tasks", "tasks"), ("threads", "threads")):
        name = "identical_64" if face == "tasks" else "identical_64_threads"
        bench.findings.ratio(
            name,
            f"transactions of 64 identical claims ({said}) / of one",
            table.values(face, "transactions"),
            at_most=1.0,
        )
