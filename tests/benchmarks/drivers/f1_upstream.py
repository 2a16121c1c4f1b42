"""F1 as FlowOrchestrator has it on PostgreSQL: its engine's and its run store's statements, in their order.

Each statement is a transaction of its own but for two: a start is a serializable transaction of three statements, and
a completion one of two. As in upstream, an error in a start or a completion is noted and passed over: the step's
record is then missing and its run never ends, and a message whose claim is lost is dropped without a word.
`lean` leaves out what is not the run store's: inputs, outputs and trigger data kept apart, events, the job's note.
`repaired` sends a start again until it commits, as upstream does not.
"""

from __future__ import annotations

import queue
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import psycopg  # type: ignore[import-not-found]

from benchmarks.drivers.cpu import cpu_seconds
from benchmarks.drivers.messages import F1, Messages, ready
from benchmarks.drivers.serving import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLES = """
create table if not exists f1_runs (
    run uuid primary key, flow uuid not null, flow_name varchar(256), status varchar(64) not null,
    trigger varchar(256), data text, job varchar(128), started_at timestamptz not null, completed_at timestamptz,
    source uuid);
create index if not exists f1_runs_1 on f1_runs (flow);
create index if not exists f1_runs_2 on f1_runs (status);
create index if not exists f1_runs_3 on f1_runs (started_at desc);
create index if not exists f1_runs_4 on f1_runs (flow, status, started_at desc);
create index if not exists f1_runs_5 on f1_runs (source) where source is not null;
create table if not exists f1_steps (
    run uuid, step varchar(256), type varchar(256) not null, status varchar(64) not null, input text, output text,
    error text, job varchar(128), started_at timestamptz not null, completed_at timestamptz, primary key (run, step));
create index if not exists f1_steps_1 on f1_steps (run, started_at);
create index if not exists f1_steps_2 on f1_steps (step, run);
create table if not exists f1_attempts (
    run uuid, step varchar(256), attempt int, type varchar(256) not null, status varchar(64) not null, input text,
    output text, error text, job varchar(128), started_at timestamptz not null, completed_at timestamptz,
    primary key (run, step, attempt));
create index if not exists f1_attempts_1 on f1_attempts (run, started_at);
create index if not exists f1_attempts_2 on f1_attempts (run, step, attempt);
create table if not exists f1_claims (
    run uuid, step varchar(256), claimed_at timestamptz not null, primary key (run, step));
create table if not exists f1_dispatches (
    run uuid, step varchar(256), dispatched_at timestamptz not null default now(), job varchar(128),
    primary key (run, step));
create table if not exists f1_controls (
    run uuid primary key, flow uuid not null, trigger varchar(256) not null, idempotency varchar(256),
    timeout_at timestamptz, cancel boolean not null default false, reason text, cancelled_at timestamptz,
    timed_out_at timestamptz);
create table if not exists f1_outputs (
    run uuid, key varchar(256), value text, created_at timestamptz not null, primary key (run, key));
create table if not exists f1_events (
    number bigserial primary key, run uuid not null, at timestamptz not null, type varchar(128) not null,
    step varchar(256), message text);
create index if not exists f1_events_1 on f1_events (run, number);
"""
FLOW = uuid.UUID(int=1)
INPUT, OUTPUT, TYPE = "{}", '{"ok": true}', "Demo"


class Upstream:
    """The engine and the stores beneath it. Each call has a connection of a pool, as upstream's has."""

    def __init__(self, conninfo: str, workers: int, *, lean: bool, repaired: bool) -> None:
        self._lean = lean
        self._repaired = repaired
        self.passed_over: list[str] = []
        self.bodies = 0
        self.statements = 0
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(TABLES)
        self._pool: queue.SimpleQueue[psycopg.Connection[Any]] = queue.SimpleQueue()
        self._all = [psycopg.connect(conninfo, autocommit=True, prepare_threshold=0) for _ in range(workers)]
        for connection in self._all:
            self._pool.put(connection)
        self.messages = Messages(self.handle)

    def close(self) -> None:
        """Disconnect."""
        for connection in self._all:
            connection.close()

    # --- the engine ------------------------------------------------------------------------------------------------

    def handle(self, name: str, step: str | None) -> None:
        """Handle one message."""
        run = uuid.UUID(name)
        if step is None:
            self._trigger(run)
            return
        if not self._lean:
            self._rows("select value from f1_outputs where run = %s and key = '__trigger:data'", run)
            self._rows("select value from f1_outputs where run = %s and key = '__trigger:headers'", run)
        if not self._claim(run, step):
            return
        self._control(run)
        self._save(run, f"{step}:input", INPUT)
        while True:
            try:
                self._start(run, step)
            except psycopg.Error as error:
                self.passed_over.append(type(error).__name__)
                if self._repaired and isinstance(error, psycopg.errors.SerializationFailure):
                    continue
            break
        self._note(run, step, "step.started")
        self.bodies += 1
        self._save(run, step, OUTPUT)
        try:
            self._complete(run, step)
        except psycopg.Error as error:
            self.passed_over.append(type(error).__name__)
        self._note(run, step, "step.completed")
        self._go_on(run, step)

    def _trigger(self, run: uuid.UUID) -> None:
        self._write(
            "insert into f1_runs values (%s, %s, 'F1', 'Running', 'manual', null, null, now(), null, null)", run, FLOW
        )
        self._rows("select * from f1_runs where run = %s", run)
        self._write(
            "insert into f1_controls (run, flow, trigger) values (%s, %s, 'manual') on conflict (run) do update "
            "set flow = excluded.flow, trigger = excluded.trigger, timeout_at = excluded.timeout_at",
            run, FLOW,
        )  # fmt: skip
        self._save(run, "__trigger:data", "null")
        self._schedule(run, "a")
        self._note(run, "__run", "run.started")

    def _go_on(self, run: uuid.UUID, step: str) -> None:
        self._statuses(run)  # for steps that are blocked; there are none in F1
        due = ready(self._statuses(run))
        self._control(run)
        if sum([self._schedule(run, each) for each in due]):
            return
        statuses = self._statuses(run)
        if "Running" in statuses.values() or self._claimed(run) - statuses.keys():
            return
        statuses = self._statuses(run)
        if "Running" in statuses.values() or self._claimed(run) - statuses.keys():
            return
        dispatched = {each for (each,) in self._rows("select step from f1_dispatches where run = %s", run)}
        if not dispatched - statuses.keys():
            self._write("update f1_runs set status = 'Succeeded', completed_at = now() where run = %s", run)
        self._note(run, step, "run.completed")

    def _schedule(self, run: uuid.UUID, step: str) -> bool:
        if not self._write("insert into f1_dispatches (run, step) values (%s, %s) on conflict do nothing", run, step):
            return False
        self.messages.publish(str(run), step)
        if not self._lean:
            self._write("update f1_dispatches set job = %s where run = %s and step = %s", uuid.uuid4().hex, run, step)
        return True

    # --- the stores ------------------------------------------------------------------------------------------------

    def _claim(self, run: uuid.UUID, step: str) -> bool:
        return self._write("insert into f1_claims values (%s, %s, now()) on conflict do nothing", run, step) == 1

    def _start(self, run: uuid.UUID, step: str) -> None:
        connection = self._pool.get()
        self.statements += 5
        try:
            connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
            with connection.transaction():
                row = connection.execute(
                    "select coalesce(max(attempt), 0) + 1 from f1_attempts where run = %s and step = %s", (run, step)
                ).fetchone()
                number = row[0] if row else 1
                connection.execute(
                    "insert into f1_attempts (run, step, attempt, type, status, input, started_at) "
                    "values (%s, %s, %s, %s, 'Running', %s, now())",
                    (run, step, number, TYPE, INPUT),
                )
                connection.execute(
                    "insert into f1_steps (run, step, type, status, input, started_at) "
                    "values (%s, %s, %s, 'Running', %s, now()) on conflict (run, step) do update set "
                    "type = excluded.type, input = excluded.input, output = null, error = null, job = excluded.job, "
                    "status = 'Running', started_at = now(), completed_at = null",
                    (run, step, TYPE, INPUT),
                )
        finally:
            connection.isolation_level = None
            self._pool.put(connection)

    def _complete(self, run: uuid.UUID, step: str) -> None:
        connection = self._pool.get()
        self.statements += 4
        try:
            with connection.transaction():
                connection.execute(
                    "update f1_steps set status = 'Succeeded', output = %s, error = null, completed_at = now() "
                    "where run = %s and step = %s",
                    (OUTPUT, run, step),
                )
                connection.execute(
                    "update f1_attempts a set status = 'Succeeded', output = %s, error = null, completed_at = now() "
                    "from (select attempt from f1_attempts where run = %s and step = %s "
                    "order by attempt desc limit 1) l "
                    "where a.run = %s and a.step = %s and a.attempt = l.attempt",
                    (OUTPUT, run, step, run, step),
                )
        finally:
            self._pool.put(connection)

    def _statuses(self, run: uuid.UUID) -> dict[str, str]:
        return dict(self._rows("select step, status from f1_steps where run = %s", run))

    def _claimed(self, run: uuid.UUID) -> set[str]:
        return {step for (step,) in self._rows("select step from f1_claims where run = %s", run)}

    def _control(self, run: uuid.UUID) -> None:
        self._rows("select * from f1_controls where run = %s", run)

    def _save(self, run: uuid.UUID, key: str, value: str) -> None:
        if not self._lean:
            self._write(
                "insert into f1_outputs values (%s, %s, %s, now()) on conflict (run, key) do update "
                "set value = excluded.value",
                run, key, value,
            )  # fmt: skip

    def _note(self, run: uuid.UUID, step: str, what: str) -> None:
        if not self._lean:
            self._write(
                "insert into f1_events (run, at, type, step, message) values (%s, now(), %s, %s, %s)",
                run, what, step, f"Step '{step}': {what}",
            )  # fmt: skip

    def _write(self, statement: str, *values: Any) -> int:
        connection = self._pool.get()
        self.statements += 1
        try:
            return int(connection.execute(statement, values).rowcount)
        finally:
            self._pool.put(connection)

    def _rows(self, statement: str, *values: Any) -> Sequence[Any]:
        connection = self._pool.get()
        self.statements += 1
        try:
            rows: Sequence[Any] = connection.execute(statement, values).fetchall()
            return rows
        finally:
            self._pool.put(connection)

    def finished(self, runs: Sequence[str]) -> int:
        """Count the runs that ended with all their steps done."""
        rows = self._rows(
            "select count(*) from (select r.run from f1_runs r join f1_steps s on s.run = r.run and "
            "s.status = 'Succeeded' where r.status = 'Succeeded' and r.run = any(%s) group by r.run "
            "having count(*) = %s) done",
            [uuid.UUID(run) for run in runs], len(F1),
        )  # fmt: skip
        return int(rows[0][0])


def work(
    conninfo: str, runs: list[str], workers: int, server_pids: list[int], lean: bool, repaired: bool
) -> dict[str, Any]:
    """Work the runs off."""
    upstream = Upstream(conninfo, workers, lean=lean, repaired=repaired)
    try:
        client, server = time.process_time(), cpu_seconds(server_pids)
        took = upstream.messages.work_off(runs, workers)
        client, server = time.process_time() - client, cpu_seconds(server_pids) - server
        statements = upstream.statements
        finished = upstream.finished(runs)
    finally:
        upstream.close()
    steps = max(1, finished * len(F1))
    failed = upstream.messages.failed
    return {
        "seconds": took,
        "steps_s": finished * len(F1) / took,
        "finished_runs": finished,
        "bodies": upstream.bodies,
        "failed_deliveries": len(failed),
        "errors_passed_over": len(upstream.passed_over),
        "statements_a_step": statements / steps,
        "client_us": client / steps * 1e6,
        "server_us": server / steps * 1e6,
        "failures": sorted(set(failed + upstream.passed_over))[:3],
    }


if __name__ == "__main__":
    serve({"work": work})
