"""A seeded selection of rounds, and the judge put to the test: a store that was broken deliberately must be caught.

Each round is one line of `python -m tests.faults.run`, which also plays as many as one likes; the README says more.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from faults.catalogue import FAULTS
from faults.cluster import Impossible
from faults.history import Outcome
from faults.rounds import Plan, Report, play
from faults.run import keep
from faults.workloads import WORKLOADS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

SELECTION = (
    (11, "hot-keys", ("kill-leader", "drop-replies")),
    (12, "fan-out", ("partition", "no-space")),
    (13, "release", ("stop-leader", "lose-replies")),
    (14, "deferred", ("worker-stop", "one-way")),
    (15, "watch", ("compaction", "kill-member", "defragmentation")),
    (16, "sessions", ("worker-kill", "half-open")),
    (17, "hot-keys", ("disk-full", "delay")),
    (18, "deferred", ("token-expiry",)),
    (19, "sessions", ("certificate-expiry", "slow-bytes")),
)
ELSEWHERE = (
    ("3.4.23", 21, "release", ("partition",)),
    ("3.5.16", 22, "fan-out", ("kill-leader",)),
    ("namespaces", 23, "hot-keys", ("partition",)),
    ("container", 24, "fan-out", ("kill-leader",)),
)


def _played(plan: Plan) -> Report:
    try:
        report = play(plan)
    except Impossible as why:
        pytest.skip(str(why))
    print(report.line)
    return report


def _is_well(report: Report, folder: Path) -> None:
    if report.anomalies:
        keep(report, folder)
    assert not report.anomalies
    assert report.recoveries, "nothing was broken"
    told = Counter(event.outcome for event in report.history.events)
    assert told[Outcome.OK] > 50, told


def test_the_selection_has_every_fault_and_every_workload() -> None:
    assert {fault for _, _, faults in SELECTION for fault in faults} == set(FAULTS)
    assert {workload for _, workload, _ in SELECTION} == set(WORKLOADS)


@pytest.mark.parametrize(("seed", "workload", "faults"), SELECTION, ids=["+".join(each[2]) for each in SELECTION])
def test_a_round(seed: int, workload: str, faults: tuple[str, ...], tmp_path: Path) -> None:
    _is_well(_played(Plan(seed, workload, faults)), tmp_path)


@pytest.mark.parametrize(("variant", "seed", "workload", "faults"), ELSEWHERE, ids=[each[0] for each in ELSEWHERE])
def test_a_round_elsewhere(variant: str, seed: int, workload: str, faults: tuple[str, ...], tmp_path: Path) -> None:
    _is_well(_played(Plan(seed, workload, faults, variant)), tmp_path)


@pytest.mark.parametrize(
    ("bug", "seed", "faults", "rules"),
    [
        ("unguarded-completion", 31, ("worker-stop",), {"a result without its claim", "two results"}),
        ("fresh-attempt-id", 33, ("lose-replies",), {"the loser wrote", "a claim that nobody knows of"}),
    ],
    ids=["unguarded-completion", "fresh-attempt-id"],
)
def test_a_deliberate_bug_is_caught(bug: str, seed: int, faults: tuple[str, ...], rules: set[str]) -> None:
    report = _played(Plan(seed, "hot-keys", faults, bug=bug))
    broken = Counter(anomaly.partition(":")[0] for anomaly in report.anomalies)
    print(f"{bug}: {dict(broken)}")
    assert rules.intersection(broken), broken
