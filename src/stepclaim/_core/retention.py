"""Removing runs: everything of a run goes, indexes and idempotency keys too, in transactions of bounded size.

The run's record goes last, so that a removal which was stopped is found and finished by the next.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct

from stepclaim._core.keys import RunKeys, last_segment
from stepclaim._core.ops import Action, Compare, Delete, Get, KeyValue, Program, Txn, prefix_end, read_snapshot
from stepclaim._core.records import IdempotencyRow, RunRow, Stored, decode, stored
from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.context import Context
    from stepclaim.abc import RunId

KEYS_A_TRANSACTION = 2000
_RUNS_A_TRANSACTION = 20
_LOOKUPS_A_TRANSACTION = 100
_POINTERS_A_TRANSACTION = 60


class Doomed(Struct, frozen=True):
    """A run that is to go: its keys as they were read, without their values."""

    run: RunKeys
    keys: list[bytes]
    record_revision: int
    as_of: int

    @property
    def notes(self) -> list[bytes]:
        """The run's own notes of the idempotency keys that stand for it."""
        prefix = self.run.below("idempotency")
        return [key for key in self.keys if key.startswith(prefix)]


def delete_run(ctx: Context, run_id: RunId) -> Program[bool]:
    """Remove a run, whatever its status; True if there was anything of it."""
    run = ctx.keys.run(run_id)
    existed = False
    while True:
        kvs, as_of = yield from read_snapshot(run.all, keys_only=True)
        if not kvs:
            return existed
        existed = True
        keys = [kv.key for kv in kvs]
        record = next((kv.mod_revision for kv in kvs if kv.key == run.record), 0)
        if (yield from _remove(ctx, [Doomed(run, keys, record, as_of)])):
            return True


def purge_runs(ctx: Context, completed_before: datetime, limit: int | None) -> Program[int]:
    """Remove the runs that were completed strictly before a time, oldest first, and count them."""
    if not isinstance(completed_before, datetime) or completed_before.tzinfo is None:
        raise ConfigurationError(f"completed_before must be a datetime with a time zone, not {completed_before!r}")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigurationError(f"limit must be a whole number from 1, or None, not {limit!r}")
    keys: dict[bytes, list[bytes]] = {}
    everything, as_of = yield from read_snapshot(ctx.keys.runs, keys_only=True)
    for kv in everything:
        keys.setdefault(kv.key.removeprefix(ctx.keys.runs).split(b"/", 1)[0], []).append(kv.key)
    doomed: list[tuple[datetime, Doomed]] = []
    names = list(keys)
    for first in range(0, len(names), _LOOKUPS_A_TRANSACTION):
        batch = [
            (ctx.keys.run(last_segment(name)), keys[name]) for name in names[first : first + _LOOKUPS_A_TRANSACTION]
        ]
        reply = yield from Txn(compares=(), success=tuple(Get(run.record) for run, _ in batch))
        for (run, its_keys), found in zip(batch, reply.found, strict=True):
            standing: Stored[RunRow] | None = stored(found, RunRow)
            completed = standing.record.completed_at if standing is not None else None
            if standing is not None and completed is not None and completed < completed_before:
                doomed.append((completed, Doomed(run, its_keys, standing.kv.mod_revision, as_of)))
    doomed.sort(key=lambda each: each[0])
    chosen = [each for _, each in doomed[:limit]]
    removed = 0
    for group in _groups(chosen):
        if (yield from _remove(ctx, group)):
            removed += len(group)
            continue
        for each in group:  # one of them changed meanwhile: take them one by one, and leave that one
            removed += yield from _remove(ctx, [each])
    return removed


def _groups(doomed: Iterable[Doomed]) -> Iterable[list[Doomed]]:
    group: list[Doomed] = []
    size = 0
    for each in doomed:
        if group and (size + len(each.keys) > KEYS_A_TRANSACTION or len(group) == _RUNS_A_TRANSACTION):
            yield group
            group, size = [], 0
        group.append(each)
        size += len(each.keys)
    if group:
        yield group


def _remove(ctx: Context, group: list[Doomed]) -> Program[bool]:
    """Remove some runs at once; False if the record of one, or an idempotency key for it, has been written since."""
    unchanged = [Compare(each.run.record, "mod", each.record_revision) for each in group]
    pointers = yield from _pointers(group)
    last: list[Action] = []
    for each in group:
        for actions in _bulk(each):
            yield from Txn(compares=tuple(unchanged), success=actions)
        notes = each.run.below("idempotency")
        unchanged.append(Compare(notes, "mod", each.as_of + 1, range_end=prefix_end(notes), below=True))
        last += [Delete(each.run.active), Delete(each.run.all, prefix_end(each.run.all))]
    while len(pointers) > _POINTERS_A_TRANSACTION:
        part, pointers = pointers[:_POINTERS_A_TRANSACTION], pointers[_POINTERS_A_TRANSACTION:]
        own = tuple(Compare(kv.key, "mod", kv.mod_revision) for kv in part)
        yield from Txn(compares=own, success=tuple(Delete(kv.key) for kv in part))
    reply = yield from Txn(
        compares=(*unchanged, *(Compare(kv.key, "mod", kv.mod_revision) for kv in pointers)),
        success=(*(Delete(kv.key) for kv in pointers), *last),
    )
    if not reply.succeeded and not (reply.in_doubt and (yield from _all_gone(group))):
        return False
    for each in group:
        ctx.forget_run(each.run.run_id)
    return True


def _all_gone(group: list[Doomed]) -> Program[bool]:
    reply = yield from Txn(compares=(), success=tuple(Get(each.run.record) for each in group))
    return not any(reply.found)


def _pointers(group: list[Doomed]) -> Program[list[KeyValue]]:
    """Find the idempotency keys that stand for the runs; one that stands for another run by now is none of them."""
    asked = [(each.run.pointing(note), each.run.run_id) for each in group for note in each.notes]
    own: list[KeyValue] = []
    for first in range(0, len(asked), _LOOKUPS_A_TRANSACTION):
        part = asked[first : first + _LOOKUPS_A_TRANSACTION]
        reply = yield from Txn(compares=(), success=tuple(Get(key) for key, _ in part))
        own += [
            kv
            for kv, (_, run_id) in zip(reply.found, part, strict=True)
            if kv is not None and decode(kv, IdempotencyRow).run_id == run_id
        ]
    return own


def _bulk(each: Doomed) -> list[tuple[Action, ...]]:
    """Remove most of a large run's keys in parts, around its record."""
    others = [key for key in each.keys if key != each.run.record]
    steps: list[tuple[Action, ...]] = []
    for first in range(0, len(others) - KEYS_A_TRANSACTION, KEYS_A_TRANSACTION):
        part = others[first : first + KEYS_A_TRANSACTION]
        below, above = [key for key in part if key < each.run.record], [key for key in part if key > each.run.record]
        steps.append(tuple(Delete(keys[0], keys[-1] + b"\0") for keys in (below, above) if keys))
    return steps
