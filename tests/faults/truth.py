"""The truth as etcd recorded it, put in order: every claim's life, every step's row, and when each revision was.

Written against what the keys hold (the README's table), not with the package's own code: a judge that shares the
accused one's mistakes sees none of them.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .history import Event, Fact, History

StepKey: TypeAlias = tuple[str, str]

FINAL = frozenset({"Succeeded", "Failed", "Skipped"})


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something that must not be, with the operations and the revisions that show it."""

    rule: str
    text: str
    operations: tuple[int, ...] = ()
    revisions: tuple[int, ...] = ()

    def __str__(self) -> str:
        """Tell it in one line."""
        where = [f"operation{'s' * (len(self.operations) > 1)} {', '.join(map(str, self.operations))}"] * bool(
            self.operations
        )
        where += [f"revision{'s' * (len(self.revisions) > 1)} {', '.join(map(str, self.revisions))}"] * bool(
            self.revisions
        )
        return f"{self.rule}: {self.text}" + (f" [{'; '.join(where)}]" if where else "")


@dataclass(slots=True)
class Write:
    """One put of one key; a record of None is a deletion."""

    revision: int
    record: dict[str, Any] | None
    lease: int = 0


@dataclass(slots=True)
class Life:
    """One claim: from the creation of its key, which is its token, to the key's deletion."""

    step: StepKey
    token: int
    writes: list[Write]
    ended: int | None = None

    @property
    def born(self) -> dict[str, Any]:
        """The record that it was created with."""
        return self.writes[0].record or {}

    @property
    def owner(self) -> str:
        """Who created it."""
        return str(self.born.get("owner"))

    @property
    def call(self) -> tuple[str, str]:
        """Which call of its owner's created it: an attempt id is kept through all that a call sends."""
        return self.owner, str(self.born.get("attempt_id") or self.token)

    @property
    def held(self) -> bool:
        """Whether it began as somebody's claim; else it was made sealed, for a step that nobody had claimed."""
        return self.born.get("state") == "held"

    @property
    def seals(self) -> list[Write]:
        """The writes that sealed it: one, or something is wrong."""
        return [each for each in self.writes if (each.record or {}).get("state") == "sealed"]

    def alive_at(self, revision: int) -> bool:
        """Whether the key stood at a revision."""
        return self.token <= revision and (self.ended is None or revision < self.ended)

    def __str__(self) -> str:
        """Name it in an anomaly."""
        return f"the claim of {self.step[1]!r} in run {self.step[0]!r} with token {self.token} by {self.owner}"


@dataclass(slots=True)
class StepTruth:
    """All that etcd recorded of one step."""

    lives: list[Life] = field(default_factory=list)
    rows: list[Write] = field(default_factory=list)
    attempts: list[tuple[int, Write]] = field(default_factory=list)
    payloads: list[tuple[int, Write]] = field(default_factory=list)

    def life(self, token: int) -> Life | None:
        """Find a claim by its token."""
        return next((life for life in self.lives if life.token == token), None)

    def row_at(self, revision: int) -> dict[str, Any] | None:
        """Give the row as it stood at a revision."""
        place = bisect_right(self.rows, revision, key=lambda row: row.revision)
        return self.rows[place - 1].record if place else None

    def payload_at(self, attempt: int, revision: int) -> dict[str, Any] | None:
        """Give an attempt's payload as it stood at a revision."""
        standing = None
        for number, write in self.payloads:
            if number == attempt and write.revision <= revision:
                standing = write.record
        return standing


class Truth:
    """The whole watch, key by key."""

    def __init__(self, history: History) -> None:
        """Read all facts; what can't be true of any etcd goes to `problems`."""
        self.steps: dict[StepKey, StepTruth] = {}
        self.live_sessions: set[str] = set()
        self.session_ends: set[tuple[str, int]] = set()
        self.problems: list[Anomaly] = []
        self.last = history.truth[-1].revision if history.truth else 0
        self.prefix = str(history.config.get("prefix", "/stepclaim"))
        before = 0
        for fact in history.truth:
            if fact.revision < before:
                self._problem("the watch went back", fact)
            before = max(before, fact.revision)
            self._take(fact)

    def session_lives(self, session: str) -> bool:
        """Whether a session's key stood at the end."""
        return quote(session, safe="") in self.live_sessions

    def ended_with_session(self, life: Life) -> bool:
        """Whether a claim went together with its session's key: a lease takes all its keys at one revision."""
        session = quote(str(life.born.get("session", "")), safe="")
        return bool(life.writes[-1].lease) and (session, life.ended or 0) in self.session_ends

    def _take(self, fact: Fact) -> None:
        if not fact.key.startswith(f"{self.prefix}/"):
            return
        parts = fact.key.removeprefix(f"{self.prefix}/").split("/")
        if parts[0] == "sessions" and len(parts) == 2:
            (self.live_sessions.discard if fact.value is None else self.live_sessions.add)(parts[1])
            if fact.value is None:
                self.session_ends.add((parts[1], fact.revision))
        if parts[0] != "runs" or len(parts) < 4 or parts[2] not in {"claims", "steps", "attempts", "payloads"}:
            return
        record = None
        if fact.value is not None:
            try:
                record = json.loads(fact.value)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                self._problem(f"{fact.key} holds no record", fact)
                return
        key = (unquote(parts[1]), unquote(parts[3]))
        step = self.steps.setdefault(key, StepTruth())
        write = Write(fact.revision, record, fact.lease)
        if parts[2] == "claims":
            self._claim(step, key, fact, write)
        elif parts[2] == "steps":
            if record is not None and record.get("token") == 0:  # written together with its claim
                record["token"] = fact.revision
            step.rows.append(write)
        elif len(parts) == 5 and parts[4].isdigit():
            (step.attempts if parts[2] == "attempts" else step.payloads).append((int(parts[4]), write))

    def _claim(self, step: StepTruth, key: StepKey, fact: Fact, write: Write) -> None:
        standing = step.lives[-1] if step.lives and step.lives[-1].ended is None else None
        if write.record is None:
            if standing is None:
                self._problem(f"{fact.key} was deleted without having been there", fact)
            else:
                standing.ended = fact.revision
        elif fact.create_revision == fact.revision:
            if standing is not None:
                self._problem(f"{fact.key} was created while it was there", fact)
                standing.ended = fact.revision
            step.lives.append(Life(key, fact.revision, [write]))
        elif standing is None or standing.token != fact.create_revision:
            self._problem(
                f"{fact.key} was changed, but its creation at {fact.create_revision} is not in the watch", fact
            )
        else:
            standing.writes.append(write)

    def _problem(self, text: str, fact: Fact) -> None:
        self.problems.append(Anomaly("unreadable truth", text, (), (fact.revision,)))


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment that a revision is known to be after, or before, and whose word that is."""

    revision: int
    at: int
    by: Event | None


class Moments:
    """When revisions were: each mark holds for its own revision and, revisions being in order, for those beyond it."""

    def __init__(self, not_before: Iterable[Mark], not_after: Iterable[Mark]) -> None:
        """Put the marks in order, and keep at each revision the tightest."""
        self._early: list[Mark] = []
        for mark in sorted(not_before, key=lambda mark: (mark.revision, -mark.at)):
            if not self._early or mark.at > self._early[-1].at:
                self._early.append(mark)
        self._late: list[Mark] = []
        for mark in sorted(not_after, key=lambda mark: (-mark.revision, mark.at)):
            if not self._late or mark.at < self._late[-1].at:
                self._late.append(mark)
        self._late.reverse()

    def not_before(self, revision: int) -> Mark | None:
        """Give the latest moment that the revision is known not to be before."""
        place = bisect_right(self._early, revision, key=lambda mark: mark.revision)
        return self._early[place - 1] if place else None

    def not_after(self, revision: int) -> Mark | None:
        """Give the earliest moment that the revision is known not to be after."""
        place = bisect_left(self._late, revision, key=lambda mark: mark.revision)
        return self._late[place] if place < len(self._late) else None


def told_by_others(history: History) -> tuple[list[Mark], list[Mark]]:
    """Collect the marks that don't depend on what a call wrote: when the watch told, and the runner's readings."""
    early = [Mark(reading.revision + 1, reading.asked, None) for reading in history.readings]
    late = [Mark(reading.revision, reading.answered, None) for reading in history.readings]
    late += [Mark(fact.revision, fact.seen, None) for fact in history.truth if fact.seen is not None]
    return early, late
