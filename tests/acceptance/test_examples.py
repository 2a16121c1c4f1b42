"""The programs in docs/examples as their reader runs them: twice each, and the Job's worker killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from servers import eventually
from stepclaim import EtcdRunStore, RunStatus, Settings, StepStatus
from stepclaim.cli import truth

if TYPE_CHECKING:
    from servers import EtcdServer

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
ITEMS = {f"file.{n}" for n in range(12)}


class Program:
    """One example, with an etcd and a prefix of its own."""

    def __init__(self, name: str, etcd: EtcdServer, prefix: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("STEPCLAIM_", "JOB_"))}
        self._environment = clean | {"STEPCLAIM_ENDPOINTS": etcd.endpoint, "STEPCLAIM_PREFIX": prefix}
        self.command = [sys.executable, "-W", "error", str(EXAMPLES / name)]

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Start it."""
        return subprocess.Popen(
            self.command,
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self, **environment: str) -> list[str]:
        """Run it to its end, and give what it printed."""
        with self.start(**environment) as process:
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, ""), out + err
        return out.splitlines()


class Store:
    """What a test asks etcd when a program has ended."""

    def __init__(self, etcd: EtcdServer, prefix: str) -> None:
        self.settings = Settings(endpoints=etcd.endpoint, prefix=prefix)
        with EtcdRunStore.connect(self.settings, session=False) as store:
            self._since = truth.revision(store)

    def outputs(self, run_id: str) -> dict[str, str | None]:
        """Give the outputs of the run's steps, all of which succeeded, each committed once by etcd's own history."""
        with EtcdRunStore.connect(self.settings, session=False) as store:
            # without a record of its own a run can't be read; one that has it keeps it
            store.start_run("flow", "made to be looked at", run_id, "test")
            run = store.get_run(run_id)
            found = truth.read(store, self.settings, [run_id], self._since)
        assert run is not None
        assert {step.status for step in run.steps} == {StepStatus.SUCCEEDED}
        assert found.commits == Counter({(run_id, step.step_key): 1 for step in run.steps})
        return {step.step_key: step.output_json for step in run.steps}

    def attempts(self, run_id: str) -> dict[str, int]:
        """Give the number of each step's attempts."""
        with EtcdRunStore.connect(self.settings, session=False) as store:
            found = store.get_run(run_id)
        assert found is not None
        return {step.step_key: step.attempt_count for step in found.steps}


@pytest.fixture
def store(etcd: EtcdServer, prefix: str) -> Store:
    return Store(etcd, prefix)


def test_celery_consumer(etcd: EtcdServer, prefix: str, store: Store) -> None:
    """Sent twice only where the first worker died; on the second run not at all."""
    program = Program("celery_consumer.py", etcd, prefix)
    first = program.lines()
    assert first.count("order-1: sending the mail") == 1
    assert first.count("order-2: sending the mail") == 2, "the first time the worker died"
    assert "order-2: its first worker ended with status 9; the broker delivers the message again" in first
    assert [line for line in first if "acknowledged" in line] == [
        "order-1: acknowledged, done",
        "order-1: acknowledged, was done before",
        "order-2: acknowledged, done",
    ]
    assert any(line.startswith("order-2: later: send-mail of order-2 is held by ") for line in first)
    second = program.lines()
    assert not any("sending" in line or "later" in line for line in second)
    assert [line.partition(":")[0] for line in second if "was done before" in line] == ["order-1", "order-1", "order-2"]
    for order, attempts in (("order-1", 1), ("order-2", 2)):
        assert store.outputs(order) == {"send-mail": json.dumps(f"mail for {order} sent")}
        assert store.attempts(order) == {"send-mail": attempts}


def test_indexed_job(etcd: EtcdServer, prefix: str, store: Store) -> None:
    """Three pods at once, then all of them once more: each item is done by the pod whose shard it is in."""
    program = Program("indexed_job.py", etcd, prefix)
    shards = [{"JOB_COMPLETION_INDEX": str(index), "JOB_COMPLETIONS": "3"} for index in range(3)]
    pods = [program.start(**shard) for shard in shards]
    told = []
    for pod in pods:
        with pod:
            out, err = pod.communicate(timeout=60)
        assert (pod.returncode, err) == (0, "")
        told += out.splitlines()
    assert sum("attempt 1" in line for line in told) == len(ITEMS)
    outputs = {item: json.loads(output or "null") for item, output in store.outputs("nightly-import").items()}
    assert outputs == {item: {"imported": item, "by": int(item[5:]) % 3} for item in ITEMS}
    # two pods that end together may each see the other's last item as final: the run is completed by one of them
    assert sum("completed the run" in line for line in told) == 1
    for shard in shards:
        again = program.lines(**shard)
        assert [line.partition(": ")[2] for line in again] == ["done before"] * 4 + ["done"]
    with EtcdRunStore.connect(store.settings, session=False) as looking:
        assert looking.get_run_status("nightly-import") == RunStatus.SUCCEEDED


def test_indexed_job_killed_in_the_middle(etcd: EtcdServer, prefix: str, store: Store) -> None:
    """SIGKILL in the body of an item: the next pod takes that item over, does the rest, and leaves the others alone."""
    program = Program("indexed_job.py", etcd, prefix)
    with program.start(ITEM_SECONDS="0.3") as pod:
        assert pod.stdout is not None
        begun = [pod.stdout.readline().partition(":")[0] for _ in range(4)]
        pod.send_signal(signal.SIGKILL)
    assert pod.returncode == -signal.SIGKILL
    with EtcdRunStore.connect(store.settings, session=False) as looking:
        assert looking.get_claimed_step_keys("nightly-import") == {begun[-1]}
        done = {key for key, status in looking.get_step_statuses("nightly-import").items() if status.is_final}
    assert done == set(begun[:-1])

    told = program.lines()
    assert [line for line in told if "done before" in line] == [f"{item}: done before" for item in begun[:-1]]
    assert "nightly-import: all 12 items are final, and this pod completed the run" in told
    assert store.outputs("nightly-import").keys() == ITEMS
    assert store.attempts("nightly-import") == {item: 1 + (item == begun[-1]) for item in ITEMS}
    eventually(lambda: not etcd.etcdctl("get", "--prefix", "--keys-only", f"{prefix}/sessions/").split())


def test_asyncio_pool(etcd: EtcdServer, prefix: str, store: Store) -> None:
    """One body loses its claim and its result, and the step is done again; then two pools find nothing to do."""
    program = Program("asyncio_pool.py", etcd, prefix)
    lost, summary = program.lines()
    assert lost.startswith("page.13: lost, result dropped: ")
    assert summary == "20 pages done here, 20 of 20 have succeeded"
    assert program.lines() == ["0 pages done here, 20 of 20 have succeeded"]
    assert set(store.outputs("crawl-7").values()) == {'{"words": 100}'}
    assert store.attempts("crawl-7") == {f"page.{n}": 1 + (n == 13) for n in range(20)}


def test_two_asyncio_pools_share_the_work(etcd: EtcdServer, prefix: str, store: Store) -> None:
    program = Program("asyncio_pool.py", etcd, prefix)
    done = 0
    pools = [program.start() for _ in range(2)]
    for pool in pools:
        with pool:
            out, err = pool.communicate(timeout=60)
        assert (pool.returncode, err) == (0, "")
        done += int(out.splitlines()[-1].split()[0])
    assert done == 20
    assert len(store.outputs("crawl-7")) == 20


def test_each_example_is_told_of_short_and_tested() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    programs = sorted(EXAMPLES.glob("*.py"))
    assert programs
    tests = Path(__file__).read_text(encoding="utf-8")
    for program in programs:
        assert f"`python {program.name}`" in readme
        assert f'"{program.name}"' in tests
        assert len(program.read_text(encoding="utf-8").splitlines()) < 80
