"""F1, whole steps: 50 runs of ten steps, 16 workers, every message delivered twice; against upstream's statements."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

from benchmarks.counters import read_counters
from benchmarks.driver import Driver, DriverError
from benchmarks.etcd import Etcd

if TYPE_CHECKING:
    from benchmarks.against_stub import Bench
    from benchmarks.field import Field
    from benchmarks.figures import Sample, Table
    from benchmarks.rounds import Group, Measure

RUNS, STEPS, WORKERS = 50, 10, 16
UPSTREAM = {
    "upstream": "FlowOrchestrator's statements on PostgreSQL, all of them",
    "upstream_lean": "its run store's statements alone, PostgreSQL",
    "upstream_repaired": "its run store's statements alone, a refused start sent again, PostgreSQL",
}


def f1(bench: Bench, field: Field) -> None:
    """Play the rounds."""
    table = bench.table("f1", f"F1: {RUNS} runs of {STEPS} steps, {WORKERS} workers, every message twice")
    postgres, python = field.backend("postgres"), field.python("postgres")
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(Etcd())
        ours = stack.enter_context(Driver("f1_ours"))
        group: list[tuple[str, Measure]] = [
            ("ours_threads", _ours(ours, etcd, "threads")),
            ("ours_async", _ours(ours, etcd, "tasks")),
        ]
        if postgres is not None and python is not None:
            upstream = stack.enter_context(Driver("f1_upstream", python=python))
            conninfo = postgres.address["conninfo"]
            group.extend([(name, _upstream(upstream, name, conninfo, postgres.pids)) for name in UPSTREAM])
        else:
            bench.findings.left_out["f1_upstream"] = "there is no PostgreSQL, or no client of it"
        groups: list[Group] = [group]
        bench.play(table, groups)
    _judge(bench, table)


def _runs() -> list[str]:
    return [str(uuid.uuid4()) for _ in range(RUNS)]


def _ours(driver: Driver, etcd: Etcd, face: str) -> Measure:
    def measure() -> Sample:
        before = read_counters(etcd.endpoint)
        told: Sample = driver.ask(face, endpoint=etcd.endpoint, runs=_runs(), workers=WORKERS, server_pids=etcd.pids)
        looks = 2 * RUNS  # whether each run is finished, asked afterwards
        counted = read_counters(etcd.endpoint) - before
        if told["finished_runs"] != RUNS or told["bodies"] != RUNS * STEPS:
            raise DriverError(f"F1 by {face}: {told}")
        told["rpcs_a_step"] = (counted.rpcs - looks) / (RUNS * STEPS)
        told["reads_a_step"] = (counted.reads - looks) / (RUNS * STEPS)
        told["transactions_a_step"] = counted.txns / (RUNS * STEPS)
        told["write_transactions_a_step"] = counted.entries / (RUNS * STEPS)
        told["bytes_a_step"] = (counted.bytes_in + counted.bytes_out) / (RUNS * STEPS)
        del told["failures"]
        return told

    return measure


def _upstream(driver: Driver, name: str, conninfo: str, pids: list[int]) -> Measure:
    def measure() -> Sample:
        told: Sample = driver.ask(
            "work",
            conninfo=conninfo,
            runs=_runs(),
            workers=WORKERS,
            server_pids=pids,
            lean=name != "upstream",
            repaired=name == "upstream_repaired",
        )
        del told["failures"]
        return told

    return measure


def _judge(bench: Bench, table: Table) -> None:
    for face, said in (("ours_threads", "threads, the package's engine"), ("ours_async", "asyncio")):
        end = "" if face == "ours_threads" else "_async"
        for name, title in UPSTREAM.items():
            if name in table.samples:
                pairs = zip(table.values(face, "steps_s"), table.values(name, "steps_s"), strict=True)
                rounds = [mine / theirs for mine, theirs in pairs if theirs]  # a round may end with no run finished
                if rounds:
                    bench.findings.ratio(
                        f"f1_over_{name}{end}",
                        f"steps a second of runs that finished, F1 ({said}) / {title}",
                        rounds,
                        at_least=3.0 if name == "upstream" else None,
                    )
        bench.findings.ratio(
            f"f1_rpcs_a_step{end}",
            f"RPCs a step in F1, the engine's reads and refused duplicates included ({said})",
            table.values(face, "rpcs_a_step"),
            at_most=2.0,
        )
