"""A history told by hand: what the tests of the judge break."""

from __future__ import annotations

import json
from typing import Any

from faults.history import Event, Fact, History, Outcome

MS = 1_000_000
SECOND = 1000 * MS
BASE = "/stepclaim/runs/r"


class Story:
    """Tells a history, one thing after another: each call takes 10 ms, and the watch tells its change 15 ms later."""

    def __init__(self) -> None:
        self.now = SECOND
        self.history = History(1, "by hand", [], [], config={"lease_ttl": 3.0, "timeout": 5.0, "killed": []})
        self.attempts: dict[str, int] = {}
        for number, owner in enumerate(("w1", "w2"), 2):
            self.fact(number, f"/stepclaim/sessions/{owner}-s", {"v": 1, "owner": owner}, created=number, lease=number)

    def fact(self, revision: int, key: str, record: Any, *, created: int = 0, lease: int = 0) -> None:
        value = None if record is None else json.dumps(record)
        self.history.truth.append(Fact(revision, key, value, created, lease, self.now + 25 * MS))

    def call(self, owner: str, call: str, step: str, outcome: str = "ok", value: Any = None, **args: Any) -> Event:
        args = {"run": "r", "step": step} | args
        event = Event(len(self.history.events) + 1, f"p-{owner}", call, args, self.now, self.now + 10 * MS)
        event.outcome, event.value, event.owner = Outcome(outcome), value, owner
        self.history.events.append(event)
        self.now += 100 * MS
        return event

    def claimed(self, owner: str, step: str, revision: int, **changes: Any) -> None:
        attempt = self.attempts[step] = self.attempts.get(step, 0) + 1
        record = {"v": 1, "state": "held", "owner": owner, "session": f"{owner}-s", "attempt_id": f"id{revision}"}
        self.fact(revision, f"{BASE}/claims/{step}", record | changes, created=revision, lease=7)
        self.row(revision, step, attempt, "Running", 0, owner)

    def row(self, revision: int, step: str, attempt: int, status: str, token: int | None, owner: str) -> None:
        row = {"v": 1, "status": status, "attempt": attempt, "token": token, "owner": owner, "write_id": f"w{revision}"}
        self.fact(revision, f"{BASE}/steps/{step}", row | {"payload": status == "Succeeded"}, created=1)

    def claim(self, owner: str, step: str, revision: int) -> Event:
        self.claimed(owner, step, revision)
        value = {"token": revision, "attempt": self.attempts[step], "lease": 7}
        return self.call(owner, "claim_step", step, value=value)

    def sealed(self, owner: str, step: str, token: int, revision: int, **changes: Any) -> None:
        record = {"v": 1, "state": "sealed", "owner": owner, "session": f"{owner}-s", "attempt_id": f"id{token}"}
        self.fact(revision, f"{BASE}/claims/{step}", record | {"status": "Succeeded"} | changes, created=token)
        attempt = self.attempts[step]
        self.row(revision, step, attempt, "Succeeded", token, owner)
        self.fact(revision, f"{BASE}/payloads/{step}/{attempt}", {"v": 1, "output": f"out {owner}"}, created=revision)

    def complete(self, owner: str, step: str, token: int, outcome: str = "ok", revision: int = 0) -> Event:
        if revision:
            self.sealed(owner, step, token, revision)
        return self.call(owner, "complete_step", step, outcome, token=token, status="Succeeded", output=f"out {owner}")

    def ended(self, step: str, revision: int) -> None:
        self.fact(revision, f"{BASE}/claims/{step}", None)

    def defer(self, owner: str, step: str, token: int, revision: int) -> Event:
        self.ended(step, revision)
        self.row(revision, step, self.attempts[step], "Pending", token, owner)
        return self.call(owner, "defer_step", step, token=token)


def clean() -> Story:
    """Tell a history in which everything happens that may."""
    story = Story()
    story.call("w2", "get_claim", "a")
    story.claim("w1", "a", 10)
    story.call("w2", "claim_step", "a", "refused")
    story.call("w1", "holds", "a", value=True, token=10)
    story.call("w2", "get_claim", "a", value={"token": 10, "state": "held", "owner": "w1"})
    story.complete("w1", "a", 10, revision=11)
    story.complete("w1", "a", 10)  # told again
    story.call("w2", "claim_step", "a", "refused")
    story.call("w2", "get_claim", "a", value={"token": 10, "state": "sealed", "owner": "w1"})
    story.claim("w1", "b", 12)
    story.defer("w1", "b", 12, 13)
    story.claim("w2", "b", 14)
    story.ended("b", 15)
    story.call("w2", "release_claim", "b", token=14)
    story.claim("w1", "b", 16)
    story.ended("b", 17)  # its lease ended
    story.fact(17, "/stepclaim/sessions/w1-s", None)
    story.now += 100 * MS
    story.fact(18, "/stepclaim/sessions/w1-s", {"v": 1, "owner": "w1"}, created=18, lease=8)
    story.claim("w2", "b", 18)
    story.complete("w1", "b", 16, "lost")
    story.complete("w2", "b", 18, "unknown", revision=19)
    story.complete("w2", "b", 18)
    story.claimed("w1", "c", 20)  # whose reply was lost, and which was undone
    story.call("w1", "claim_step", "c", "unknown")
    story.ended("c", 21)
    story.now += 100 * MS
    story.claimed("w2", "c", 22)
    story.call("w2", "try_claim_step", "c", value=True)
    story.ended("c", 23)
    story.call("w1", "release_step_claim", "c")
    story.call("w2", "holds", "c", value=False, token=22)
    story.claim("w2", "c", 24)  # and is held to the end
    return story


def event(story: Story, call: str, step: str, number: int = 0) -> Event:
    return [each for each in story.history.events if (each.call, each.args["step"]) == (call, step)][number]


def facts(story: Story, part: str, revision: int) -> list[Fact]:
    return [fact for fact in story.history.truth if fact.revision == revision and f"/{part}/" in fact.key]


def change(fact: Fact, **fields: Any) -> None:
    fact.value = json.dumps(json.loads(fact.value or "{}") | fields)
