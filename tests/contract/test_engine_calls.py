"""Conformance C3, C7, R, S9 and the design's section 5: retry, reset, control, idempotency keys, retention."""

import datetime as dt
from functools import partial

import pytest

from fix_stores import AnyStore, OpenStore, gated
from stepclaim import ClaimLostError, ConfigurationError, StepConflictError
from stepclaim.models import PREREQUISITES_UNMET

RUN = "3f2b8c1e-0000-4000-8000-00000000abcd"
FLOW = "6a2b8c1e-0000-4000-8000-00000000abcd"


async def test_c3_one_of_32_registers_an_idempotency_key(store: AnyStore) -> None:
    runs = [f"run-{n}" for n in range(32)]
    answers = await gated(
        [partial(store.try_register_idempotency_key, FLOW, "manual", "shared-key", run) for run in runs]
    )
    assert answers.count(True) == 1
    winner = runs[answers.index(True)]
    assert await store.find_run_by_idempotency_key(FLOW, "manual", "shared-key") == winner


async def test_c7_keys_are_apart_by_trigger_and_flow_but_not_by_case(store: AnyStore) -> None:
    assert await store.try_register_idempotency_key(FLOW, "manual", "request-001", "A") is True
    assert await store.try_register_idempotency_key(FLOW, "webhook", "request-001", "B") is True
    assert await store.try_register_idempotency_key("other flow", "manual", "request-001", "C") is True
    assert await store.try_register_idempotency_key(FLOW.upper(), " MANUAL ", "Request-001\n", "D") is False
    assert await store.find_run_by_idempotency_key(FLOW, "Manual", " REQUEST-001") == "A"
    assert await store.find_run_by_idempotency_key(FLOW, "webhook", "request-001") == "B"
    assert await store.find_run_by_idempotency_key("other flow", "manual", "request-001") == "C"
    assert await store.find_run_by_idempotency_key(FLOW, "manual", "unknown") is None
    for bad in ("", "  ", None, 7):
        with pytest.raises(ConfigurationError):
            await store.try_register_idempotency_key(FLOW, "manual", bad, "A")


async def test_run_ids_come_back_canonical(store: AnyStore) -> None:
    await store.try_register_idempotency_key(FLOW, "manual", "k", RUN.upper())
    assert await store.find_run_by_idempotency_key(FLOW, "manual", "k") == RUN


async def test_r1_cancelled_once(store: AnyStore) -> None:
    assert await store.get_run_control(RUN) is None
    assert await store.request_cancel(RUN, "user-cancel") is True
    assert await store.request_cancel(RUN, "duplicate-call") is False
    control = await store.get_run_control(RUN)
    assert (control.cancel_requested, control.cancel_reason, control.timed_out_at) == (True, "user-cancel", None)
    assert control.cancel_requested_at.tzinfo is not None


async def test_r2_timed_out_once(store: AnyStore) -> None:
    assert await store.mark_timed_out(RUN) is True
    first = await store.get_run_control(RUN)
    assert await store.mark_timed_out(RUN, "again") is False
    assert await store.get_run_control(RUN) == first


async def test_r3_cancelled_then_timed_out(store: AnyStore) -> None:
    assert await store.request_cancel(RUN, "first") is True
    assert await store.mark_timed_out(RUN, "second") is True
    control = await store.get_run_control(RUN)
    assert control.cancel_requested
    assert control.timed_out_at is not None
    assert control.cancel_reason == "first"


async def test_r4_timed_out_then_cancelled(store: AnyStore) -> None:
    assert await store.mark_timed_out(RUN, "too late") is True
    assert await store.request_cancel(RUN, "user") is False
    control = await store.get_run_control(RUN)
    assert control.cancel_requested
    assert control.timed_out_at is not None
    assert control.cancel_reason == "too late"


async def test_configuring_keeps_what_was_asked(store: AnyStore) -> None:
    at = dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    await store.configure_run(RUN, FLOW, "manual")
    await store.request_cancel(RUN, "why")
    await store.configure_run(RUN, FLOW, "webhook", "key", at)
    control = await store.get_run_control(RUN)
    assert (control.run_id, control.flow_id, control.trigger_key) == (RUN, FLOW, "webhook")
    assert (control.idempotency_key, control.timeout_at) == ("key", at)
    assert (control.cancel_requested, control.cancel_reason) == (True, "why")
    with pytest.raises(ConfigurationError, match="time zone"):
        await store.configure_run(RUN, FLOW, "manual", None, dt.datetime(2030, 1, 1))  # noqa: DTZ001 - the point


async def test_one_of_many_cancels(store: AnyStore) -> None:
    answers = await gated([partial(store.request_cancel, RUN, str(n)) for n in range(16)])
    assert answers.count(True) == 1
    assert (await store.get_run_control(RUN)).cancel_reason == str(answers.index(True))


async def test_a_run_starts_with_its_idempotency_key(store: AnyStore) -> None:
    ids = [f"run-{n}" for n in range(16)]
    runs = await gated([partial(store.start_run, FLOW, "F", name, "manual", idempotency_key="order-1") for name in ids])
    winners = {run.run_id for run in runs}
    assert len(winners) == 1
    assert await store.find_run_by_idempotency_key(FLOW, "manual", "order-1") in winners
    assert {run.run_id for run in await store.get_runs()} == winners
    other = await store.start_run(FLOW, "F", "another", "webhook", idempotency_key="order-1")
    assert other.run_id == "another"


async def test_a_key_that_stands_for_a_run_never_started(store: AnyStore) -> None:
    await store.try_register_idempotency_key(FLOW, "manual", "k", "a")
    with pytest.raises(StepConflictError, match="never started"):
        await store.start_run(FLOW, "F", "b", "manual", idempotency_key="k")
    assert (await store.start_run(FLOW, "F", "a", "manual", idempotency_key="k")).run_id == "a"
    assert (await store.start_run(FLOW, "F", "b", "manual", idempotency_key="k")).run_id == "a"


async def failed_step(store: AnyStore, key: str = "a") -> None:
    await store.start_run(FLOW, "F", RUN, "manual")
    await store.try_record_dispatch(RUN, key)
    claim = await store.claim_step(RUN, key, step_type="T", input_json="1")
    await store.complete_step(claim, "Failed", error="boom")
    await store.complete_run(RUN, "Failed")


async def test_s9_a_retry_sets_step_and_run_running(store: AnyStore) -> None:
    await failed_step(store)
    assert await store.get_active_runs() == []
    await store.retry_step(RUN, "a")
    run = await store.get_run(RUN)
    assert (run.status, run.completed_at) == ("Running", None)
    assert [active.run_id for active in await store.get_active_runs()] == [RUN]
    (step,) = run.steps
    assert (step.status, step.attempt_count, step.completed_at, step.error) == ("Running", 1, None, None)
    assert [(each.attempt, each.status, each.error) for each in step.attempts] == [(1, "Failed", "boom")]
    assert await store.get_dispatched_step_keys(RUN) == frozenset()
    await store.retry_step(RUN, "a")
    claim = await store.claim_step(RUN, "a")
    assert claim.attempt == 2
    assert await store.try_claim_step(RUN, "a") is False
    await store.complete_step(claim, "Succeeded")
    (step,) = (await store.get_run(RUN)).steps
    assert [(each.attempt, each.status) for each in step.attempts] == [(1, "Failed"), (2, "Succeeded")]
    assert step.attempt_count == 2


async def test_a_retry_fences_the_old_holder(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    claim = await one.claim_step(RUN, "a")
    await two.retry_step(RUN, "a")
    with pytest.raises(ClaimLostError):
        await one.complete_step(claim, "Succeeded")
    assert await two.get_claim(RUN, "a") is None
    assert await two.record_step_start(RUN, "a", "T") == 2
    await two.retry_step(RUN, "unknown step")
    await two.retry_step("unknown run", "a")
    assert await two.get_run("unknown run") is None
    assert await two.get_step_statuses("unknown run") == {}


async def test_a_reset_takes_only_what_cascaded(store: AnyStore) -> None:
    await store.start_run(FLOW, "F", RUN, "manual")
    await store.record_skipped_step(RUN, "cascade", "T", PREREQUISITES_UNMET)
    await store.try_record_dispatch(RUN, "cascade")
    await store.record_skipped_step(RUN, "when", "T", "When clause 'x' evaluated to false (1 > 2).", "{}")
    await store.record_skipped_step(RUN, "not asked for", "T", PREREQUISITES_UNMET)
    claim = await store.claim_step(RUN, "running")
    await store.try_record_dispatch(RUN, "running")
    before = {step.step_key: step for step in (await store.get_run(RUN)).steps}
    await store.reset_cascade_skipped_dependents(RUN, ["cascade", "when", "running", "unknown"])
    after = {step.step_key: step for step in (await store.get_run(RUN)).steps}
    del before["cascade"]
    assert after == before
    assert await store.get_dispatched_step_keys(RUN) == {"running"}
    assert await store.holds(claim)
    assert await store.try_claim_step(RUN, "when") is False
    assert await store.try_claim_step(RUN, "not asked for") is False
    again = await store.claim_step(RUN, "cascade")
    assert again.attempt == 2
    assert await store.claim_step(RUN, "cascade") is None
    steps = {step.step_key: step for step in (await store.get_run(RUN)).steps}
    assert [(each.attempt, each.status) for each in steps["cascade"].attempts] == [(1, "Skipped"), (2, "Running")]
    await store.reset_cascade_skipped_dependents(RUN, [])
    with pytest.raises(ConfigurationError):
        await store.reset_cascade_skipped_dependents(RUN, "cascade")


async def test_a_reset_of_many(store: AnyStore) -> None:
    keys = [f"s{n}" for n in range(60)]
    for key in keys:
        await store.record_skipped_step(RUN, key, "T", PREREQUISITES_UNMET)
    await store.reset_cascade_skipped_dependents(RUN, keys)
    assert await store.get_step_statuses(RUN) == {}
    numbers = await gated([partial(store.record_step_start, RUN, key, "T") for key in keys[:20]])
    assert set(numbers) == {2}
    await store.record_skipped_step(RUN, "s30", "T", "r")
    await store.start_run(FLOW, "F", RUN, "manual")
    assert {step.attempt_count for step in (await store.get_run(RUN)).steps} == {2}


async def test_orphans_are_running_without_a_holder(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    assert await one.orphaned_steps(RUN) == frozenset()
    await one.claim_step(RUN, "held")
    await two.claim_step(RUN, "left")
    await one.record_step_start(RUN, "never claimed", "T")
    parked = await one.claim_step(RUN, "parked")
    await one.defer_step(parked)
    done = await one.claim_step(RUN, "done")
    await one.complete_step(done, "Succeeded")
    await two.close()
    assert await one.orphaned_steps(RUN) == {"left", "never claimed"}


async def test_a_completion_dispatches_in_the_same_transaction(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    claim = await one.claim_step(RUN, "a")
    await two.try_record_dispatch(RUN, "c")
    dispatched = await one.complete_step(claim, "Succeeded", dispatch=["b", "c", "d/e", "b"])
    assert dispatched == {"b", "d/e"}
    assert await two.get_dispatched_step_keys(RUN) == {"b", "c", "d/e"}
    assert await one.complete_step(claim, "Succeeded", dispatch=["b", "c"]) == {"b"}  # told again, the same answer
    stale = await one.claim_step(RUN, "x")
    await two.release_step_claim(RUN, "x")
    with pytest.raises(ClaimLostError):
        await one.complete_step(stale, "Succeeded", dispatch=["y"])
    assert await two.get_dispatched_step_keys(RUN) == {"b", "c", "d/e"}
    many = await one.claim_step(RUN, "many")
    with pytest.raises(ConfigurationError, match="at most 100"):
        await one.complete_step(many, "Succeeded", dispatch=[str(n) for n in range(101)])
    with pytest.raises(ConfigurationError):
        await one.complete_step(many, "Succeeded", dispatch="abc")
    assert len(await one.complete_step(many, "Succeeded", dispatch=[str(n) for n in range(100)])) == 100


async def test_a_deferral_can_dispatch_anew(store: AnyStore) -> None:
    claim = await store.claim_step(RUN, "a")
    await store.defer_step(claim, dispatch=True)
    assert await store.get_dispatched_step_keys(RUN) == {"a"}
    assert await store.get_step_statuses(RUN) == {"a": "Pending"}


async def test_deleting_takes_everything_of_the_run(store: AnyStore) -> None:
    for run in (RUN, "neighbour"):
        await store.start_run(FLOW, "F", run, "manual", idempotency_key=f"key of {run}")
        await store.configure_run(run, FLOW, "manual")
        await store.try_register_idempotency_key(FLOW, "webhook", f"other key of {run}", run)
        for key in ("a", "b"):
            await store.try_record_dispatch(run, key)
            claim = await store.claim_step(run, key, input_json="1")
            await store.complete_step(claim, "Failed", error="x")
            await store.retry_step(run, key)
        await store.claim_step(run, "a")
    before = await store.get_run("neighbour")
    assert await store.delete_run(RUN) is True
    assert await store.delete_run(RUN) is False
    assert await store.get_run(RUN) is None
    assert await store.get_step_statuses(RUN) == {}
    assert await store.get_run_control(RUN) is None
    assert await store.get_claims(RUN) == []
    assert await store.get_dispatched_step_keys(RUN) == frozenset()
    assert await store.find_run_by_idempotency_key(FLOW, "manual", f"key of {RUN}") is None
    assert await store.find_run_by_idempotency_key(FLOW, "webhook", f"other key of {RUN}") is None
    assert await store.get_run("neighbour") == before
    assert await store.find_run_by_idempotency_key(FLOW, "webhook", "other key of neighbour") == "neighbour"
    assert [run.run_id for run in await store.get_active_runs()] == ["neighbour"]
    again = await store.claim_step(RUN, "a")
    assert again.attempt == 1


async def test_purging_takes_what_was_completed_before(store: AnyStore) -> None:
    for n in range(7):
        await store.start_run(FLOW, "F", f"run-{n}", "manual", idempotency_key=f"k{n}")
        await store.record_step_start(f"run-{n}", "a", "T", "1")
        if n < 5:
            await store.complete_run(f"run-{n}", "Succeeded")
    times = {run.run_id: run.completed_at for run in await store.get_runs()}
    assert await store.purge_runs(times["run-3"]) == 3
    assert sorted(run.run_id for run in await store.get_runs()) == ["run-3", "run-4", "run-5", "run-6"]
    later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    assert await store.purge_runs(later, limit=1) == 1
    assert sorted(run.run_id for run in await store.get_runs()) == ["run-4", "run-5", "run-6"]
    assert await store.purge_runs(later) == 1
    assert await store.purge_runs(later) == 0
    assert sorted(run.run_id for run in await store.get_active_runs()) == ["run-5", "run-6"]
    assert await store.find_run_by_idempotency_key(FLOW, "manual", "k4") is None
    assert await store.find_run_by_idempotency_key(FLOW, "manual", "k5") == "run-5"
    for bad in (dt.datetime(2030, 1, 1), "yesterday", None):  # noqa: DTZ001 - the point
        with pytest.raises(ConfigurationError):
            await store.purge_runs(bad)
    with pytest.raises(ConfigurationError):
        await store.purge_runs(later, limit=0)


async def test_cancelled_and_succeeded_race_and_the_first_stands(store: AnyStore) -> None:
    for n in range(20):
        run = f"run-{n}"
        await store.start_run(FLOW, "F", run, "manual")
        answers = await gated(
            [partial(store.complete_run, run, "Cancelled"), partial(store.complete_run, run, "Succeeded")]
        )
        assert answers.count(True) == 1
        assert await store.get_run_status(run) == ("Cancelled" if answers[0] else "Succeeded")
