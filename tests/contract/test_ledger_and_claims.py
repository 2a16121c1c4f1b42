"""Conformance D, C: the dispatch ledger and the claims, on all four stores."""

import uuid
from functools import partial

import pytest

from fix_stores import AnyStore, OpenStore, gated
from stepclaim import ClaimLostError, StepConflictError, StepStatus

RUN = "3f2b8c1e-0000-4000-8000-00000000abcd"


async def test_d1_to_d3_a_dispatch_is_recorded_once_until_it_is_released(store: AnyStore) -> None:
    assert await store.try_record_dispatch(RUN, "step1") is True
    assert await store.try_record_dispatch(RUN, "step1") is False
    await store.release_dispatch(RUN, "step1")
    assert await store.try_record_dispatch(RUN, "step1") is True


async def test_d4_the_ledger_names_what_it_holds(store: AnyStore) -> None:
    for key in ("step1", "step2", "step3"):
        await store.try_record_dispatch(RUN, key)
    await store.release_dispatch(RUN, "step2")
    assert await store.get_dispatched_step_keys(RUN) == {"step1", "step3"}


async def test_annotating_never_brings_a_dispatch_back(store: AnyStore) -> None:
    await store.annotate_dispatch(RUN, "step1", "job")
    assert await store.get_dispatched_step_keys(RUN) == frozenset()
    await store.try_record_dispatch(RUN, "step1")
    await store.annotate_dispatch(RUN, "step1", "job")
    assert await store.try_record_dispatch(RUN, "step1") is False
    await store.release_dispatch(RUN, "step1")
    await store.release_dispatch(RUN, "step1")
    await store.annotate_dispatch(RUN, "step1", "job")
    assert await store.get_dispatched_step_keys(RUN) == frozenset()


async def test_c1_one_of_64_dispatches(store: AnyStore) -> None:
    answers = await gated([partial(store.try_record_dispatch, RUN, "step1")] * 64)
    assert sorted(answers) == [False] * 63 + [True]


async def test_c2_one_of_64_claims(store: AnyStore) -> None:
    answers = await gated([partial(store.try_claim_step, RUN, "step1")] * 64)
    assert sorted(answers) == [False] * 63 + [True]


async def test_c4_four_replicas_share_eight_keys(open_store: OpenStore) -> None:
    replicas = [await open_store(owner=f"replica-{n}") for n in range(4)]
    keys = [f"loop.{n}.child" for n in range(8)]
    calls = [partial(replica.try_claim_step, RUN, key) for replica in replicas for key in keys]
    answers = await gated(calls)
    winners = [key for (key, won) in zip(keys * 4, answers, strict=True) if won]
    assert sorted(winners) == keys


async def test_c5_one_of_64_claims_of_a_loops_child(store: AnyStore) -> None:
    answers = await gated([partial(store.try_claim_step, RUN, "loop.3.child")] * 64)
    assert answers.count(True) == 1


async def test_c6_somebody_gets_a_dispatch_again(store: AnyStore) -> None:
    await store.try_record_dispatch(RUN, "step1")

    async def again() -> bool:
        await store.release_dispatch(RUN, "step1")
        return bool(await store.try_record_dispatch(RUN, "step1"))

    answers = await gated([again] * 16)
    assert any(answers)
    assert await store.get_dispatched_step_keys(RUN) == {"step1"}


async def test_a_claim_ends_only_by_release(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    assert await one.try_claim_step(RUN, "a") is True
    assert await two.try_claim_step(RUN, "a") is False
    assert await one.get_claimed_step_keys(RUN) == {"a"}
    await two.release_step_claim(RUN, "a")
    await two.release_step_claim(RUN, "a")
    assert await one.get_claimed_step_keys(RUN) == frozenset()
    assert await two.try_claim_step(RUN, "a") is True
    assert await one.try_claim_step(RUN, "a") is False


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED])
async def test_a_final_step_is_never_claimable(open_store: OpenStore, status: StepStatus) -> None:
    one = await open_store()
    claim = await one.claim_step(RUN, "a")
    await one.complete_step(claim, status)
    await one.close()
    two = await open_store()
    assert await two.try_claim_step(RUN, "a") is False
    assert await two.claim_step(RUN, "a") is None
    assert await two.get_claimed_step_keys(RUN) == frozenset()
    await two.release_step_claim(RUN, "a")
    assert await two.try_claim_step(RUN, "a") is True
    assert await two.try_claim_step(RUN, "a") is False


async def test_closing_ends_held_claims_in_at_least_once_mode_only(open_store: OpenStore) -> None:
    leased, kept, other = await open_store(), await open_store(lease_ttl=None), await open_store()
    assert await leased.try_claim_step(RUN, "leased")
    assert await kept.try_claim_step(RUN, "kept")
    await leased.close()
    await kept.close()
    assert await other.get_claimed_step_keys(RUN) == {"kept"}
    assert await other.try_claim_step(RUN, "leased") is True
    assert await other.try_claim_step(RUN, "kept") is False


async def test_the_token_grows_and_the_old_holder_is_refused(open_store: OpenStore) -> None:
    one, two = await open_store(owner="one"), await open_store(owner="two")
    first = await one.claim_step(RUN, "a", input_json="1")
    assert (first.owner, first.attempt) == ("one", 1)
    await two.release_step_claim(RUN, "a")
    second = await two.claim_step(RUN, "a")
    assert second.fencing_token > first.fencing_token
    assert second.attempt == 2
    assert await one.holds(first) is False
    assert await two.holds(second) is True
    for late in (
        partial(one.complete_step, first, "Succeeded", output_json='"late"'),
        partial(one.defer_step, first),
        partial(one.record_step_complete, RUN, "a", "Succeeded"),
        partial(one.record_step_start, RUN, "a", "T"),
    ):
        with pytest.raises(ClaimLostError) as lost:
            await late()
        assert lost.value.claim == first
    assert await one.release_claim(first) is False
    await two.complete_step(second, "Succeeded", output_json='"mine"')
    await two.start_run("f", "F", RUN, "manual")
    step = (await two.get_run(RUN)).steps[0]
    assert (step.output_json, step.owner, step.fencing_token) == ('"mine"', "two", second.fencing_token)
    assert [(each.attempt, each.status, each.owner) for each in step.attempts] == [
        (1, "Running", "one"),
        (2, "Succeeded", "two"),
    ]
    assert step.attempts[0].fencing_token == first.fencing_token


async def test_a_claim_can_be_finished_by_another_store_of_the_same_worker(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    claim = await one.claim_step(RUN, "a", step_type="T", input_json='{"in": 1}', job_id="j")
    await two.complete_step(claim, "Succeeded", output_json='{"out": 2}')
    await two.start_run("f", "F", RUN, "manual")
    step = (await two.get_run(RUN)).steps[0]
    assert (step.step_type, step.input_json, step.output_json, step.job_id) == ("T", '{"in": 1}', '{"out": 2}', "j")
    with pytest.raises(ClaimLostError):
        await one.complete_step(claim, "Failed")


async def test_the_same_result_told_twice_is_one_result(open_store: OpenStore) -> None:
    one = await open_store()
    claim = await one.claim_step(RUN, "a")
    await one.complete_step(claim, "Succeeded", output_json="1")
    await one.complete_step(claim, "Succeeded", output_json="1")
    with pytest.raises(ClaimLostError):
        await one.complete_step(claim, "Succeeded", output_json="2")
    with pytest.raises(ClaimLostError):
        await one.complete_step(claim, "Failed")
    info = await one.get_claim(RUN, "a")
    assert (info.state, info.status, info.fencing_token) == ("sealed", "Succeeded", claim.fencing_token)


async def test_deferring_gives_the_step_back_as_pending(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    first = await one.claim_step(RUN, "a", input_json="1")
    await one.defer_step(first, reason="approval")
    assert await one.get_step_statuses(RUN) == {"a": "Pending"}
    assert await two.get_claim(RUN, "a") is None
    second = await two.claim_step(RUN, "a")
    assert (second.attempt, second.fencing_token > first.fencing_token) == (2, True)


async def test_claim_steps_gives_what_was_won(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    await one.try_claim_step(RUN, "b")
    won = await two.claim_steps(RUN, ["a", "b", "c", "a"])
    assert sorted(won) == ["a", "c"]
    assert await two.holds(won["a"])
    assert await two.claim_steps(RUN, []) == {}


async def test_a_release_of_the_holders_own(store: AnyStore) -> None:
    claim = await store.claim_step(RUN, "a")
    assert await store.release_claim(claim) is True
    assert await store.release_claim(claim) is False
    again = await store.claim_step(RUN, "a")
    assert again.attempt == 2
    assert await store.get_step_statuses(RUN) == {"a": "Running"}


async def test_run_ids_name_the_same_run_in_every_spelling(store: AnyStore) -> None:
    run = uuid.uuid4()
    assert await store.try_claim_step(run, "a") is True
    for spelling in (str(run), str(run).upper(), run.hex, f"{{{run}}}", f"urn:uuid:{run}"):
        assert await store.try_claim_step(spelling, "a") is False
    assert (await store.get_claim(run, "a")).run_id == str(run)
    assert await store.try_claim_step("Some Run", "a") is True
    assert await store.try_claim_step("some run", "a") is True


async def test_no_key_can_leave_its_run_or_meet_another(store: AnyStore) -> None:
    odd = ["a/b", "a", "../x", "loop.1.c", "loop.10.c", "x%2Fy", "x/y", "ä", "日", " ", "\n", "a" * 1000, "steps/a/1"]
    for key in odd:
        assert await store.try_claim_step("r", key) is True
    assert await store.try_claim_step("r/claims", "a") is True
    assert await store.get_claimed_step_keys("r") == set(odd)
    assert await store.get_claimed_step_keys("r/claims") == {"a"}
    for key in odd:
        await store.record_step_start("r", key, "T")
        await store.record_step_start("r", key, "T")
    assert set(await store.get_step_statuses("r")) == set(odd)
    await store.start_run("f", "F", "r", "manual")
    assert {step.step_key: step.attempt_count for step in (await store.get_run("r")).steps} == dict.fromkeys(odd, 2)


async def test_a_skip_needs_no_claim_and_is_for_ever(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    await one.record_skipped_step(RUN, "a", "T", "because", '{"expression": "x"}')
    await two.record_skipped_step(RUN, "a", "T", "another reason")
    assert await two.try_claim_step(RUN, "a") is False
    await one.start_run("f", "F", RUN, "manual")
    step = (await one.get_run(RUN)).steps[0]
    assert (step.status, step.error, step.evaluation_trace_json) == ("Skipped", "because", '{"expression": "x"}')
    assert step.attempt_count == 1
    await two.record_skipped_step_with_trace(RUN, "b", "T", "r", "{ }")
    assert (await one.get_run(RUN)).steps[1].evaluation_trace_json == "{ }"


async def test_a_skip_is_refused_where_there_is_a_result_or_a_holder(open_store: OpenStore) -> None:
    one, two = await open_store(), await open_store()
    claim = await one.claim_step(RUN, "done")
    await one.complete_step(claim, "Succeeded")
    await one.try_claim_step(RUN, "held")
    for key in ("done", "held"):
        with pytest.raises(StepConflictError):
            await two.record_skipped_step(RUN, key, "T", "r")
    assert await two.get_step_statuses(RUN) == {"done": "Succeeded"}
    await one.record_skipped_step(RUN, "held", "T", "by its holder")
    assert await two.get_step_statuses(RUN) == {"done": "Succeeded", "held": "Skipped"}
    assert await two.try_claim_step(RUN, "held") is False


@pytest.mark.parametrize("taken", ["by nobody", "by another", "by another who has not started it"])
async def test_a_holder_whose_claim_went_is_refused_whoever_has_it(open_store: OpenStore, taken: str) -> None:
    one, two = await open_store(owner="one"), await open_store(owner="two")
    claims = [await one.claim_step(RUN, key) for key in ("complete", "defer", "record", "start")]
    for claim in claims:
        await two.release_step_claim(RUN, claim.step_key)
        if taken == "by another":
            await two.claim_step(RUN, claim.step_key)
        elif taken != "by nobody":
            await two.try_claim_step(RUN, claim.step_key)
    before = [await two.get_claim(RUN, claim.step_key) for claim in claims], await two.get_step_statuses(RUN)
    for late in (
        partial(one.complete_step, claims[0], "Succeeded"),
        partial(one.defer_step, claims[1]),
        partial(one.record_step_complete, RUN, "record", "Failed"),
        partial(one.record_step_start, RUN, "start", "T"),
    ):
        with pytest.raises(ClaimLostError):
            await late()
    after = [await two.get_claim(RUN, claim.step_key) for claim in claims], await two.get_step_statuses(RUN)
    assert after == before
