"""Whether a concurrent history could have happened one call after another: Wing and Gong's search, with Lowe's memo.

An operation took effect at one moment between its beginning and its end, and the model says which answers a state
allows. The search takes the operations that may come first, one after another, and goes back when an operation's end
is reached before it was taken. What was taken, as a set of bits, and the state it led to are remembered: the same pair
is never tried twice, which is what makes the search bearable.

An operation without an end (its caller was never told) may have taken effect at any time after its beginning, or
never. Two cuts keep many of them from costing much, and neither changes a verdict: one that would change nothing is
left where it is, and of those that ask for the same thing the earliest goes first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

S = TypeVar("S")


class Model(Protocol[S]):
    """What a single caller would see. States are hashable and compared by value."""

    @property
    def init(self) -> S:
        """The state before anything happened."""

    def step(self, state: S, asked: Any, answer: Any, /) -> tuple[bool, S]:
        """Say whether the state allows the answer, and which state follows. An answer of None is one nobody knows."""


class Verdict(StrEnum):
    """What the search came to."""

    TRUE = "true"
    FALSE = "false"
    UNDECIDED = "undecided"
    """Time was up before the search was over."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call: what was asked, what was answered, and between which moments."""

    asked: Any
    answer: Any
    invoked: float
    returned: float | None = None
    """None for a call that nobody was told the end of."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A verdict; where it is not `true`, the operation that no order explained."""

    verdict: Verdict
    stuck: Operation | None = None


class _Search(Generic[S]):
    """One key's search. Calls and ends stand in one doubly linked list, by time; taking an operation lifts both out."""

    def __init__(self, model: Model[S], operations: Sequence[Operation]) -> None:
        self.model = model
        closed = sorted((each for each in operations if each.returned is not None), key=lambda each: each.invoked)
        opened = sorted((each for each in operations if each.returned is None), key=lambda each: each.invoked)
        self.operations = closed + opened
        self.closed = len(closed)
        # of equal open operations each waits for the one before it
        self.waits_for: dict[int, int] = {}
        newest: dict[Hashable, int] = {}
        for number in range(self.closed, len(self.operations)):
            asked = self.operations[number].asked
            if asked in newest:
                self.waits_for[number] = newest[asked]
            newest[asked] = number
        # a call at the very moment of another's end counts as beside it: clocks are no finer than that
        marks = [(each.invoked, 0, number) for number, each in enumerate(self.operations)]
        marks += [(each.returned or 0, 1, number) for number, each in enumerate(closed)]
        marks.sort()
        size = len(marks)
        self.call_of = [-1] * (size + 1)
        self.end_at = [0] * len(self.operations)
        self.end_of = [-1] * (size + 1)
        for place, (_, is_end, number) in enumerate(marks, 1):
            if is_end:
                self.end_at[number] = place
                self.end_of[place] = number
            else:
                self.call_of[place] = number
        self.after = [*range(1, size + 1), 0]  # place 0 is the head
        self.before = [size, *range(size)]

    def _lift(self, place: int) -> None:
        self.after[self.before[place]] = self.after[place]
        self.before[self.after[place]] = self.before[place]

    def _put_back(self, place: int) -> None:
        self.after[self.before[place]] = place
        self.before[self.after[place]] = place

    def run(self, deadline: float) -> Result:
        """Search until an order is found, none is left, or time is up."""
        step, after, operations = self.model.step, self.after, self.operations
        state = self.model.init
        # what was taken: all closed ones before `first`, those whose bits are set from there on, and some open ones
        first = taken = taken_open = 0
        seen: set[tuple[int, int, int, S]] = set()
        stack: list[tuple[int, S, int, int, int]] = []
        left = self.closed
        furthest = 0
        place = after[0]
        rounds = 0
        while left:
            rounds += 1
            if not rounds & 1023 and time.monotonic() > deadline:
                return Result(Verdict.UNDECIDED, self._at(furthest))
            number = self.call_of[place]
            if number < 0:  # an end: what was taken so far leaves no room for this operation
                furthest = max(furthest, place)
                if not stack:
                    return Result(Verdict.FALSE, self._at(furthest))
                place, state, first, taken, taken_open = stack.pop()
                number = self.call_of[place]
                if number < self.closed:
                    self._put_back(self.end_at[number])
                    left += 1
                self._put_back(place)
                place = after[place]
                continue
            asked = operations[number]
            allowed, following = step(state, asked.asked, asked.answer)
            if allowed and number >= self.closed:
                waits_for = self.waits_for.get(number)
                allowed = following != state and (
                    waits_for is None or bool(taken_open >> (waits_for - self.closed) & 1)
                )
            if allowed:
                now_first, now_taken, now_open = first, taken, taken_open
                if number < self.closed:
                    now_taken |= 1 << (number - first)
                    shift = ((now_taken + 1) & ~now_taken).bit_length() - 1  # the ones at its lower end
                    now_first, now_taken = first + shift, now_taken >> shift
                else:
                    now_open |= 1 << (number - self.closed)
                key = (now_first, now_taken, now_open, following)
                if key not in seen:
                    seen.add(key)
                    stack.append((place, state, first, taken, taken_open))
                    state, first, taken, taken_open = following, now_first, now_taken, now_open
                    self._lift(place)
                    if number < self.closed:
                        self._lift(self.end_at[number])
                        left -= 1
                    place = after[0]
                    continue
            place = after[place]
        return Result(Verdict.TRUE)

    def _at(self, place: int) -> Operation | None:
        return self.operations[self.end_of[place]] if place else None


def check(model: Model[Any], operations: Iterable[Operation], *, timeout: float = 60.0) -> Result:
    """Judge the history of one object; `timeout` is in seconds."""
    return _Search(model, list(operations)).run(time.monotonic() + timeout)


def check_each(
    model: Model[Any],
    operations: Iterable[Operation],
    key: Callable[[Operation], Hashable],
    *,
    timeout: float = 60.0,
) -> dict[Hashable, Result]:
    """Judge each key's history by itself: a history is linearizable if and only if each of its objects' is."""
    parts: dict[Hashable, list[Operation]] = {}
    for operation in operations:
        parts.setdefault(key(operation), []).append(operation)
    deadline = time.monotonic() + timeout
    return {part: _Search(model, its).run(deadline) for part, its in parts.items()}
