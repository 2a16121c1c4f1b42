"""When clauses: what they may say, and what they leave behind, byte for byte."""

from __future__ import annotations

import pytest

from stepclaim import StepStatus
from stepclaim.cli.when import Verdict, When
from stepclaim.errors import ConfigurationError

TRIGGER = '{"amount": 500, "who": {"name": "Zoë > all"}, "list": [1]}'
ENDED = {
    "a": (StepStatus.SUCCEEDED, '{"total": 3}'),
    "loop.0 x": (StepStatus.FAILED, None),
    "text": (StepStatus.SUCCEEDED, "no JSON"),
}


@pytest.mark.parametrize(
    ("expression", "resolved", "result"),
    [
        ("@triggerBody().amount > 1000", "500 > 1000", False),
        ("@triggerBody()?.amount<=500", "500 <= 500", True),
        ('@triggerBody().who.name == "Zoë > all"', '"Zoë > all" == "Zoë > all"', True),
        ('"a\\"b" != "a"', '"a\\"b" != "a"', True),
        ("@triggerBody().missing.deep == null", "null == null", True),
        ("@triggerBody().missing < 1", "null < 1", False),
        ("@triggerBody().who.name >= 1", '"Zoë > all" >= 1', False),
        ("@steps('a').output.total == 3", "3 == 3", True),
        ("3 < @steps('a').output.total", "3 < 3", False),
        ("@steps('loop.0 x').status == \"Failed\"", '"Failed" == "Failed"', True),
        ("@steps('loop.0 x').output.total == null", "null == null", True),
        ("@steps('text').output == null", "null == null", True),
        ("@steps('nobody').status == null", "null == null", True),
        ("true == true", "true == true", True),
    ],
)
def test_verdicts(expression: str, resolved: str, result: bool) -> None:
    assert When(expression).judge(TRIGGER, ENDED) == Verdict(expression, resolved, result)


def test_a_run_without_data() -> None:
    assert When("@triggerBody() == null").judge(None, {}).result


def test_reason_and_trace() -> None:
    verdict = When("@triggerBody().amount > 1000").judge(TRIGGER, {})
    assert verdict.reason == "When clause '@triggerBody().amount > 1000' evaluated to false (500 > 1000)."
    assert verdict.trace_json == (
        '{"expression": "@triggerBody().amount > 1000", "resolved": "500 > 1000", "result": false}'
    )
    assert "Zoë" in When("@triggerBody().who.name == 1").judge(TRIGGER, {}).trace_json


def test_the_steps_it_is_about() -> None:
    assert When("@steps('a').output == @steps('loop.0 x').output.y").steps == {"a", "loop.0 x"}
    assert When("@triggerBody().a == 1").steps == frozenset()


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1",
        "1 = 1",
        "1 == 1 == 1",
        "a == 1",
        "@steps('a') == 1",
        "@steps(a).output == 1",
        "@triggerBody.x == 1",
        "1 ==",
    ],
)
def test_what_cannot_be_read(expression: str) -> None:
    with pytest.raises(ConfigurationError, match="When clause"):
        When(expression)
