"""A history made ready to be judged: which call is about which claim, and when every revision was."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from .history import Outcome
from .truth import Mark, Moments, Truth, told_by_others

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .history import Event, History
    from .truth import Life, StepKey, StepTruth, Write

CLAIMS = frozenset({"claim_step", "try_claim_step", "wait_for_step"})
COMPLETIONS = frozenset({"complete_step", "record_step_complete"})
GIVE_UPS = frozenset({"release_claim", "defer_step"})
UNDOERS = frozenset({"release_step_claim", "retry_step"})
RUN_UNDOERS = frozenset({"reset_cascade_skipped_dependents", "delete_run"})
"""What may remove a claim that is sealed: of one step, or of a run's; a purge may remove any."""

Told: TypeAlias = tuple[str, str | None, str | None]
"""A result: its status, output and error."""


def result_asked(event: Event) -> Told:
    """Give the result that a completion tells."""
    return str(event.args.get("status")), event.args.get("output"), event.args.get("error")


class Case:
    """One history with its truth, and the calls sorted by the claims that they are about."""

    def __init__(self, history: History) -> None:
        """Sort everything; which of a store's claims `try_claim_step` won is found by owner and by time."""
        self.history = history
        self.truth = Truth(history)
        self.events = list(_expanded(history.events))
        self.tokens: dict[int, int] = {}
        self.unmatched: list[Event] = []
        self.of_step: dict[StepKey, list[Event]] = {}
        for event in self.events:
            self.of_step.setdefault(event.step, []).append(event)
            token = _token(event)
            if token is not None:
                self.tokens[id(event)] = token
        calls = {event.call for event in self.events}
        self.removed = bool(calls & {"delete_run", "purge_runs"})
        """Whether runs were removed: one that comes back begins anew."""
        self._purged = "purge_runs" in calls
        self._undone = {event.step for event in self.events if event.call in UNDOERS}
        self._undone |= {(event.step[0], "") for event in self.events if event.call in RUN_UNDOERS}
        early, late = told_by_others(history)
        self.moments = Moments(early, late)
        self._match()
        wrote = list(self._wrote())
        early += [Mark(revision, event.invoked, event) for event, revision in wrote]
        late += [Mark(revision, event.returned, event) for event, revision in wrote if event.returned is not None]
        self.wrote = wrote
        self.moments = Moments(early, late)

    def step(self, key: StepKey) -> StepTruth | None:
        """Give what etcd recorded of a step, if anything."""
        return self.truth.steps.get(key)

    def token(self, event: Event) -> int | None:
        """Give the token of the claim that a call won, or is about."""
        return self.tokens.get(id(event))

    def life(self, event: Event) -> Life | None:
        """Give the claim that a call won, or is about."""
        step, token = self.step(event.step), self.token(event)
        return None if step is None or token is None else step.life(token)

    def winners(self, life: Life) -> list[Event]:
        """Name the calls that were told that they won a claim."""
        return [each for each in self.claims(life.step) if self.token(each) == life.token and each.outcome == "ok"]

    def claims(self, step: StepKey) -> list[Event]:
        """Name all calls that tried to claim a step."""
        return [event for event in self.of_step.get(step, ()) if event.call in CLAIMS]

    def about(self, life: Life, calls: frozenset[str]) -> list[Event]:
        """Name the calls of some kinds that are about one claim."""
        return [
            event
            for event in self.of_step.get(life.step, ())
            if event.call in calls and self.token(event) == life.token
        ]

    def undone(self, step: StepKey) -> bool:
        """Whether anybody asked for anything that removes the step's result."""
        return self._purged or step in self._undone or (step[0], "") in self._undone

    def undoers(self, step: StepKey) -> list[Event]:
        """Name the calls that may have removed a step's claim, whoever held it."""
        of_run = self.of_step.get((step[0], ""), ()), self.of_step.get(("", ""), ())
        whole = [event for part in of_run for event in part if event.call in RUN_UNDOERS | {"purge_runs"}]
        return whole + [event for event in self.of_step.get(step, ()) if event.call in UNDOERS]

    def result_written(self, life: Life, seal: Write) -> Told:
        """Give the result that stood in etcd as soon as a claim was sealed."""
        step = self.truth.steps[life.step]
        row = step.row_at(seal.revision) or {}
        payload = step.payload_at(int(row.get("attempt") or 0), seal.revision) if row.get("payload") else None
        told = payload or {}
        return str((seal.record or {}).get("status")), told.get("output"), told.get("error")

    def maybe_seals(self, life: Life, result: Told) -> list[Event]:
        """Name the completions that may have written a result: those that were not told that they did not."""
        return [
            event
            for event in self.about(life, COMPLETIONS)
            if result_asked(event) == result and event.outcome in {Outcome.OK, Outcome.UNKNOWN}
        ]

    def possible(self, event: Event, revision: int) -> bool:
        """Whether a revision may lie inside a call, by everybody's word."""
        early, late = self.moments.not_before(revision), self.moments.not_after(revision)
        if late is not None and late.at < event.invoked:
            return False
        return early is None or event.returned is None or early.at <= event.returned

    def _match(self) -> None:
        taken = Counter((event.step, self.token(event)) for event in self.events if event.call in CLAIMS)
        # whichever ended first takes the first claim that may be its: no other order leaves less without one
        for event in sorted(self.events, key=lambda event: event.returned or 0):
            if event.call not in CLAIMS or event.outcome != Outcome.OK or self.token(event) is not None:
                continue
            step = self.step(event.step)
            last = {life.call: life for life in step.lives} if step is not None else {}  # what a call was told of
            for life in last.values():
                mine = event.owner is None or life.owner == event.owner
                if life.held and mine and not taken[life.step, life.token] and self.possible(event, life.token):
                    self.tokens[id(event)] = life.token
                    taken[life.step, life.token] += 1
                    break
            else:
                self.unmatched.append(event)

    def _wrote(self) -> Iterator[tuple[Event, int]]:
        """Name the revision that a call certainly wrote: the claim won, the claim given up, the only result told."""
        for event in self.events:
            life = self.life(event)
            if event.outcome != Outcome.OK or life is None:
                continue
            if event.call in CLAIMS:
                yield event, life.token
            elif event.call in GIVE_UPS and life.ended is not None:
                yield event, life.ended
            elif event.call == "complete_step" and life.seals:
                candidates = self.maybe_seals(life, result_asked(event))
                if len(candidates) == 1 and self.result_written(life, life.seals[0]) == result_asked(event):
                    yield event, life.seals[0].revision


def _token(event: Event) -> int | None:
    if event.call not in CLAIMS:
        token = event.args.get("token")
    elif event.outcome == Outcome.OK and isinstance(event.value, dict):
        token = event.value.get("token")
    else:
        token = None
    return None if token is None else int(token)


def _expanded(events: list[Event]) -> Iterator[Event]:
    """Take a claim of several steps as as many claims: each was decided by itself."""
    for event in events:
        if event.call != "claim_steps":
            yield event
            continue
        won: dict[str, Any] = event.value if isinstance(event.value, dict) else {}
        for step in event.args.get("steps", ()):
            outcome = event.outcome
            if outcome == Outcome.OK and step not in won:
                outcome = Outcome.REFUSED
            args = {"run": event.args.get("run"), "step": step}
            yield replace(event, call="claim_step", args=args, outcome=outcome, value=won.get(step))
