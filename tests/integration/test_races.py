"""Races for a run's end: who completes it, and which final status stands, judged by the history that etcd holds."""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from etcd3 import etcdrpc

from servers import EtcdServer
from stepclaim import EtcdRunStore, RunStatus
from stepclaim._core.keys import last_segment

ROUNDS = int(os.environ.get("STEPCLAIM_TEST_ROUNDS", "1000"))
FINAL = {str(status) for status in RunStatus if status.is_final}


@pytest.fixture
def pair(etcd: EtcdServer, prefix: str) -> Iterator[tuple[EtcdRunStore, EtcdRunStore]]:
    """Give two workers' stores, each with a client of its own."""
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(EtcdRunStore.connect(etcd.endpoint, prefix=prefix, owner=owner))
            for owner in ("one", "two")
        )
        yield one, two


@pytest.fixture
def began(etcd: EtcdServer) -> int:
    """Give etcd's revision before the test writes anything."""
    with grpc.insecure_channel(etcd.endpoint) as channel:
        answer = etcdrpc.KVStub(channel).Range(etcdrpc.RangeRequest(key=b"\0"), timeout=10)
    return int(answer.header.revision)


def side_by_side(*works: Callable[[], list[Any]]) -> list[list[Any]]:
    """Run both at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(work) for work in works]]


def final_writes(etcd: EtcdServer, prefix: str, began: int, runs: int) -> dict[str, list[str]]:
    """Read from etcd's own history every final status that was ever written to each run's record, in order."""
    below = f"{prefix}/runs/".encode()
    marker = f"{prefix}/runs/~/run".encode()
    written: dict[str, list[str]] = {}
    with grpc.insecure_channel(etcd.endpoint, options=[("grpc.max_receive_message_length", -1)]) as channel:
        etcdrpc.KVStub(channel).Put(etcdrpc.PutRequest(key=marker, value=b"{}"), timeout=10)
        watch = etcdrpc.WatchCreateRequest(key=below, range_end=below[:-1] + b"0", start_revision=began + 1)
        answers = etcdrpc.WatchStub(channel).Watch(iter([etcdrpc.WatchRequest(create_request=watch)]), timeout=60)
        for answer in answers:
            assert not answer.canceled, answer
            for event in answer.events:
                key = event.kv.key
                if key == marker:
                    answers.cancel()
                    assert len(written) == runs
                    return written
                if key.endswith(b"/run") and key.count(b"/") == below.count(b"/") + 1:
                    assert event.type == event.PUT
                    told = written.setdefault(last_segment(key.removesuffix(b"/run")), [])
                    status = json.loads(event.kv.value)["status"]
                    if status in FINAL:
                        told.append(status)
    raise AssertionError("etcd ended the watch")


def test_of_two_who_finish_the_last_two_steps_one_completes_the_run(
    pair: tuple[EtcdRunStore, EtcdRunStore], etcd: EtcdServer, prefix: str, began: int
) -> None:
    barrier = threading.Barrier(2, timeout=30)
    for at in range(ROUNDS):
        pair[0].start_run("f", "F", f"r{at}", "manual")

    def work(store: EtcdRunStore, mine: str) -> list[Any]:
        completed: list[bool | None] = []
        for at in range(ROUNDS):
            run = f"r{at}"
            claim = store.claim_step(run, mine)
            assert claim is not None
            barrier.wait()
            store.complete_step(claim, "Succeeded")
            statuses = store.get_step_statuses(run)
            # as an engine does: whoever sees that nothing is left to do completes the run
            done = len(statuses) == 2 and all(status.is_final for status in statuses.values())
            completed.append(store.complete_run(run, "Succeeded") if done else None)
        return completed

    one, two = side_by_side(lambda: work(pair[0], "a"), lambda: work(pair[1], "b"))
    rounds = [sorted(map(bool, each)) for each in zip(one, two, strict=True)]
    assert rounds == [[False, True]] * ROUNDS
    contested = sum(None not in each for each in zip(one, two, strict=True))
    print(f"both tried in {contested} of {ROUNDS} rounds")
    assert contested >= ROUNDS // 20  # else it was no race
    assert final_writes(etcd, prefix, began, ROUNDS) == {f"r{at}": ["Succeeded"] for at in range(ROUNDS)}
    assert not pair[0].get_active_runs()


def test_of_cancelled_and_succeeded_the_first_stands(
    pair: tuple[EtcdRunStore, EtcdRunStore], etcd: EtcdServer, prefix: str, began: int
) -> None:
    rounds = max(ROUNDS // 2, 1)
    barrier = threading.Barrier(2, timeout=30)
    for at in range(rounds):
        pair[0].start_run("f", "F", f"r{at}", "manual")

    def work(store: EtcdRunStore, status: str) -> list[Any]:
        told = []
        for at in range(rounds):
            barrier.wait()
            won = store.complete_run(f"r{at}", status)
            told.append((won, store.get_run_status(f"r{at}"), store.complete_run(f"r{at}", status)))
        return told

    cancelled, succeeded = side_by_side(lambda: work(pair[0], "Cancelled"), lambda: work(pair[1], "Succeeded"))
    winners = []
    for one, two in zip(cancelled, succeeded, strict=True):
        assert (one[0], two[0]) in {(True, False), (False, True)}
        winners.append("Cancelled" if one[0] else "Succeeded")
        assert one[1:] == two[1:] == (winners[-1], False)
    assert final_writes(etcd, prefix, began, rounds) == {f"r{at}": [winner] for at, winner in enumerate(winners)}
    print(Counter(winners))
    assert rounds < 100 or len(set(winners)) == 2  # else it was no race
