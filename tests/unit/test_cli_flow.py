"""Flows: what their files may say, and what a run's statuses mean for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stepclaim.cli.flow import Flow
from stepclaim.errors import ConfigurationError
from stepclaim.models import RunStatus, StepStatus

if TYPE_CHECKING:
    from pathlib import Path

OK, FAILED, SKIPPED, RUNNING = StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.RUNNING
CHAIN = Flow.from_json('{"name": "chain", "steps": {"a": [], "b": ["a"], "c": ["b"], "d": ["c"]}}')
RESCUED = Flow.from_json('{"steps": {"a": {"after": []}, "mend": {"after": {"a": ["failed"]}}}}')


def test_default_is_a_then_eight_side_by_side_then_join() -> None:
    flow = Flow.default()
    assert list(flow.steps) == ["a", *(f"b{n}" for n in range(8)), "join"]
    assert flow.plan({}).ready == ("a",)
    assert set(flow.plan({"a": OK}).ready) == {f"b{n}" for n in range(8)}
    assert flow.expected() == dict.fromkeys(flow.steps, OK)


def test_json_round_trip_keeps_everything() -> None:
    text = '{"name": "n", "steps": {"a": {"after": [], "type": "Log"}, "b": {"after": {"a": ["Failed", "Skipped"]}}}}'
    flow = Flow.from_json(text)
    assert flow.steps["b"].after == {"a": frozenset({FAILED, SKIPPED})}
    assert flow.steps["a"].type == "Log"
    assert Flow.from_json(flow.to_json()).steps == flow.steps


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("not JSON", "not readable JSON"),
        ("[]", "the flow must be a JSON object"),
        ("{}", "'steps' must be a JSON object"),
        ('{"steps": {}}', "has no steps"),
        ('{"steps": {"": []}}', "must not be empty"),
        ('{"name": 7, "steps": {"a": []}}', "name"),
        ('{"steps": {"a": ["nobody"]}}', "'nobody'"),
        ('{"steps": {"a": ["b"], "b": ["a"]}}', "in a circle"),
        ('{"steps": {"a": ["a"]}}', "in a circle"),
        ('{"steps": {"a": [], "a": []}}', "'a' stands there twice"),
        ('{"steps": {"a": {"afetr": []}}}', "'afetr'"),
        ('{"steps": {"a": {"after": 3}}}', "'after' must be"),
        ('{"steps": {"a": [3]}}', "names steps, not 3"),
        ('{"steps": {"a": [], "b": {"after": {"a": ["Done"]}}}}', "'Done'"),
        ('{"steps": {"a": [], "b": {"after": {"a": ["Running"]}}}}', "'Running'"),
        ('{"steps": {"a": [], "b": {"after": {"a": []}}}}', "statuses of 'a'"),
        ('{"steps": {"a": {"type": 1}}}', "'type'"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Flow.from_json(text)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.json"
    file.write_text(json.dumps({"steps": {"a": []}}), encoding="utf-8")
    assert Flow.from_file(file).name == "pipeline"
    with pytest.raises(ConfigurationError, match=r"missing\.json"):
        Flow.from_file(tmp_path / "missing.json")


def test_a_failure_skips_its_dependants_and_leaves_those_behind_them_without_record() -> None:
    assert CHAIN.plan({"a": OK, "b": FAILED}).skip == ("c",)
    over = CHAIN.plan({"a": OK, "b": FAILED, "c": SKIPPED})
    assert (over.ready, over.skip, over.status) == ((), (), RunStatus.FAILED)


def test_outcomes() -> None:
    assert RESCUED.plan({"a": FAILED}).ready == ("mend",)
    assert RESCUED.plan({"a": FAILED, "mend": OK}).status is RunStatus.SUCCEEDED
    assert RESCUED.plan({"a": FAILED, "mend": FAILED}).status is RunStatus.FAILED
    assert RESCUED.plan({"a": OK, "mend": SKIPPED}).status is RunStatus.SKIPPED
    assert RESCUED.expected() == {"a": OK, "mend": SKIPPED}
    assert CHAIN.plan({"a": OK, "b": RUNNING}).status is None
    assert CHAIN.plan(dict.fromkeys("abcd", OK)).status is RunStatus.SUCCEEDED


def test_a_step_that_was_put_off_is_ready_again() -> None:
    assert CHAIN.plan({"a": StepStatus.PENDING}).ready == ("a",)
