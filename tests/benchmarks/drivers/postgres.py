"""PostgreSQL by psycopg: upstream's INSERT … ON CONFLICT DO NOTHING, a commit each; and pipelined, many in one."""

from __future__ import annotations

import queue
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import psycopg  # type: ignore[import-not-found]

from benchmarks.drivers.serving import serve
from benchmarks.drivers.sharing import Sharing
from benchmarks.drivers.slices import Tasks, Threads

if TYPE_CHECKING:
    from benchmarks.drivers.slices import Address

MOST_CONNECTIONS = 100
"""As many as upstream's pool has."""
TABLE = """
create table if not exists claims
(run uuid, step varchar(256), claimed_at timestamptz not null, primary key (run, step))
"""
CLAIM = "insert into claims values (%s, %s, now()) on conflict do nothing"


def make_table(address: Address) -> None:
    """Make the table, one process after the other."""
    with psycopg.connect(address["conninfo"], autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(1)")
        connection.execute(TABLE)


class Postgres:
    """For threads, with a pool of connections."""

    def open(self, address: Address, callers: int) -> None:
        """Connect, once a caller."""
        make_table(address)
        self._pool: queue.SimpleQueue[psycopg.Connection[Any]] = queue.SimpleQueue()
        self._all = [
            psycopg.connect(address["conninfo"], autocommit=True, prepare_threshold=0)
            for _ in range(min(callers, MOST_CONNECTIONS))
        ]
        for connection in self._all:
            self._pool.put(connection)

    def begin(self, run: str) -> None:
        """Note the run."""
        self._run = uuid.UUID(run)

    def claim(self, caller: int, step: str) -> bool:
        """Insert, in a transaction of its own."""
        del caller
        connection = self._pool.get()
        try:
            return bool(connection.execute(CLAIM, (self._run, step)).rowcount == 1)
        finally:
            self._pool.put(connection)

    def end(self) -> None:
        """Leave the rows."""

    def close(self) -> None:
        """Disconnect."""
        for connection in self._all:
            connection.close()


class PostgresPipelined:
    """For tasks, on one connection: what waits is sent together and shares a commit."""

    async def open(self, address: Address, callers: int) -> None:
        """Connect."""
        del callers
        make_table(address)
        self._connection = await psycopg.AsyncConnection.connect(
            address["conninfo"], autocommit=True, prepare_threshold=0
        )

    async def begin(self, run: str) -> None:
        """Note the run."""
        self._run = uuid.UUID(run)
        self._sharing = Sharing(self._send)

    async def claim(self, caller: int, step: str) -> bool:
        """Claim with whoever waits."""
        del caller
        return await self._sharing.call(step)

    async def _send(self, steps: list[str]) -> list[bool]:
        async with self._connection.pipeline():
            cursors = [await self._connection.execute(CLAIM, (self._run, step)) for step in steps]
        return [cursor.rowcount == 1 for cursor in cursors]

    async def end(self) -> None:
        """Leave the rows."""

    async def close(self) -> None:
        """Disconnect."""
        await self._connection.close()


if __name__ == "__main__":
    serve(Threads(Postgres()).commands() if sys.argv[1] == "threads" else Tasks(PostgresPipelined()).commands())
