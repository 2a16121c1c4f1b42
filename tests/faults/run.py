"""Plays rounds of faults: `python -m tests.faults.run --seed N --minutes M`.

Each round starts a cluster of three, lets workers work on it, does one to three things to it, waits until all is well
again, and has the history judged: one line each, and a summary. The history of a round with an anomaly is kept, with
the command that judges it again. Ends with 1 if there was one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

from faults.catalogue import FAULTS
from faults.cluster import Impossible
from faults.rounds import Plan, Report, play
from faults.variants import VARIANTS
from faults.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def plans(arguments: argparse.Namespace) -> Iterator[Plan]:
    """Give the rounds: so many, or as many as the minutes allow; every combination comes round in a long soak."""
    until = time.monotonic() + arguments.minutes * 60
    number = 0
    while (number < arguments.rounds) if arguments.rounds else (time.monotonic() < until):
        plan = Plan.from_seed(
            arguments.seed + number,
            workload=arguments.workload,
            faults=arguments.fault,
            variant=arguments.variant,
        )
        plan.bug = arguments.bug
        if arguments.at_most_once:
            plan.lease_ttl = None
        yield plan
        number += 1


def keep(report: Report, folder: Path) -> None:
    """Keep a failing history, and say how to judge it again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.plan.seed}-{report.plan.workload}.json"
    report.history.config["anomalies"] = report.anomalies
    report.history.save(path)
    for anomaly in report.anomalies[:12]:
        print(f"    {anomaly}")
    print(f"    again: {report.plan.command}")
    print(f"    judge: python -m tests.faults.judge {path}")
    print(f"    draw:  python -m tests.faults.judge timeline {path} -o {path.with_suffix('.html')}", flush=True)


@dataclass(frozen=True)
class Tally:
    """What is remembered of a round: a soak's histories would not fit."""

    workload: str
    faults: tuple[str, ...]
    operations: int
    unknown: int
    anomalies: int
    late: float
    recovery: float
    crashes: int

    @classmethod
    def of(cls, report: Report) -> Tally:
        """Take a report's numbers."""
        history = report.history
        return cls(
            report.plan.workload,
            tuple(done.kind for done in history.faults),
            len(history.events),
            report.unknown,
            len(report.anomalies),
            report.late,
            max(report.recoveries, default=0.0),
            len(history.config["crashes"]),
        )


def summary(rounds: Sequence[Tally], skipped: Counter[str]) -> str:
    """Sum up: totals, then fault by workload."""
    faults = Counter(fault for each in rounds for fault in each.faults)
    total = sum(each.operations for each in rounds), sum(each.unknown for each in rounds)
    anomalies = sum(each.anomalies for each in rounds)
    late = max((each.late for each in rounds), default=0.0)
    recovery = max((each.recovery for each in rounds), default=0.0)
    lines = [f"{len(rounds)} rounds, {total[0]} operations ({total[1]} unknown), {faults.total()} faults injected"]
    lines.append(f"{anomalies} anomalies")
    lines.append(f"slowest return past a deadline: {late:.2f} s (below zero: before it)")
    lines.append(f"slowest recovery: {recovery:.2f} s")
    lines.append(f"members that ended by themselves: {sum(each.crashes for each in rounds)}")
    lines += [f"skipped {count} rounds: {why}" for why, count in skipped.items()]
    lines.append("rounds / anomalies:")
    lines.append(f"| fault | {' | '.join(WORKLOADS)} |\n| --- |{' --- |' * len(WORKLOADS)}")
    for fault in sorted(faults):
        cells = []
        for workload in WORKLOADS:
            met = [each for each in rounds if fault in each.faults and each.workload == workload]
            cells.append(f"{len(met)} / {sum(each.anomalies for each in met)}" if met else "-")
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Play, tell, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1_000_000_000, help="the first round's seed")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no round after so many minutes")
    parser.add_argument("--rounds", type=int, default=0, help="play so many rounds instead")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="one workload instead of all")
    parser.add_argument("--fault", choices=sorted(FAULTS), action="append", default=[], help="these faults only")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="where etcd runs")
    parser.add_argument("--keep", type=Path, default=Path("fault-histories"), help="where failing histories go")
    parser.add_argument("--at-most-once", action="store_true", help="claims without a lease")
    parser.add_argument("--bug", default="", help="break the store deliberately: see bugs.py")
    arguments = parser.parse_args(words)
    rounds: list[Tally] = []
    skipped: Counter[str] = Counter()
    broken: list[Plan] = []
    try:
        for plan in plans(arguments):
            try:
                report = play(plan)
            except Impossible as why:
                skipped[str(why)] += 1
                print(f"seed {plan.seed}  skipped: {why}", flush=True)
                if arguments.variant or arguments.fault:
                    break  # it will be no other in the next round
                continue
            except Exception:  # noqa: BLE001  # the tape has a gap, or the cluster did not come back: the soak goes on
                broken.append(plan)
                print(f"seed {plan.seed}  broken: {plan.command}\n{traceback.format_exc()}", flush=True)
                continue
            print(report.line, flush=True)
            if report.anomalies:
                keep(report, arguments.keep)
            rounds.append(Tally.of(report))
    except KeyboardInterrupt:
        print(f"interrupted\n{summary(rounds, skipped)}")
        return 130
    print(summary(rounds, skipped))
    if broken:
        print(f"{len(broken)} rounds came to no end: seeds {', '.join(str(plan.seed) for plan in broken)}")
    return 1 if broken or any(each.anomalies for each in rounds) else 0


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # everything that was started is ended on the way out
    sys.exit(main())
