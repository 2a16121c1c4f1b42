"""Where a watcher of a run is: which revisions it has told, and what it must tell after a compaction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stepclaim._core.keys import last_segment
from stepclaim._core.ops import Event, Program, read_snapshot
from stepclaim._core.records import ClaimRecord, ControlRow, DispatchRow, RunRow, StepRow, decode
from stepclaim.errors import ConfigurationError
from stepclaim.events import (
    ClaimEnded,
    ClaimSealed,
    ClaimTaken,
    ControlChanged,
    DispatchEnded,
    Relisted,
    RunChanged,
    RunEvent,
    RunRemoved,
    StepChanged,
    StepDispatched,
    StepReset,
)
from stepclaim.models import ClaimState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.context import Context
    from stepclaim._core.ops import KeyValue
    from stepclaim.abc import RunId


_TOLD = (b"steps", b"claims", b"dispatches")
"""The parts of a run that are told by step; its record and control besides. Payloads and earlier attempts are not."""


class Cursor:
    """One watcher's place in a run's history. Revisions that were told are never told again."""

    def __init__(self, ctx: Context, run_id: RunId, after_revision: int | None) -> None:
        if after_revision is not None and (not isinstance(after_revision, int) or after_revision < 0):
            raise ConfigurationError(f"after_revision must be an event's revision, or None, not {after_revision!r}")
        self._run = ctx.keys.run(run_id)
        self._known: set[bytes] = set()
        self.revision = after_revision or 0
        self.must_list = after_revision is None
        self._behind_compaction = False
        self._knows_all = not after_revision

    @property
    def prefix(self) -> bytes:
        """The prefix that is watched."""
        return self._run.all

    def compacted(self) -> None:
        """Take note that what comes next can't be had any more: the run must be listed."""
        self.must_list = True
        self._behind_compaction = True

    def look(self) -> Program[list[RunEvent]]:
        """Read the run as it stands, and tell what this watcher has not told yet.

        After a compaction what went comes first, at the last revision that was told: one who goes on behind that is
        told of the compaction again, and nobody misses the rest. One who went on behind a revision doesn't know what
        stood there, and is told all that stands, so that what is not told is known to be gone.
        """
        kvs, revision = yield from read_snapshot(self.prefix)
        told: list[RunEvent] = []
        if self._behind_compaction:
            told.append(Relisted(self.revision, self._run.run_id, resume=self.revision))
        standing = {kv.key for kv in kvs}
        seen = self.revision if self._knows_all else 0
        news = [Event(kv.key, kv, kv.mod_revision) for kv in kvs if kv.mod_revision > seen]
        told += self._tell(Event(key, None, self.revision) for key in sorted(self._known - standing))
        told += self._tell(sorted(news, key=lambda event: event.revision))
        self._known = standing
        self._knows_all = True
        self.revision = max(self.revision, revision)
        self.must_list = self._behind_compaction = False
        return told

    def take(self, events: Iterable[Event]) -> list[RunEvent]:
        """Tell what a watch gave, but for what was told before."""
        new = [event for event in events if event.revision > self.revision]
        for event in new:
            (self._known.discard if event.kv is None else self._known.add)(event.key)
        if new:
            self.revision = max(event.revision for event in new)
        return self._tell(new)

    def _tell(self, events: Iterable[Event]) -> list[RunEvent]:
        told = [typed for typed in map(self._typed, events) if typed is not None]
        followed_by = (*(typed.revision for typed in told[1:]), 0)
        return [
            replace(typed, resume=typed.revision - (typed.revision == following))
            for typed, following in zip(told, followed_by, strict=False)
        ]

    def _typed(self, event: Event) -> RunEvent | None:
        part, _, rest = event.key.removeprefix(self.prefix).partition(b"/")
        at, run_id, kv = event.revision, self._run.run_id, event.kv
        if part == b"run":
            return RunRemoved(at, run_id) if kv is None else RunChanged(at, run_id, decode(kv, RunRow).status)
        if part == b"control" and kv is not None:
            control = decode(kv, ControlRow)
            return ControlChanged(at, run_id, control.cancel_requested, control.timed_out_at is not None)
        if part not in _TOLD:
            return None
        step_key = last_segment(rest)
        if part == b"steps":
            if kv is None:
                return StepReset(at, run_id, step_key)
            row = decode(kv, StepRow)
            return StepChanged(at, run_id, step_key, row.status, row.attempt, row.owner)
        if part == b"claims":
            return ClaimEnded(at, run_id, step_key) if kv is None else _claim(at, run_id, step_key, kv)
        if kv is None:
            return DispatchEnded(at, run_id, step_key)
        return StepDispatched(at, run_id, step_key, decode(kv, DispatchRow).job)


def _claim(at: int, run_id: str, step_key: str, kv: KeyValue) -> RunEvent:
    record = decode(kv, ClaimRecord)
    if record.state is ClaimState.SEALED and record.status is not None:
        return ClaimSealed(at, run_id, step_key, record.owner, record.status)
    return ClaimTaken(at, run_id, step_key, record.owner)
