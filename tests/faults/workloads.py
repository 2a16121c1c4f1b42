"""What workers do while the cluster is broken: each workload is a program that asks for calls and is told what came.

A workload is a generator, so that one text serves threads and asyncio: it yields a `Do` (a call to the store, which is
recorded), a `Rest`, or `Reopen`, and is sent what came of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from faults.history import Outcome

if TYPE_CHECKING:
    from random import Random

    from stepclaim import StepClaim


@dataclass(frozen=True)
class Do:
    """One call to the store. `args` are recorded as they are, beside what the claim says."""

    call: str
    run: str
    step: str = ""
    claim: StepClaim | None = None
    timeout: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rest:
    """Do nothing for so many seconds, or until the end."""

    seconds: float


@dataclass(frozen=True)
class Reopen:
    """Close the store, and open another one: a session goes, a session comes."""


@dataclass(frozen=True)
class Told:
    """What came of a call."""

    outcome: Outcome
    value: Any = None

    @property
    def claim(self) -> StepClaim | None:
        """The claim that was won."""
        claim: StepClaim | None = self.value if self.outcome is Outcome.OK else None
        return claim


Program: TypeAlias = Generator[Do | Rest | Reopen, Told, None]


@dataclass
class Task:
    """One of a worker's tasks: its own randomness, and where the clock of all workers stands."""

    name: str
    number: int
    random: Random
    epoch: Callable[[], int]
    """Counts up, at the same time in all workers: they meet at the same runs without a word between them."""
    stopped: Callable[[], bool]
    lease_ttl: float

    def recent(self, back: int) -> int:
        """Choose the present epoch, or now and then one of the last few, where somebody may have died."""
        now = self.epoch()
        return now if self.random.random() < 0.7 else max(0, now - self.random.randint(1, back))

    def body(self) -> Rest:
        """Pretend to work: mostly shortly, now and then for longer than a lease."""
        if self.random.random() < 0.01:
            return Rest(self.lease_ttl * 1.5)
        return Rest(self.random.choice((0.0, 0.0, 0.0, 0.02, 0.1, 0.3)))

    def result(self, claim: StepClaim) -> dict[str, Any]:
        """Make a result that nobody else makes."""
        output = json.dumps(f"{self.name} {claim.fencing_token} {self.random.random()}")
        if self.random.random() < 0.2:
            return {"status": "Failed", "error": output}
        return {"status": "Succeeded", "output_json": output}


def _claim(run: str, step: str) -> Do:
    return Do("claim_step", run, step, options={"step_type": "T"})


def _complete(task: Task, claim: StepClaim, **more: Any) -> Do:
    return Do("complete_step", claim.run_id, claim.step_key, claim, options=task.result(claim) | more)


def hot_keys(task: Task) -> Program:
    """Claim and complete, all on the same few keys; look at who has them; run a finished one again now and then."""
    while not task.stopped():
        run, step = f"hot-{task.recent(6)}", f"loop.{task.random.randrange(4)}.child"
        claim = (yield _claim(run, step)).claim
        if claim is not None:
            yield task.body()
            if task.random.random() < 0.1:
                yield Do("holds", run, step, claim)
            yield _complete(task, claim)
        elif task.random.random() < 0.05:
            yield Do("retry_step", run, step)
        elif task.random.random() < 0.3:
            yield Do("get_claim", run, step)
        yield Rest(0.01)


def fan_out(task: Task) -> Program:
    """One completes the parent and dispatches its children; each child is delivered to everybody, twice."""
    children = [f"loop.{n}.child" for n in range(6)]
    while not task.stopped():
        run = f"fan-{task.recent(4)}"
        claim = (yield _claim(run, "parent")).claim
        if claim is not None:
            yield task.body()
            yield _complete(task, claim, dispatch=children)
        for child in task.random.sample(children * 2, len(children)):
            if task.stopped():
                return
            if task.random.random() < 0.2:
                yield Do("try_record_dispatch", run, child)
            claim = (yield _claim(run, child)).claim
            if claim is not None:
                yield task.body()
                yield _complete(task, claim)
        yield Rest(0.02)


def release(task: Task) -> Program:
    """Claim, release, claim: by the holder, and now and then by somebody else. By `try_claim_step`, too."""
    while not task.stopped():
        run, step = f"release-{task.recent(3)}", f"s{task.random.randrange(3)}"
        if task.random.random() < 0.3:
            won = yield Do("try_claim_step", run, step)
            if won.outcome is Outcome.OK:
                yield task.body()
                yield Do("release_step_claim", run, step)
        else:
            claim = (yield _claim(run, step)).claim
            if claim is not None:
                yield task.body()
                if task.random.random() < 0.2:
                    yield Do("holds", run, step, claim)
                yield Do("release_claim", run, step, claim)
                again = (yield _claim(run, step)).claim
                if again is not None:
                    yield Do("release_claim", run, step, again)
        if task.random.random() < 0.03:
            yield Do("release_step_claim", run, step)
        yield Rest(0.01)


def deferred(task: Task) -> Program:
    """Give a group of steps up again and again, each a few times, until somebody completes it."""
    while not task.stopped():
        run, step = f"defer-{task.recent(5)}", f"part.{task.random.randrange(5)}"
        if task.random.random() < 0.08:
            told = yield Do("wait_for_step", run, step, timeout=0.6, options={"step_type": "T"})
        else:
            told = yield _claim(run, step)
        claim = told.claim
        if claim is not None:
            yield task.body()
            if claim.attempt < 3:
                yield Do("defer_step", run, step, claim, options={"reason": f"by {task.name}"})
            else:
                yield _complete(task, claim)
        yield Rest(0.01)


def watch(task: Task) -> Program:
    """Watch, with the first task, what the others do."""
    if task.number:
        yield from hot_keys(task)
        return
    while not task.stopped():
        run = f"hot-{task.epoch()}"
        seen = 0
        for _ in range(2):
            options = {"after_revision": seen} if seen else {}
            told = yield Do("watch_run", run, timeout=3.0, options=options)
            if told.outcome is Outcome.OK and told.value:
                seen = told.value[-1][0]


def sessions(task: Task) -> Program:
    """Open a store, claim two steps, complete one and leave the other to the session's end."""
    while not task.stopped():
        run = f"sessions-{task.recent(4)}"
        steps = task.random.sample([f"s{n}" for n in range(6)], 2)
        claims = []
        for step in steps:
            claim = (yield _claim(run, step)).claim
            if claim is not None:
                claims.append(claim)
        if claims:
            yield task.body()
            yield _complete(task, claims[0])
        yield Rest(0.05)
        if task.random.random() < 0.3:
            yield Reopen()


WORKLOADS: dict[str, Callable[[Task], Program]] = {
    "hot-keys": hot_keys,
    "fan-out": fan_out,
    "release": release,
    "deferred": deferred,
    "watch": watch,
    "sessions": sessions,
}
OWN_STORES = frozenset({"sessions"})
"""Where each task has a store of its own; otherwise a worker's tasks share one."""
