"""A flow: its steps, what each comes after, and what a run's statuses mean for it. Nothing here touches a store."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stepclaim._core.keys import text
from stepclaim.cli.when import When
from stepclaim.errors import ConfigurationError
from stepclaim.models import RunStatus, StepStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SUCCEEDED = frozenset({StepStatus.SUCCEEDED})


@dataclass(frozen=True)
class Step:
    """One step: what it comes after, in which statuses it accepts each, and when it runs even then."""

    key: str
    after: Mapping[str, frozenset[StepStatus]] = field(default_factory=dict)
    type: str = "Demo"
    when: When | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be done next in a run."""

    ready: tuple[str, ...]
    skip: tuple[str, ...]
    status: RunStatus | None
    """What the run ends with, or None while something is left."""


class Flow:
    """A named graph of steps, checked when it is made."""

    def __init__(self, name: str, steps: Iterable[Step]) -> None:
        """Check the graph; `ConfigurationError` names what is wrong with it."""
        self.name = text(name, "the flow's name")
        self.steps: dict[str, Step] = {}
        for step in steps:
            if text(step.key, "a step's key") in self.steps:
                raise ConfigurationError(f"flow {name!r} has two steps {step.key!r}")
            self.steps[step.key] = step
        if not self.steps:
            raise ConfigurationError(f"flow {name!r} has no steps")
        for step in self.steps.values():
            for other in step.after:
                if other not in self.steps:
                    raise ConfigurationError(f"step {step.key!r} comes after {other!r}, which is no step of the flow")
        graph = {key: list(step.after) for key, step in self.steps.items()}
        try:
            self._order = tuple(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circle = " → ".join(map(repr, error.args[1]))
            raise ConfigurationError(f"flow {name!r} goes in a circle: {circle}") from error
        self._leaves = self.steps.keys() - {other for step in self.steps.values() for other in step.after}
        self._check_clauses()

    @classmethod
    def default(cls) -> Flow:
        """Give `a`, then `b0` to `b7` side by side, then `join`."""
        middle = [f"b{number}" for number in range(8)]
        return cls(
            "demo",
            (
                Step("a"),
                *(Step(key, {"a": SUCCEEDED}) for key in middle),
                Step("join", dict.fromkeys(middle, SUCCEEDED)),
            ),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Flow:
        """Read a flow from a JSON file; `ConfigurationError` names the file and what is wrong with it."""
        try:
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the flow {path} can't be read: {error}") from error
        return cls.from_json(content, name=Path(path).stem)

    @classmethod
    def from_json(cls, content: str, *, name: str = "flow") -> Flow:
        """Read {"name": ..., "steps": {"a": {"after": []}, "b": {"after": ["a"]}, "c": {"after": {"a": ["Failed"]}}}}.

        A step may also be given as the list of what it comes after, and may have a clause: {"after": ["a"], "when":
        "@triggerBody().amount > 1000"}. `name` is used where the text has none.
        """
        try:
            found = json.loads(content, object_pairs_hook=_unique)
        except ValueError as error:
            raise ConfigurationError(f"the flow is not readable JSON: {error}") from error
        fields = _object(found, "the flow", {"name", "steps"})
        steps = _object(fields.get("steps"), "the flow's field 'steps'")
        return cls(fields.get("name", name), [_step(key, value) for key, value in steps.items()])

    def to_json(self) -> str:
        """Write the flow as `from_json` reads it."""
        steps = {
            key: {"type": step.type, "after": {other: sorted(accepted) for other, accepted in step.after.items()}}
            | ({"when": step.when.expression} if step.when else {})
            for key, step in self.steps.items()
        }
        return json.dumps({"name": self.name, "steps": steps})

    def plan(self, statuses: Mapping[str, StepStatus]) -> Plan:
        """Judge what stands: which steps are ready, which must be skipped, and how the run ends if nothing is left.

        A step behind a skipped one is neither: it can't be reached, gets no record, and is skipped work all the same.
        Nor is one that was put off: whoever did that has scheduled it. When clauses are the caller's to judge.
        """
        ready: list[str] = []
        skip: list[str] = []
        dead: set[str] = set()
        open_steps = False
        for key in self._order:
            status = statuses.get(key)
            if status is not None:
                open_steps = open_steps or not status.is_final
                continue
            after = self.steps[key].after
            refusing = {other for other, accepted in after.items() if _refuses(statuses.get(other), accepted)}
            if any(statuses[other] is not StepStatus.SKIPPED for other in refusing):
                skip.append(key)
            elif refusing or dead & after.keys():
                dead.add(key)
            elif all(other in statuses and statuses[other].is_final for other in after):
                ready.append(key)
            else:
                open_steps = True
        over = not (ready or skip or open_steps)
        return Plan(tuple(ready), tuple(skip), self._outcome(statuses, dead) if over else None)

    def successors(self, key: str, status: StepStatus, statuses: Mapping[str, StepStatus]) -> tuple[str, ...]:
        """Name the steps that become ready when one ends like that; of those with a clause nothing is known yet."""
        ready = self.plan({**statuses, key: status}).ready
        return tuple(each for each in ready if key in self.steps[each].after and self.steps[each].when is None)

    def revived(self, key: str, statuses: Mapping[str, StepStatus]) -> tuple[str, ...]:
        """Name the skipped steps behind one that runs again, but for those that something else keeps from running."""
        again = {key}
        for each in self._order:
            after = self.steps[each].after
            if statuses.get(each) is StepStatus.SKIPPED and not again.isdisjoint(after):
                kept = after.keys() - again
                if not any(_refuses(statuses.get(other), after[other]) for other in kept):
                    again.add(each)
        return tuple(each for each in self._order if each in again and each != key)

    def expected(self) -> dict[str, StepStatus]:
        """Tell every status of a run that was triggered without data and in which each body succeeds without output."""
        statuses: dict[str, StepStatus] = {}
        while (plan := self.plan(statuses)).status is None:
            statuses |= dict.fromkeys(plan.skip, StepStatus.SKIPPED)
            for key in plan.ready:
                when = self.steps[key].when
                runs = when is None or when.judge(None, {other: (end, None) for other, end in statuses.items()}).result
                statuses[key] = StepStatus.SUCCEEDED if runs else StepStatus.SKIPPED
        return statuses

    def _check_clauses(self) -> None:
        """Refuse a clause about a step that may not be over when it is judged."""
        before: dict[str, set[str]] = {}
        for key in self._order:
            step = self.steps[key]
            before[key] = set(step.after).union(*(before[other] for other in step.after))
            for other in step.when.steps if step.when else ():
                if other not in before[key]:
                    raise ConfigurationError(
                        f"step {key!r} has a When clause about {other!r}, which it doesn't come after"
                    )

    def _outcome(self, statuses: Mapping[str, StepStatus], dead: set[str]) -> RunStatus:
        """Judge a run in which nothing is left. A failure is handled when a dependant that accepts it succeeded."""
        handled = {
            other
            for key, step in self.steps.items()
            if statuses.get(key) is StepStatus.SUCCEEDED
            for other, accepted in step.after.items()
            if StepStatus.FAILED in accepted
        }
        if any(status is StepStatus.FAILED and key not in handled for key, status in statuses.items()):
            return RunStatus.FAILED
        if all(leaf in dead or statuses[leaf] is StepStatus.SKIPPED for leaf in self._leaves):
            return RunStatus.SKIPPED
        return RunStatus.SUCCEEDED


def _refuses(status: StepStatus | None, accepted: frozenset[StepStatus]) -> bool:
    return status is not None and status.is_final and status not in accepted


def _wrong(what: str) -> NoReturn:
    raise ConfigurationError(what)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _object(value: Any, what: str, known: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong(f"{what} must be a JSON object, not {json.dumps(value)[:60]}")
    if known is not None and (unknown := sorted(value.keys() - known)):
        _wrong(f"{what} has an unknown field {unknown[0]!r}: {', '.join(sorted(known))} are known")
    return value


def _step(key: str, value: Any) -> Step:
    fields = {"after": value} if isinstance(value, list) else _object(value, f"step {key!r}", {"after", "type", "when"})
    after = fields.get("after", [])
    if isinstance(after, list):
        after = {_name(key, other): ["Succeeded"] for other in after}
    if not isinstance(after, dict):
        _wrong(f"step {key!r}: 'after' must be a list of steps, or an object of steps and statuses")
    step_type = fields.get("type", Step.type)
    if not isinstance(step_type, str):
        _wrong(f"step {key!r}: 'type' must be a text")
    when = fields.get("when")
    if when is not None and not isinstance(when, str):
        _wrong(f"step {key!r}: 'when' must be a text")
    accepted = {other: _statuses(key, other, names) for other, names in after.items()}
    return Step(key, accepted, step_type, None if when is None else When(when))


def _name(key: str, other: Any) -> str:
    return other if isinstance(other, str) else _wrong(f"step {key!r}: 'after' names steps, not {json.dumps(other)}")


def _statuses(key: str, other: str, accepted: Any) -> frozenset[StepStatus]:
    names = [accepted] if isinstance(accepted, str) else accepted
    if not isinstance(names, list) or not names:
        _wrong(f"step {key!r}: give the statuses of {other!r} that it accepts as a list")
    known = {status.casefold(): status for status in StepStatus if status.is_final}
    for name in names:
        if not isinstance(name, str) or name.casefold() not in known:
            _wrong(f"step {key!r} accepts {other!r} as {name!r}, which is none of {', '.join(known.values())}")
    return frozenset(known[name.casefold()] for name in names)
