"""A worker that kills itself with SIGKILL at a named point of a step's life; and the list of these points."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from stepclaim import EtcdRunStore, StepClaim
from stepclaim.cli.engine import Engine
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stepclaim.run_store import RunStore

FLOW = Flow.from_json('{"name": "kill", "steps": {"a": [], "b": ["a"], "c": ["b"]}}')
STYLES = ("claim_step", "try_claim_step")
TOLD = ("claim_step", "record_step_start", "complete_step")
"""Calls behind which something else than the next call comes, so that there is a point of its own."""


class Life:
    """A step's life: every point that it reaches, the n-th of one name with its number."""

    def __init__(self, reached: Callable[[str], None]) -> None:
        self._reached = reached
        self._counts: Counter[str] = Counter()

    def reach(self, name: str) -> None:
        """Come to a point."""
        self._counts[name] += 1
        number = self._counts[name]
        self._reached(name if number == 1 else f"{name} ({number})")


class Watched:
    """A store that passes calls on, with a point before each, and one behind some."""

    def __init__(self, store: RunStore, life: Life) -> None:
        self._store = store
        self._life = life

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._store, name)
        if name.startswith("_") or not callable(member):
            return member

        def call(*words: Any, **named: Any) -> Any:
            self._life.reach(f"before {name}")
            answer = member(*words, **named)
            if name in TOLD:
                self._life.reach(f"after {name}")
            return answer

        return call


class OneByOne:
    """A store on which claim, start, completion and dispatch are a call each, as upstream's interface has them."""

    def __init__(self, store: Any, plain: RunStore) -> None:
        self._store = store
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def claim_step(self, run_id: str, step_key: str, *, step_type: str) -> StepClaim | None:
        """Claim, then start."""
        if not self._store.try_claim_step(run_id, step_key):
            return None
        attempt = self._store.record_step_start(run_id, step_key, step_type)
        info = self._plain.get_claim(run_id, step_key)
        assert info is not None
        return StepClaim(run_id, step_key, info.owner, info.fencing_token, attempt, info.lease_id)

    def complete_step(
        self, claim: StepClaim, status: str, *, output_json: str | None, error: str | None, dispatch: Iterable[str]
    ) -> frozenset[str]:
        """Complete, then record what follows."""
        self._store.record_step_complete(claim.run_id, claim.step_key, status, output_json, error)
        return frozenset(key for key in dispatch if self._store.try_record_dispatch(claim.run_id, key))


def live(
    store: RunStore, style: str, step_key: str, reached: Callable[[str], None], sent: Callable[[str], None]
) -> None:
    """Handle one message of the run, as every worker does."""
    life = Life(reached)
    watched: Any = Watched(store, life)

    def body(claim: StepClaim) -> str:
        life.reach("in the body")
        return json.dumps({"by": claim.owner})

    def dispatch(_: str, key: str) -> None:
        life.reach("before sending")
        sent(key)

    seen = watched if style == "claim_step" else OneByOne(watched, store)
    Engine(cast("RunStore", seen), FLOW, body, dispatch).handle("run", step_key)
    life.reach("before the message is acknowledged")


def points(style: str, step_key: str) -> list[str]:
    """Name every point in the life of a step of the run, in their order."""
    from stepclaim.testing import InMemoryRunStore  # noqa: PLC0415 - the doomed need not load it

    found: list[str] = []
    with InMemoryRunStore() as store:
        Engine(store, FLOW, lambda _: None, lambda *_: None).trigger("run")
        for key in FLOW.steps:
            reached = found.append if key == step_key else lambda _: None
            live(store, style, key, reached, lambda _: None)
            if key == step_key:
                return found
    raise AssertionError(step_key)


def main() -> None:
    """Handle one step of the run and die at the point; tell what was sent before."""
    endpoint, prefix, ttl, style, step_key, point = sys.argv[1:]

    def reached(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    with EtcdRunStore.connect(endpoint, prefix=prefix, owner="doomed", lease_ttl=float(ttl)) as store:
        live(store, style, step_key, reached, lambda key: print(key, flush=True))


if __name__ == "__main__":
    main()
