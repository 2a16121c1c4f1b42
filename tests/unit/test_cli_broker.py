"""The broker, with pipes whose other ends the test holds in place of workers."""

from __future__ import annotations

from collections import deque
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any

import pytest

from servers import eventually
from stepclaim.cli.broker import Broker, Event, Finished, Gone, GoOn, InBody, Order, Peer, Publish, Ready
from stepclaim.cli.engine import Handled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection


class Bench:
    """A broker and its workers' ends."""

    def __init__(self, workers: int) -> None:
        self.broker = Broker()
        self.ends: list[Connection[Any, Any]] = []
        self.events: list[Event] = []
        self.orders: deque[tuple[int, Order]] = deque()
        for number in range(workers):
            ours, theirs = Pipe()
            self.broker.peers.append(Peer(f"w{number}", ours))
            self.ends.append(theirs)
            theirs.send(Ready(f"w{number}"))
        self.pump(lambda: len(self.events) == workers)

    def pump(self, until: Any) -> None:
        def round_() -> Any:
            self.events += self.broker.pump(0.01)
            for number, end in enumerate(self.ends):
                while not end.closed and end.poll():
                    message = end.recv()
                    if isinstance(message, Order):
                        self.orders.append((number, message))
            return until()

        eventually(round_, 5)

    def next_orders(self, count: int) -> list[tuple[int, Order]]:
        self.pump(lambda: len(self.orders) >= count)
        return [self.orders.popleft() for _ in range(count)]

    def finish(self, worker: int, order: Order, handled: Handled) -> None:
        self.ends[worker].send(Finished(order.number, handled))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(3)
    yield made
    for connection in (*made.ends, *(peer.connection for peer in made.broker.peers)):
        connection.close()


def test_every_message_goes_to_two_different_workers(bench: Bench) -> None:
    for number in range(5):
        bench.broker.publish("run", f"s{number}")
    takers: dict[str, list[int]] = {}
    for _ in range(10):
        ((worker, order),) = bench.next_orders(1)
        takers.setdefault(order.step_key, []).append(worker)
        bench.finish(worker, order, Handled.RAN if len(takers[order.step_key]) == 1 else Handled.REFUSED_FINAL)
    bench.pump(lambda: bench.broker.is_idle)
    assert [len(set(workers)) for workers in takers.values()] == [2] * 5
    assert bench.broker.counts["first: refused, final"] == 5


def test_what_a_dead_worker_had_is_delivered_again(bench: Bench) -> None:
    bench.broker.publish("run", "s")
    (first, order), (second, copy) = bench.next_orders(2)
    bench.ends[first].send(InBody(order.number, 7))
    bench.finish(second, copy, Handled.REFUSED_HELD)
    bench.ends[first].close()
    ((third, again),) = bench.next_orders(1)
    assert third != first
    assert again.step_key == "s"
    assert any(isinstance(message, Gone) for _, message in bench.events)
    bench.finish(third, again, Handled.RAN)
    bench.pump(lambda: bench.broker.is_idle)
    assert bench.broker.finished == {("run", "s")}


def test_a_refused_copy_waits_while_a_live_worker_has_the_body(bench: Bench) -> None:
    bench.broker.publish("run", "s")
    (first, order), (second, copy) = bench.next_orders(2)
    bench.ends[first].send(InBody(order.number, 7))
    bench.finish(second, copy, Handled.REFUSED_HELD)
    bench.pump(lambda: bench.broker.counts["first: refused, held"])
    bench.finish(first, order, Handled.RAN)
    bench.pump(lambda: bench.broker.is_idle)
    assert bench.broker.counts["deliveries"] == 2


def test_what_a_suspended_worker_has_goes_to_another_too(bench: Bench) -> None:
    bench.broker.hold_wanted = True
    bench.broker.publish("run", "s")
    (first, order), (second, copy) = bench.next_orders(2)
    assert (order.hold, copy.hold) == (True, False)
    bench.ends[first].send(InBody(order.number, 7))
    bench.pump(lambda: not bench.broker.hold_wanted)
    peer = bench.broker.peers[first]
    bench.broker.suspend(peer)
    bench.finish(second, copy, Handled.REFUSED_HELD)
    ((third, again),) = bench.next_orders(1)
    assert third != first
    bench.finish(third, again, Handled.RAN)
    bench.pump(lambda: bench.broker.finished)
    assert not bench.broker.is_idle
    bench.broker.resume(peer)
    bench.broker.send(peer, GoOn())
    assert bench.ends[first].poll(5)
    assert bench.ends[first].recv() == GoOn()
    bench.finish(first, order, Handled.LOST)
    bench.pump(lambda: bench.broker.is_idle)
    assert bench.broker.counts["first: lost"] == 1


def test_a_step_of_a_stopped_run_is_over(bench: Bench) -> None:
    bench.broker.publish("run", "s")
    (first, order), (second, copy) = bench.next_orders(2)
    bench.finish(first, order, Handled.STOPPED)
    bench.finish(second, copy, Handled.REFUSED_HELD)
    bench.pump(lambda: bench.broker.is_idle)
    assert bench.broker.finished == {("run", "s")}


def test_a_worker_publishes(bench: Bench) -> None:
    bench.ends[0].send(Publish("run", "next"))
    assert {order.step_key for _, order in bench.next_orders(2)} == {"next"}
