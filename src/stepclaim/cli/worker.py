"""A demo worker for containers: etcd is its queue. It handles what the dispatch ledger has and nobody has finished."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stepclaim.cli.engine import Engine, Handled
from stepclaim.errors import ConfigurationError, StepClaimError
from stepclaim.models import SessionState
from stepclaim.sync_store import EtcdRunStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stepclaim.cli.flow import Flow
    from stepclaim.models import StepClaim
    from stepclaim.session import Session
    from stepclaim.settings import Settings

_SHORTEST_WAIT = 0.1
_LONGEST_WAIT = 2.0
_HEARTBEAT = 2.0


class StopSignal(threading.Event):
    """Set by the first of these signals."""

    def __init__(self, *signals: signal.Signals) -> None:
        """Listen from now on."""
        super().__init__()
        for each in signals:
            signal.signal(each, lambda *_: self.set())


def log(event: str, **facts: object) -> None:
    """Write one event as one line."""
    words = " ".join(f"{name}={value}" for name, value in facts.items())
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z {event} {words}".rstrip() + "\n")
    sys.stdout.flush()


def work(
    settings: Settings,
    flow: Flow,
    runs: int,
    step_seconds: float,
    stop: threading.Event,
    *,
    until_done: bool = False,
    health_file: Path | None = None,
) -> None:
    """Start the runs where nobody did, and work until told to stop, or until those runs are over."""
    with EtcdRunStore.connect(settings) as store:
        session = store.session
        session.on_lost(lambda lost: log("session-lost", session=lost.session_id))
        log("started", owner=session.owner, session=session.session_id, lease=f"{session.lease_id:x}", flow=flow.name)
        with _heartbeat(store, health_file):
            Worker(store, flow, step_seconds, stop).run([f"{flow.name}-{n}" for n in range(1, runs + 1)], until_done)
        log("ending", owner=session.owner)
    log("ended", owner=session.owner)


class Worker:
    """The loop: look at the active runs, handle what is due, wait a little."""

    def __init__(self, store: EtcdRunStore, flow: Flow, step_seconds: float, stop: threading.Event) -> None:
        """Do nothing yet."""
        self._store = store
        self._flow = flow
        self._step_seconds = step_seconds
        self._stop = stop
        # the ledger is the queue: who writes an entry has sent the message
        self._engine = Engine(store, flow, self._body, lambda run, step: log("dispatched", run=run, step=step))

    def run(self, run_ids: list[str], until_done: bool) -> None:
        """Work until told to stop; with `until_done` also end once these runs are over."""
        unstarted = list(run_ids)
        wait = _SHORTEST_WAIT
        while not self._stop.is_set():
            try:
                while unstarted and not self._stop.is_set():
                    self._start(unstarted[0])
                    unstarted.pop(0)
                busy, left = self._round(set(run_ids))
            except ConfigurationError:
                raise
            except StepClaimError as trouble:  # etcd's: it may answer again, and the health file tells meanwhile
                log("trouble", error=type(trouble).__name__, message=repr(str(trouble)))
                busy, left = False, True
            if until_done and not left and not unstarted:
                return
            wait = _SHORTEST_WAIT if busy else min(wait * 1.5, _LONGEST_WAIT)
            self._stop.wait(wait * random.uniform(0.5, 1.5))  # noqa: S311 - spreads the workers' looks

    def _start(self, run_id: str) -> None:
        run = self._engine.trigger(run_id, "demo")
        log("run", run=run_id, status=run.status)

    def _round(self, ours: set[str]) -> tuple[bool, bool]:
        """Look at every active run once; tell whether there was work, and whether any of our runs is active."""
        active = [run.run_id for run in self._store.get_active_runs() if run.flow_name == self._flow.name]
        random.shuffle(active)
        busy = False
        for run_id in active:
            if self._stop.is_set():
                break
            busy = self._work_on(run_id) or busy
        return busy, not ours.isdisjoint(active)

    def _work_on(self, run_id: str) -> bool:
        statuses = self._store.get_step_statuses(run_id)
        final = {key for key, status in statuses.items() if status.is_final}
        due = self._store.get_dispatched_step_keys(run_id) - final
        if not due:  # somebody died, or is about to, between finishing a step and what follows from it
            self._engine.advance(run_id, statuses)
            return True
        free = sorted(due - self._store.get_claimed_step_keys(run_id))
        random.shuffle(free)
        for step_key in free:
            if self._stop.is_set():
                break
            if step_key not in self._flow.steps:
                log("unknown-step", run=run_id, step=step_key)
                continue
            handled = self._engine.handle(run_id, step_key)
            if handled is not Handled.RAN:
                log(
                    "refused" if handled is not Handled.LOST else "lost",
                    run=run_id,
                    step=step_key,
                    why=repr(str(handled)),
                )
        if self._store.get_run_status(run_id) != "Running":
            log("run-over", run=run_id, status=self._store.get_run_status(run_id))
        return bool(free)

    def _body(self, claim: StepClaim) -> str:
        log("step", run=claim.run_id, step=claim.step_key, attempt=claim.attempt, token=claim.fencing_token)
        time.sleep(self._step_seconds)
        return f'{{"by": "{claim.owner}"}}'


@contextlib.contextmanager
def _heartbeat(store: EtcdRunStore, path: Path | None) -> Iterator[None]:
    """Renew the file's time while the session is ACTIVE, from a thread, so that a long body doesn't look like death."""
    if path is None:
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while True:
            if _is_active(store.session):
                with contextlib.suppress(OSError):  # a full or vanished disk: the probe will tell
                    path.touch()
            if ended.wait(_HEARTBEAT):
                return

    try:
        path.touch()
    except OSError as error:
        raise ConfigurationError(f"the health file {path} can't be written: {error.strerror}") from error
    thread = threading.Thread(target=beat, name="stepclaim-health", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _is_active(session: Session) -> bool:
    return session.state is SessionState.ACTIVE
