"""The register of one step's claim: what callers were told of it, and what the truth adds that nobody was told.

A call that was told that it claimed, sealed or gave up a claim is that change. A change in the truth that nobody was
told of (a lease's end, a claim whose winner died, a completion whose reply was lost) becomes an operation of its own,
between the moments that its revision is known to lie between. Everything else that was told is a look at the register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from .case import GIVE_UPS, result_asked
from .history import Outcome
from .linearizability import Operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case, Told
    from .history import Event
    from .truth import Life, StepKey

State: TypeAlias = "tuple[str, int, Told | None]"
"""Free, held or sealed; the newest token, kept when the claim goes, for tokens grow; and the result of a sealed one."""


class ClaimRegister:
    """What a single caller would see of one step's claim. Questions are tuples of a name, a token and a result."""

    init: State = ("free", 0, None)

    def step(self, state: State, asked: tuple[Any, ...], answer: str | tuple[Any, ...] | None, /) -> tuple[bool, State]:
        """Answers are "ok" and "no", and for `look` what was seen."""
        kind, newest, result = state
        name, token, told = asked
        mine = newest == token
        if name == "claim":
            if answer == "no":
                return kind != "free", state
            return kind == "free" and token > newest, ("held", token, None)
        if name == "seal":
            if answer == "no":
                return not (kind == "held" and mine), state
            if kind == "sealed" and mine and result == told:
                return True, state  # the same result, told again
            return kind == "held" and mine, ("sealed", token, told)
        if name == "make sealed":
            return kind == "free" and token > newest, ("sealed", token, told)
        if name == "give up":
            if answer == "no":
                return not (kind == "held" and mine), state
            return kind == "held" and mine, ("free", token, None)
        if name == "end":
            return kind != "free" and mine, ("free", newest, None)
        if name == "free":  # `release_step_claim`: at some moment of it there was no claim
            return kind == "free", state
        if name == "holds":
            return (kind == "held" and mine) == (answer == "ok"), state
        if name == "look":
            return answer == (("free", 0) if kind == "free" else (kind, newest)), state
        raise ValueError(f"the claim register has no {name!r}")


def operations(case: Case, step: StepKey) -> list[Operation]:
    """Tell the history of one step's claim as operations of its register."""
    found = [operation for event in case.of_step.get(step, ()) for operation in _told(case, event)]
    truth = case.step(step)
    for life in truth.lives if truth is not None else ():
        found += _untold(case, life)
    return found


def _told(case: Case, event: Event) -> Iterator[Operation]:
    token, outcome = case.token(event), event.outcome
    if event.returned is None or outcome in {Outcome.UNKNOWN, Outcome.ERROR}:
        return  # if it took place, the truth says so

    def one(asked: tuple[Any, ...], answer: str | tuple[Any, ...]) -> Operation:
        return Operation(asked, answer, event.invoked, event.returned, str(event))

    answer = "ok" if outcome == Outcome.OK else "no"
    match event.call:
        case "claim_step" | "try_claim_step" | "wait_for_step":
            # a wait that timed out need not have seen anything
            if (outcome == Outcome.OK and token is not None) or (answer == "no" and event.call != "wait_for_step"):
                yield one(("claim", token, None), answer)
        case "complete_step" if token is not None:
            yield one(("seal", token, result_asked(event)), answer)
        case "release_claim" | "defer_step" if token is not None:
            yield one(("give up", token, None), answer)
        case "release_step_claim" if outcome == Outcome.OK:
            yield one(("free", None, None), "ok")
        case "holds" if token is not None and outcome == Outcome.OK:
            yield one(("holds", token, None), "ok" if event.value else "no")
        case "get_claim" if outcome == Outcome.OK:
            seen = event.value
            yield one(("look", None, None), ("free", 0) if seen is None else (seen["state"], seen["token"]))


def _untold(case: Case, life: Life) -> Iterator[Operation]:
    """Tell what became of a claim by nobody's word but etcd's."""

    def one(asked: tuple[Any, ...], revision: int) -> Operation:
        early, late = case.moments.not_before(revision), case.moments.not_after(revision)
        since = early.at if early is not None else 0
        # without a bound it may be taken to be later than everything: then it explains nothing, which is no harm
        return Operation(asked, "ok", since, None if late is None else late.at, f"revision {revision} ({asked[0]})")

    if not life.held:
        yield one(("make sealed", life.token, case.result_written(life, life.writes[0])), life.token)
    else:
        if not case.winners(life):
            yield one(("claim", life.token, None), life.token)
        for seal in life.seals[:1]:
            result = case.result_written(life, seal)
            writers = case.maybe_seals(life, result)
            if [each.outcome for each in writers] != [Outcome.OK] or writers[0].call != "complete_step":
                yield one(("seal", life.token, result), seal.revision)
    if life.ended is not None and not any(event.outcome == Outcome.OK for event in case.about(life, GIVE_UPS)):
        yield one(("end", life.token, None), life.ended)
