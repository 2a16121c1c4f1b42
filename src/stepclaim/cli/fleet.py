"""The demo's worker processes and their broker: runs are triggered, worked off, and workers are killed or stopped."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Self, TypeAlias

from stepclaim.cli import demo_worker
from stepclaim.cli.broker import Broker, Finished, Gone, GoOn, InBody, Peer, Ready
from stepclaim.cli.engine import Engine, Handled
from stepclaim.errors import StepClaimError, UnavailableError
from stepclaim.models import ClaimState
from stepclaim.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.context import SpawnProcess
    from types import TracebackType

    from stepclaim.cli.flow import Flow
    from stepclaim.sync_store import EtcdRunStore

_PATIENCE = 60.0
_SHUTDOWN = 15.0

Tell: TypeAlias = Callable[[str], None]
"""Told of what happens, one sentence each."""


@dataclass
class Victim:
    """A worker that was taken out of work while it held a claim, as etcd confirmed."""

    how: str
    worker: str
    owner: str
    pid: int
    run_id: str
    step_key: str
    token: int
    at: float
    taken_over_after: float | None = None
    refused: bool = False


class Fleet:
    """Worker processes on one store. Use as a context manager: leaving it ends every process."""

    def __init__(
        self, settings: Settings, flow: Flow, workers: int, *, step_seconds: float = 0.02, tell: Tell = lambda _: None
    ) -> None:
        """Start nothing yet. `settings` are the workers'; each gets an owner of its own."""
        self.broker = Broker()
        self.victims: list[Victim] = []
        self.errors: list[str] = []
        self._settings = settings
        self._flow = flow
        self._workers = workers
        self._step_seconds = step_seconds
        self._tell = tell
        self._processes: dict[str, SpawnProcess] = {}
        self._stopped: tuple[Peer, Victim] | None = None

    def __enter__(self) -> Self:
        """Start the workers and wait until each has its session."""
        context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
        try:
            for number in range(1, self._workers + 1):
                name = f"worker-{number}"
                ours, theirs = context.Pipe()
                values = self._settings.model_dump(include=self._settings.model_fields_set) | {"owner": name}
                arguments = (theirs, Settings(**values), self._flow.to_json(), self._step_seconds)
                process = context.Process(target=demo_worker.main, args=arguments, name=name, daemon=True)
                _start_undisturbed(process)
                theirs.close()
                self._processes[name] = process
                self.broker.peers.append(Peer(name, ours))
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process."""
        self.close()

    def run(
        self,
        store: EtcdRunStore,
        run_ids: Sequence[str],
        *,
        drills: Sequence[str] = (),
        progress: Callable[[Fleet], None] = lambda _: None,
    ) -> None:
        """Trigger the runs and work them off; of `drills`, "kill" and "stop", each befalls one worker in a body.

        `store` is the caller's own, to trigger with and to ask who holds what. `progress` is called often.
        """
        engine = Engine(store, self._flow, lambda _: None, self.broker.publish)
        for run_id in run_ids:
            engine.trigger(run_id)
        total = len(run_ids) * len(self._flow.expected())
        waiting = list(drills)
        last_word = time.monotonic()
        while not self.broker.is_idle or self._redeliver(engine, run_ids):
            # far enough in that all workers are busy, and early enough that there is a body left to take
            if waiting and len(self.broker.finished) >= total * (len(drills) - len(waiting) + 1) // 6:
                self.broker.hold_wanted = True
            for peer, message in self.broker.pump(0.05):
                last_word = time.monotonic()
                if self._hear(store, peer, message, waiting):
                    waiting.pop(0)
            self._look_after_stopped()
            progress(self)
            if not self.broker.live:
                raise UnavailableError(f"no worker is left: {self.errors[-1] if self.errors else 'all have ended'}")
            if time.monotonic() - last_word > max(_PATIENCE, 6 * (self._settings.lease_ttl or 0)):
                raise StepClaimError("the workers have said nothing for a minute: the runs are stuck")

    def _hear(self, store: EtcdRunStore, peer: Peer, message: object, drills: Sequence[str]) -> bool:
        """Take note of what a worker said; True if the next drill has befallen it."""
        if isinstance(message, Finished):
            self._note(peer, message)
        elif isinstance(message, Gone):
            self._tell(f"{peer.name} is gone: {len(self.broker.live)} workers are left")
        elif isinstance(message, InBody) and peer.delivery is not None and peer.delivery.hold:
            return self._drill(store, drills[0] if drills else "", peer)
        return False

    def close(self) -> None:
        """Close the pipes, which has the workers leave, and kill those that don't, or that never were ready."""
        for peer in self.broker.peers:
            peer.connection.close()
            if not peer.owner and peer.name in self._processes:
                self._processes[peer.name].kill()
        deadline = time.monotonic() + _SHUTDOWN
        for process in self._processes.values():
            if process.pid is not None and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
        self._processes.clear()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        ready = 0
        while ready < self._workers:
            for peer, message in self.broker.pump(0.1):
                ready += isinstance(message, Ready)
                if isinstance(message, Finished):
                    raise UnavailableError(f"{peer.name} could not start: {message.error}")
                if isinstance(message, Gone):
                    raise UnavailableError(f"{peer.name} ended before it was ready")
            if time.monotonic() > deadline:
                raise UnavailableError(f"only {ready} of {self._workers} workers were ready after {_PATIENCE:.0f} s")

    def _note(self, peer: Peer, finished: Finished) -> None:
        if finished.error is not None:
            self.errors.append(f"{peer.name}: {finished.error}")
        if finished.handled is Handled.LOST:
            self._tell(f"{peer.name}'s result was refused: it had lost its claim (ClaimLostError)")
            for victim in self.victims:
                victim.refused = victim.refused or victim.worker == peer.name
        for victim in self.victims:
            key = victim.run_id, victim.step_key
            if victim.taken_over_after is None and key in self.broker.finished and victim.worker != peer.name:
                victim.taken_over_after = after = round(time.monotonic() - victim.at, 2)
                self._tell(f"{peer.name} took {victim.step_key} over from {victim.worker}, {after:.1f} s later")

    def _drill(self, store: EtcdRunStore, how: str, peer: Peer) -> bool:
        """Kill or stop a worker that is in a body, once etcd has said that it is the one that holds the step."""
        delivery = peer.delivery
        assert delivery is not None
        topic = delivery.copy.topic
        claim = store.get_claim(topic.run_id, topic.step_key)
        held = (
            claim is not None
            and claim.state is ClaimState.HELD
            and (claim.owner, claim.fencing_token) == (peer.owner, delivery.token)
        )
        pid = self._processes[peer.name].pid
        if not how or not held or claim is None or pid is None:
            self._tell(f"{peer.name} is not what etcd has as the holder of {topic.step_key}: left alone")
            self.broker.send(peer, GoOn())
            return False
        victim = Victim(
            how, peer.name, peer.owner, pid, topic.run_id, topic.step_key, claim.fencing_token, time.monotonic()
        )
        self.victims.append(victim)
        where = f"in {topic.step_key} of {topic.run_id[:8]}, which it holds (token {claim.fencing_token})"
        if how == "kill":
            os.kill(pid, signal.SIGKILL)
            self._tell(f"SIGKILL for {peer.name} {where}")
        else:
            os.kill(pid, signal.SIGSTOP)
            self.broker.suspend(peer)
            self._stopped = peer, victim
            self._tell(f"SIGSTOP for {peer.name} {where}")
        return True

    def _look_after_stopped(self) -> None:
        """Let the stopped worker go on once another has finished its step."""
        if self._stopped is not None and self._stopped[1].taken_over_after is not None:
            peer, victim = self._stopped
            self._stopped = None
            os.kill(victim.pid, signal.SIGCONT)
            self.broker.resume(peer)
            self.broker.send(peer, GoOn())
            self._tell(f"SIGCONT for {peer.name}: it ends its body and tells its result")

    def _redeliver(self, engine: Engine, run_ids: Sequence[str]) -> bool:
        """Publish what stands in the ledger and was never finished; False if every run is over.

        Between the ledger and the pipe a worker may die: the one place where a message can be lost.
        """
        store = engine.store
        open_runs = {run.run_id for run in store.get_active_runs()} & set(run_ids)
        for run_id in open_runs:
            statuses = store.get_step_statuses(run_id)
            engine.advance(run_id, statuses)
            for key in store.get_dispatched_step_keys(run_id):
                if key not in statuses or not statuses[key].is_final:
                    self.broker.publish(run_id, key)
        return bool(open_runs)


def _start_undisturbed(process: SpawnProcess) -> None:
    """Start a process that Ctrl-C doesn't reach, from its first moment on: that is the parent's to hear."""
    resource_tracker.ensure_running()  # its start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # with the parent's mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
