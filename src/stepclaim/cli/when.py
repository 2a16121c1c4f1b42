"""When clauses: one comparison of a run's data that decides whether a step whose prerequisites are met runs at all."""

from __future__ import annotations

import json
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepclaim.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stepclaim.models import StepStatus

    Ended = Mapping[str, tuple[StepStatus, str | None]]
    """Status and output of the steps that came before."""

_COMPARES: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_QUOTED = r"\"(?:[^\"\\]|\\.)*\""
_SIDE = rf"{_QUOTED}|@steps\('[^']+'\)[^\s<>=!]*|[^\s<>=!\"]+"
_CLAUSE = re.compile(rf"\s*({_SIDE})\s*(==|!=|<=|>=|<|>)\s*({_SIDE})\s*")
_REFERENCE = re.compile(
    r"@(?:triggerBody\(\)|steps\('(?P<step>[^']+)'\)\.(?P<part>output|status))(?P<path>(?:\??\.\w+)*)"
)


@dataclass(frozen=True)
class Verdict:
    """What a clause came to; reason and trace are public, byte for byte."""

    expression: str
    resolved: str
    result: bool

    @property
    def reason(self) -> str:
        """Why the step was skipped."""
        return f"When clause '{self.expression}' evaluated to false ({self.resolved})."

    @property
    def trace_json(self) -> str:
        """How it was decided."""
        trace = {"expression": self.expression, "resolved": self.resolved, "result": self.result}
        return json.dumps(trace, ensure_ascii=False)


@dataclass(frozen=True)
class When:
    """`@triggerBody().amount > 1000`, `@steps('a').output.total == 3` or `@steps('a').status != "Failed"`.

    Each side is such a reference or a JSON value. What isn't there is null, which is neither below nor above anything.
    """

    expression: str

    def __post_init__(self) -> None:
        """Refuse what can't be read; `ConfigurationError` shows it."""
        self._parts()

    @property
    def steps(self) -> frozenset[str]:
        """The steps that it refers to."""
        sides = self._parts()[::2]
        found = (_REFERENCE.fullmatch(side) for side in sides)
        return frozenset(match["step"] for match in found if match and match["step"])

    def judge(self, trigger_json: str | None, ended: Ended) -> Verdict:
        """Decide by what the run was triggered with and what came of its steps so far."""
        left_text, compare, right_text = self._parts()
        left, right = _value(left_text, trigger_json, ended), _value(right_text, trigger_json, ended)
        try:
            result = bool(_COMPARES[compare](left, right))
        except TypeError:  # a text and a number, say
            result = False
        resolved = f"{json.dumps(left, ensure_ascii=False)} {compare} {json.dumps(right, ensure_ascii=False)}"
        return Verdict(self.expression, resolved, result)

    def _parts(self) -> tuple[str, str, str]:
        match = _CLAUSE.fullmatch(self.expression)
        if match is None:
            raise ConfigurationError(f"a When clause must be one comparison of two values, not {self.expression!r}")
        left, compare, right = match.groups()
        for side in (left, right):
            if _REFERENCE.fullmatch(side) is None:
                try:
                    json.loads(side)
                except ValueError as error:
                    raise ConfigurationError(
                        f"the When clause {self.expression!r} has {side!r}, which is neither JSON nor @triggerBody() "
                        "nor @steps('key').output nor @steps('key').status"
                    ) from error
        return left, compare, right


def _value(side: str, trigger_json: str | None, ended: Ended) -> Any:
    match = _REFERENCE.fullmatch(side)
    if match is None:
        return json.loads(side)
    status, output = ended.get(match["step"], (None, None))
    if match["part"] == "status":
        value: Any = status
    else:
        value = _loaded(trigger_json if match["step"] is None else output)
    for name in re.findall(r"\w+", match["path"]):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _loaded(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:  # the store takes any text
        return None
