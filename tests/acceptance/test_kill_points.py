"""A worker killed with SIGKILL at each point between two store calls of a step's life; another one finishes the run.

What the dead worker had in hand is lost: only recovery finds it. Each result is committed once, by etcd's own history.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from acceptance.doomed import FLOW, STYLES, points
from stepclaim import EtcdRunStore, RunStatus, Settings
from stepclaim.cli import truth
from stepclaim.cli.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import EtcdServer
    from stepclaim import RunRecord

DOOMED = Path(__file__).with_name("doomed.py")
TTL = 2.0
GRACE = 0.5
AT_ONCE = 8


@dataclass(frozen=True)
class Case:
    """Where a worker dies."""

    style: str
    step_key: str
    point: str

    def __str__(self) -> str:
        return f"{self.style}, {self.step_key}: {self.point}"


@dataclass(frozen=True)
class Takeover:
    """What became of the run."""

    seconds: float
    run: RunRecord
    truth: truth.Truth
    found: list[str]
    dead: int


def _all_points() -> Iterator[Case]:
    """All points of a step in the middle, and of the last one those that complete the run."""
    for style in STYLES:
        yield from (Case(style, "b", point) for point in points(style, "b"))
        last = points(style, "c")
        yield from (Case(style, "c", point) for point in last[last.index("in the body") + 1 :])


CASES = list(_all_points())


def _take_over(etcd: EtcdServer, case: Case) -> Takeover:
    """Bring a run to the step, have a worker die there, and time how long another one needs to finish the run."""
    settings = Settings(endpoints=etcd.endpoint, prefix=f"/t-{uuid.uuid4().hex[:16]}", owner="heir", lease_ttl=30)
    with EtcdRunStore.connect(settings) as store:
        since = truth.revision(store)
        queue: list[str] = []
        engine = Engine(store, FLOW, lambda _: "{}", lambda _, key: queue.append(key))
        engine.trigger("run")
        while queue and queue[0] != case.step_key:
            engine.handle("run", queue.pop(0))
        assert queue.pop() == case.step_key  # this message is the doomed worker's
        words = (etcd.endpoint, settings.prefix, str(TTL), case.style, case.step_key, case.point)
        dead = subprocess.run([sys.executable, DOOMED, *words], capture_output=True, text=True, timeout=60, check=False)
        died = time.monotonic()
        queue += dead.stdout.split()
        found: list[str] = []
        while store.get_run_status("run") != RunStatus.SUCCEEDED and time.monotonic() < died + 4 * TTL + 10:
            while queue:
                engine.handle("run", queue.pop(0))
            found += [str(finding.kind) for finding in engine.recover(GRACE) if finding.mended]
            if not queue:
                time.sleep(0.05)
        seconds = time.monotonic() - died
        run = store.get_run("run")
        assert run is not None
        return Takeover(seconds, run, truth.read(store, settings, ["run"], since), found, dead.returncode)


@pytest.fixture(scope="module")
def takeovers(etcd: EtcdServer) -> Iterator[dict[Case, Future[Takeover]]]:
    """Have the workers of all cases die, some at a time; each test looks at its own."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case: pool.submit(_take_over, etcd, case) for case in CASES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_another_worker_finishes_the_run(takeovers: dict[Case, Future[Takeover]], case: Case) -> None:
    takeover = takeovers[case].result()
    assert takeover.dead == -signal.SIGKILL
    print(f"{case}: run over {takeover.seconds:.2f} s after the kill; found: {', '.join(takeover.found) or 'nothing'}")
    assert truth.problems(FLOW.expected(), RunStatus.SUCCEEDED, takeover.truth) == []
    assert takeover.truth.commits == {("run", key): 1 for key in FLOW.steps}
    assert takeover.seconds < TTL + 5


def test_the_points_are_those_of_a_step_s_life() -> None:
    """The list is read off the engine; these must be in it."""
    begin = ["before get_run_control", "before claim_step", "after claim_step", "in the body"]
    end = ["before complete_step", "after complete_step", "before sending"]
    found = points("claim_step", "b")
    assert [point for point in found if point in begin + end] == begin + end
    upstream = [
        "before try_claim_step", "before record_step_start", "after record_step_start", "in the body",
        "before record_step_complete", "before try_record_dispatch", "before sending",
    ]  # fmt: skip
    found = points("try_claim_step", "b")
    assert [point for point in found if point in upstream] == upstream
    assert points("claim_step", "c")[-2:] == ["before complete_run", "before the message is acknowledged"]
