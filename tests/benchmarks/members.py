"""A cluster of three members on the same machine, beside the one-member server of all other cases."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from benchmarks.against_stub import started
from benchmarks.rounds import slices
from servers import EtcdCluster

if TYPE_CHECKING:
    from benchmarks.against_stub import Bench
    from benchmarks.rounds import Group, Measure


def three(bench: Bench) -> None:
    """One caller and 64, all of whom ask the leader."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(EtcdCluster())
        endpoint = cluster.leader().endpoint
        pids = [member.pid for member in cluster.members]
        for callers in (1, 64):
            table = bench.table(
                f"three_members_{callers}", f"Three members, {callers} caller{'s' if callers > 1 else ''}"
            )
            with contextlib.ExitStack() as drivers:

                def own(
                    name: str, *arguments: str, drivers: contextlib.ExitStack = drivers, callers: int = callers
                ) -> tuple[str, Measure]:
                    driver = drivers.enter_context(started(*arguments, address={"endpoint": endpoint}, callers=callers))
                    return name, slices(driver, callers, bench.lengths, pids)

                groups: list[Group] = [
                    (own("stub_async", "stub", "tasks"), own("ours_async", "ours", "tasks", "try_claim")),
                    (own("stub_threads", "stub", "threads"), own("ours_threads", "ours", "threads", "try_claim")),
                ]
                bench.play(table, groups)
            for face in ("async", "threads"):
                name, said = ("p50_ms", "median time of a claim") if callers == 1 else ("claims_s", "claims a second")
                bench.findings.ratio(
                    f"three_members_{face}_{callers}",
                    f"{said}, three members, {callers} {face} / the bare stub's",
                    table.ratios(name, f"ours_{face}", f"stub_{face}"),
                )
