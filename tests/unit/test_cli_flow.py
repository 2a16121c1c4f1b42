"""Flows: what their files may say, and what a run's statuses mean for them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stepclaim.cli.flow import Flow
from stepclaim.cli.when import When
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
        ('{"steps": {"a": {"when": 1}}}', "'when'"),
        ('{"steps": {"a": {"when": "amount > 1000"}}}', "'amount'"),
        ('{"steps": {"a": [], "b": {"when": "@steps(\'a\').output == 1"}}}', "about 'a'"),
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


def test_a_step_that_was_put_off_is_left_to_whoever_scheduled_it() -> None:
    plan = CHAIN.plan({"a": StepStatus.PENDING})
    assert (plan.ready, plan.skip, plan.status) == ((), (), None)


def test_a_clause_makes_the_round_trip_and_may_be_about_all_that_comes_before() -> None:
    text = json.dumps(
        {"name": "n", "steps": {"x.1": [], "b": ["x.1"], "c": {"after": ["b"], "when": "@steps('x.1').status == 1"}}}
    )
    flow = Flow.from_json(text)
    assert flow.steps["c"].when == When("@steps('x.1').status == 1")
    assert Flow.from_json(flow.to_json()).steps == flow.steps
    assert flow.expected() == {"x.1": OK, "b": OK, "c": SKIPPED}


def test_successors_are_what_an_end_makes_ready() -> None:
    flow = Flow.from_json(
        json.dumps(
            {
                "steps": {
                    "a": [],
                    "b": [],
                    "join": ["a", "b"],
                    "mend": {"after": {"a": ["Failed"]}},
                    "clause": {"after": ["a"], "when": "1 == 1"},
                    "next": ["a"],
                }
            }
        )
    )
    assert flow.successors("a", OK, {"a": RUNNING, "b": RUNNING}) == ("next",)
    assert flow.successors("a", FAILED, {"a": RUNNING, "b": OK}) == ("mend",)
    assert set(flow.successors("a", OK, {"a": RUNNING, "b": OK})) == {"join", "next"}


def test_what_runs_again_revives_what_nothing_else_keeps_from_running() -> None:
    assert CHAIN.revived("b", {"a": OK, "b": RUNNING, "c": SKIPPED}) == ("c",)
    assert CHAIN.revived("b", {"a": OK, "b": RUNNING, "c": SKIPPED, "d": SKIPPED}) == ("c", "d")
    assert CHAIN.revived("c", {"a": OK, "b": OK, "c": RUNNING, "d": OK}) == ()
    join = Flow.from_json('{"steps": {"a": [], "b": [], "join": ["a", "b"]}}')
    assert join.revived("a", {"a": RUNNING, "b": OK, "join": SKIPPED}) == ("join",)
    assert join.revived("a", {"a": RUNNING, "b": FAILED, "join": SKIPPED}) == ()
