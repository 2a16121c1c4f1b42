"""Conformance S: runs, steps and their attempts, on all four stores."""

import datetime as dt
from functools import partial

import pytest

from fix_stores import AnyStore, OpenStore, gated
from stepclaim import StepConflictError

RUN = "3f2b8c1e-0000-4000-8000-00000000abcd"
FLOW = "6a2b8c1e-0000-4000-8000-00000000abcd"


async def test_s1_a_run_starts(store: AnyStore) -> None:
    before = dt.datetime.now(dt.UTC)
    run = await store.start_run(FLOW, "MyFlow", RUN, "manual", None, "job-1")
    assert (run.run_id, run.flow_id, run.flow_name, run.trigger_key, run.job_id) == (
        RUN,
        FLOW,
        "MyFlow",
        "manual",
        "job-1",
    )
    assert run.status == "Running"
    assert before <= run.started_at <= dt.datetime.now(dt.UTC)
    assert run.started_at.tzinfo is not None
    assert run.completed_at is None
    assert await store.get_run(RUN) == run


async def test_a_run_that_stands_is_given_back_unchanged(store: AnyStore) -> None:
    first = await store.start_run(FLOW, "MyFlow", RUN, "manual", '{"a" : 1}', source_run_id="other")
    again = await store.start_run("f2", "Other", RUN.upper(), "webhook", None, "job-2")
    assert again == first
    assert (again.trigger_data_json, again.source_run_id) == ('{"a" : 1}', "other")
    await store.complete_run(RUN, "Failed")
    assert (await store.start_run(FLOW, "MyFlow", RUN, "manual")).status == "Failed"
    assert await store.get_active_runs() == []


async def test_s2_a_step_starts(store: AnyStore) -> None:
    await store.start_run(FLOW, "MyFlow", RUN, "manual")
    assert await store.record_step_start(RUN, "step1", "LogMessage", "{}", "job1") == 1
    (step,) = (await store.get_run(RUN)).steps
    assert (step.step_key, step.step_type, step.status, step.input_json, step.job_id) == (
        "step1",
        "LogMessage",
        "Running",
        "{}",
        "job1",
    )
    (attempt,) = step.attempts
    assert (attempt.attempt, attempt.status, attempt.completed_at) == (1, "Running", None)


async def test_s3_a_step_succeeds(store: AnyStore) -> None:
    await store.start_run(FLOW, "MyFlow", RUN, "manual")
    await store.record_step_start(RUN, "step1", "LogMessage")
    await store.record_step_complete(RUN, "step1", "succeeded", '{"result":1}')
    (step,) = (await store.get_run(RUN)).steps
    (attempt,) = step.attempts
    for record in (step, attempt):
        assert (record.status, record.output_json) == ("Succeeded", '{"result":1}')
        assert record.completed_at >= record.started_at
    assert await store.try_claim_step(RUN, "step1") is False


@pytest.mark.parametrize(("first", "error"), [("Pending", None), ("Failed", "err")])
async def test_s4_s5_a_second_attempt(store: AnyStore, first: str, error: str | None) -> None:
    await store.start_run(FLOW, "MyFlow", RUN, "manual")
    assert await store.record_step_start(RUN, "step1", "T", '"in 1"') == 1
    await store.record_step_complete(RUN, "step1", first, None, error)
    assert await store.record_step_start(RUN, "step1", "T", '"in 2"') == 2
    assert await store.get_step_statuses(RUN) == {"step1": "Running"}
    await store.record_step_complete(RUN, "step1", "Succeeded", '"out 2"')
    (step,) = (await store.get_run(RUN)).steps
    assert (step.status, step.attempt_count) == ("Succeeded", 2)
    told = [(each.attempt, each.status, each.input_json, each.output_json, each.error) for each in step.attempts]
    assert told == [(1, first, '"in 1"', None, error), (2, "Succeeded", '"in 2"', '"out 2"', None)]


async def test_s6_s7_a_run_completes(store: AnyStore) -> None:
    await store.start_run(FLOW, "MyFlow", RUN, "webhook", '{"body": "x"}')
    await store.record_step_start(RUN, "step1", "T")
    await store.record_step_complete(RUN, "step1", "Succeeded")
    assert await store.complete_run(RUN, "Succeeded") is True
    run = await store.get_run(RUN)
    assert (run.status, run.trigger_data_json) == ("Succeeded", '{"body": "x"}')
    assert run.completed_at >= run.started_at
    assert [len(step.attempts) for step in run.steps] == [1]
    assert await store.get_run_status(RUN) == "Succeeded"


async def test_s8_unknown_runs(store: AnyStore) -> None:
    assert await store.get_run(RUN) is None
    assert await store.get_run_status(RUN) is None
    assert await store.complete_run(RUN, "Failed") is False
    assert await store.get_step_statuses(RUN) == {}
    assert await store.get_claimed_step_keys(RUN) == frozenset()
    assert await store.get_claim(RUN, "a") is None
    await store.record_step_complete(RUN, "a", "Succeeded")
    await store.release_step_claim(RUN, "a")
    assert await store.get_step_statuses(RUN) == {}
    assert await store.try_claim_step(RUN, "a") is True


async def test_s10_active_runs_newest_first(store: AnyStore) -> None:
    for name in ("one", "two", "three", "four"):
        await store.start_run(FLOW, "MyFlow", name, "manual")
    await store.complete_run("two", "Succeeded")
    assert [run.run_id for run in await store.get_active_runs()] == ["four", "three", "one"]
    assert [run.run_id for run in await store.get_runs()] == ["four", "three", "two", "one"]


async def test_the_first_final_status_of_a_run_stands(store: AnyStore) -> None:
    await store.start_run(FLOW, "MyFlow", RUN, "manual")
    statuses = ["Succeeded", "Failed", "Cancelled", "TimedOut"] * 4
    answers = await gated([partial(store.complete_run, RUN, status) for status in statuses])
    assert answers.count(True) == 1
    assert await store.get_run_status(RUN) == statuses[answers.index(True)]


async def test_attempts_have_no_gaps_under_concurrency(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(3)]
    calls = [partial(each.record_step_start, RUN, "a", "T", f'"{n}"') for n in range(4) for each in stores]
    numbers = await gated(calls)
    assert sorted(numbers) == list(range(1, 13))
    await stores[0].start_run(FLOW, "F", RUN, "manual")
    (step,) = (await stores[0].get_run(RUN)).steps
    assert [each.attempt for each in step.attempts] == list(range(1, 13))
    assert all(each.input_json is not None for each in step.attempts)


async def test_a_completion_without_a_start_does_nothing(store: AnyStore) -> None:
    await store.try_claim_step(RUN, "a")
    await store.record_step_complete(RUN, "a", "Succeeded", "1")
    assert await store.get_step_statuses(RUN) == {}
    assert await store.get_claimed_step_keys(RUN) == {"a"}


async def test_a_pending_completion_leaves_the_claim(store: AnyStore) -> None:
    await store.try_claim_step(RUN, "a")
    await store.record_step_start(RUN, "a", "T")
    await store.record_step_complete(RUN, "a", "Pending")
    assert await store.get_step_statuses(RUN) == {"a": "Pending"}
    assert await store.get_claimed_step_keys(RUN) == {"a"}
    await store.record_step_complete(RUN, "a", "Succeeded")
    assert await store.get_claimed_step_keys(RUN) == frozenset()


async def test_a_second_result_is_refused(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    await one.record_step_start(RUN, "a", "T")
    await one.record_step_complete(RUN, "a", "Succeeded", "1")
    await two.record_step_complete(RUN, "a", "Succeeded", "1")
    for late in (
        partial(two.record_step_complete, RUN, "a", "Failed", None, "late"),
        partial(two.record_step_complete, RUN, "a", "Succeeded", "2"),
        partial(two.record_step_complete, RUN, "a", "Pending"),
    ):
        with pytest.raises(StepConflictError):
            await late()
    await one.start_run(FLOW, "F", RUN, "manual")
    (step,) = (await one.get_run(RUN)).steps
    assert (step.status, step.output_json) == ("Succeeded", "1")


async def test_texts_are_kept_byte_for_byte(store: AnyStore) -> None:
    odd = '{ "a":1e3 ,\t"b": "\\u00e4ä\U0001f600", "a": 2 }\n'
    await store.start_run(FLOW, odd, RUN, odd, odd, odd)
    claim = await store.claim_step(RUN, "a", step_type=odd, input_json=odd, job_id=odd)
    await store.complete_step(claim, "Failed", output_json=odd, error=odd)
    await store.record_skipped_step(RUN, "b", odd, odd, odd)
    run = await store.get_run(RUN)
    assert {run.flow_name, run.trigger_key, run.trigger_data_json, run.job_id} == {odd}
    a, b = run.steps
    assert {a.step_type, a.input_json, a.job_id, a.output_json, a.error} == {odd}
    assert {b.step_type, b.error, b.evaluation_trace_json} == {odd}
