"""Claims among processes: races, a holder that is killed, a holder that is stopped past its lease."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import EtcdServer, eventually
from stepclaim import EtcdRunStore

TTL = 2
WORKERS = Path(__file__).with_name("workers.py")


class Worker:
    """One worker process."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKERS), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        """Give what the worker says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker ended with {self.process.wait()}"
        told: dict[str, Any] = json.loads(line)
        return told

    def go_on(self) -> None:
        """Give the word that the worker waits for."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """End the process, in whatever state it is."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(etcd: EtcdServer, prefix: str) -> Iterator[Any]:
    workers: list[Worker] = []

    def start_one(role: str, owner: str, *keys: str, ttl: str = str(TTL)) -> Worker:
        workers.append(Worker(role, etcd.endpoint, prefix, owner, ttl, *keys))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.end()


@pytest.fixture
def store(etcd: EtcdServer, prefix: str) -> Iterator[EtcdRunStore]:
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix, owner="test", lease_ttl=TTL) as opened:
        yield opened


@pytest.mark.parametrize(
    ("replicas", "keys"),
    [(8, ["step1"]), (4, [f"loop.{n}.child" for n in range(8)]), (8, ["loop.3.child"])],
    ids=["C2", "C4", "C5"],
)
def test_processes_race(start: Any, replicas: int, keys: list[str]) -> None:
    workers = [start("race", f"replica-{n}", *keys) for n in range(replicas)]
    for worker in workers:
        assert worker.hear() == {"ready": True}
    for worker in workers:
        worker.go_on()
    won = [key for worker in workers for key in worker.hear()["won"]]
    assert sorted(won) == keys


def test_a_killed_holder_is_followed_within_its_ttl(start: Any, store: EtcdRunStore) -> None:
    holder = start("hold", "holder", "a")
    token = holder.hear()["token"]
    assert store.claim_step("r", "a") is None
    killed_at = time.monotonic()
    holder.process.kill()
    claim = eventually(lambda: store.claim_step("r", "a"), TTL + 5.0)
    took = time.monotonic() - killed_at
    print(f"takeover after {took:.2f} s at a TTL of {TTL} s")
    assert claim is not None
    assert claim.fencing_token > token
    assert claim.attempt == 2
    assert took < TTL + 5
    store.complete_step(claim, "Succeeded")


def test_at_most_once_a_killed_holder_keeps_its_claim_until_it_is_released(start: Any, store: EtcdRunStore) -> None:
    holder = start("hold", "holder", "a", ttl="none")
    holder.hear()
    holder.process.kill()
    holder.process.wait()
    info = store.get_claim("r", "a")
    assert info is not None
    assert (info.owner, info.lease_id) == ("holder", 0)
    assert store.claim_step("r", "a") is None
    store.release_step_claim("r", "a")
    assert store.claim_step("r", "a") is not None


def test_a_stopped_holder_that_wakes_up_is_refused(start: Any, store: EtcdRunStore) -> None:
    holder = start("hold", "holder", "a")
    token = holder.hear()["token"]
    holder.process.send_signal(signal.SIGSTOP)
    claim = eventually(lambda: store.claim_step("r", "a"), TTL + 5.0)
    assert claim is not None
    assert claim.fencing_token > token
    holder.go_on()
    holder.process.send_signal(signal.SIGCONT)
    told = holder.hear()
    assert "no longer holds" in told["lost"]
    assert holder.process.wait(10) == 0
    assert store.holds(claim)
    store.complete_step(claim, "Succeeded", output_json='"test"')
    store.start_run("f", "F", "r", "manual")
    run = store.get_run("r")
    assert run is not None
    (step,) = run.steps
    assert (step.output_json, step.owner, step.status) == ('"test"', "test", "Succeeded")
    assert [(each.status, each.owner) for each in step.attempts] == [("Running", "holder"), ("Succeeded", "test")]


def test_a_stopped_holder_without_a_successor_is_refused_too(start: Any, store: EtcdRunStore) -> None:
    holder = start("hold", "holder", "a")
    holder.hear()
    holder.process.send_signal(signal.SIGSTOP)
    eventually(lambda: store.get_claim("r", "a") is None, TTL + 5.0)
    holder.go_on()
    holder.process.send_signal(signal.SIGCONT)
    assert "no longer holds" in holder.hear()["lost"]
    assert store.get_step_statuses("r") == {"a": "Running"}
