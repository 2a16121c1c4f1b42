"""Judges histories, from the command line.

    python -m tests.faults.judge HISTORY...                       our own: one verdict line each, then the anomalies
    python -m tests.faults.judge timeline HISTORY -o FILE.html    draws one
    python -m tests.faults.judge register LOG...                  Jepsen's register logs: name, tab, true or false

The first ends with 1 if there was an anomaly.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .case import Case
from .claim_register import ClaimRegister, operations
from .history import History
from .linearizability import Verdict, check
from .register import Register, read_log
from .rules import RULES
from .timeline import draw
from .truth import Anomaly

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SEARCH_SECONDS = 60.0


def judge(history: History, *, timeout: float = SEARCH_SECONDS) -> list[Anomaly]:
    """Give everything that must not be in a history: by the rules, and by the register of each step's claim.

    `timeout` bounds the search of each step, in seconds.
    """
    case = Case(history)
    found = list(case.truth.problems)
    for rule in RULES:
        found += rule(case)
    found += _registers(case, timeout)
    return found


def _registers(case: Case, timeout: float) -> Iterator[Anomaly]:
    for key in sorted({*case.of_step, *case.truth.steps}):
        result = check(ClaimRegister(), operations(case, key), timeout=timeout)
        if result.verdict is Verdict.TRUE:
            continue
        stuck = result.stuck
        ids = tuple(each.id for each in case.of_step.get(key, ()) if stuck is not None and str(each) == stuck.name)
        where = f"the claim of {key[1]!r} in run {key[0]!r}"
        what = stuck.name if stuck is not None else "nothing yet"
        if result.verdict is Verdict.FALSE:
            yield Anomaly("not linearizable", f"no order of the calls on {where} explains {what}", ids)
        else:
            yield Anomaly("undecided", f"{where}: the search ran out of time at {what}", ids)


def _judge_files(files: Sequence[str]) -> int:
    bad = 0
    for file in files:
        history = History.load(file)
        anomalies = judge(history)
        bad += bool(anomalies)
        verdict = f"{len(anomalies)} anomalies" if anomalies else "no anomaly"
        size = f"{len(history.events)} operations, {len(history.truth)} changes, {len(history.faults)} faults"
        print(f"{Path(file).name}\t{verdict}\t{history.workload}, seed {history.seed}: {size}")
        for anomaly in anomalies:
            print(f"  {anomaly}")
    return 1 if bad else 0


def _judge_logs(files: Sequence[str]) -> int:
    for file in files:
        verdict = check(Register(), read_log(file), timeout=SEARCH_SECONDS).verdict
        print(f"{Path(file).name}\t{verdict}", flush=True)
    return 0


def _draw_file(file: str, target: str) -> int:
    history = History.load(file)
    Path(target).write_text(draw(history, judge(history)), encoding="utf-8")
    print(target)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m tests.faults.judge", description=(__doc__ or "").split("\n")[0])
    command = given[0] if given and given[0] in {"register", "timeline"} else ""
    if command:
        given = given[1:]
        parser.prog += f" {command}"
    if command == "timeline":
        parser.add_argument("file", help="a history")
        parser.add_argument("-o", "--output", required=True, help="the HTML file to write")
        options = parser.parse_args(given)
        return _draw_file(options.file, options.output)
    what = "a log of Jepsen's register" if command else "a history, or: register LOG..., timeline HISTORY -o FILE.html"
    parser.add_argument("files", nargs="+", help=what)
    options = parser.parse_args(given)
    return _judge_logs(options.files) if command else _judge_files(options.files)


if __name__ == "__main__":
    sys.exit(main())
