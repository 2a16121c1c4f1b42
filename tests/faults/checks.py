"""What a round checks beside the judge: what watchers were told, that lost sessions are replaced, what stays behind."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from typing import TYPE_CHECKING
from urllib.parse import quote

from faults.cluster import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faults.history import Event, Fact, History
    from faults.tape import Tape

_AFTER_LEASES = 6.0
_GONE = frozenset({"StepReset", "ClaimEnded", "DispatchEnded"})
_KINDS = {
    ("steps", True): "StepChanged",
    ("steps", False): "StepReset",
    ("claims", False): "ClaimEnded",
    ("dispatches", True): "StepDispatched",
    ("dispatches", False): "DispatchEnded",
}


def look_at(history: History) -> list[str]:
    """Check a history."""
    return [*_watchers(history), *_sessions(history)]


def look_after(tape: Tape, lease_ttl: float | None) -> list[str]:
    """Once all stores are closed: no session and no held claim stays longer than a lease lives."""
    deadline = time.monotonic() + (lease_ttl or 30.0) + _AFTER_LEASES
    while True:
        left = [fact.key for fact in tape.standing().values() if _is_left(fact)]
        if not left or (lease_ttl is None and all("/claims/" in key for key in left)):
            return []
        if time.monotonic() > deadline:
            return [f"left behind by workers that are gone: {', '.join(sorted(left)[:5])}"]
        time.sleep(0.1)


def _is_left(fact: Fact) -> bool:
    if fact.key.startswith(f"{PREFIX}/sessions/"):
        return True
    return "/claims/" in fact.key and json.loads(fact.value or "{}").get("state") == "held"


def _sessions(history: History) -> Iterator[str]:
    """Make sure that a store that lost its session went on with another one, unless the round ended soon after."""
    last = max((event.returned or 0 for event in history.events), default=0)
    for lost in history.events:
        if lost.call != "session_lost" or last - lost.invoked < 12e9 or lost.process in history.config["killed"]:
            continue
        later = (
            event
            for event in history.events
            if event.owner == lost.owner and event.invoked > lost.invoked and event.call in {"claim_step", "connect"}
        )
        if not any(event.outcome in {"ok", "refused"} for event in later):
            yield f"the session {lost.args['session']} of {lost.process} was lost and never replaced"


def _watchers(history: History) -> Iterator[str]:
    """Make sure that a watch told each change once, in etcd's order, and left none out before its last."""
    facts: defaultdict[str, dict[int, list[tuple[str, str]]]] = defaultdict(dict)
    for fact in history.truth:
        parts = fact.key.removeprefix(f"{PREFIX}/").split("/")
        if parts[0] == "runs":
            kind = _kind(parts[2], fact)
            if kind is not None:
                facts[parts[1]].setdefault(fact.revision, []).append((fact.key, kind))
    for event in history.events:
        if event.call == "watch_run" and event.outcome == "ok":
            yield from _watcher(event, facts[quote(event.step[0], safe="")])


def _kind(part: str, fact: Fact) -> str | None:
    if part == "claims" and fact.value is not None:
        return "ClaimSealed" if json.loads(fact.value).get("state") == "sealed" else "ClaimTaken"
    return _KINDS.get((part, fact.value is not None))


def _watcher(event: Event, facts: dict[int, list[tuple[str, str]]]) -> Iterator[str]:
    told = [(int(each[0]), str(each[1])) for each in event.value or []]
    if not told or any(kind == "Relisted" for _, kind in told):
        return  # what follows is the state, not each step to it
    revisions = [revision for revision, _ in told]
    if revisions != sorted(revisions):
        yield f"{event} was told events out of order"
    after = event.args.get("after_revision")
    starts = [int(after)] if after else [at for at in sorted(facts) if at <= revisions[-1]]
    if not any(sorted(told) == _expected(facts, start, revisions[-1], listed=not after) for start in starts):
        yield f"{event} was told something else than what happened up to revision {revisions[-1]}"


def _expected(facts: dict[int, list[tuple[str, str]]], start: int, end: int, *, listed: bool) -> list[tuple[int, str]]:
    """Give what a watch must tell: what stood at its start, if it began with a list, and all that came then."""
    expected = [(at, kind) for at, changes in facts.items() if start < at <= end for _, kind in changes]
    if listed:
        standing = {key: (at, kind) for at in sorted(facts) if at <= start for key, kind in facts[at]}
        expected += [each for each in standing.values() if each[1] not in _GONE]
    return sorted(expected)
