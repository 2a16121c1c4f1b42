"""Bad input: an error of our own that says what to do, and nothing written, on all four stores."""

import pickle
from typing import Any

import pytest

from fix_stores import AnyStore, OpenStore
from stepclaim import ClaimLostError, ConfigurationError, RecordTooLargeError, StoreClosedError

BAD_RUNS: list[Any] = ["", None, 7, b"run", "r" * 1001, "ä" * 501, "\ud800"]


@pytest.mark.parametrize("bad", BAD_RUNS)
async def test_bad_run_ids(store: AnyStore, bad: Any) -> None:
    for call in (
        store.try_claim_step(bad, "a"),
        store.claim_step(bad, "a"),
        store.release_step_claim(bad, "a"),
        store.record_step_start(bad, "a", "T"),
        store.record_step_complete(bad, "a", "Succeeded"),
        store.record_skipped_step(bad, "a", "T", "r"),
        store.start_run("f", "F", bad, "manual"),
        store.start_run(bad, "F", "r", "manual"),
        store.get_step_statuses(bad),
        store.get_run(bad),
    ):
        with pytest.raises(ConfigurationError) as wrong:
            await call
        assert isinstance(wrong.value, ValueError)
        assert "run_id" in str(wrong.value) or "flow_id" in str(wrong.value)
    assert await store.get_runs() == []
    assert await store.get_claims() == []


@pytest.mark.parametrize("bad", BAD_RUNS)
async def test_bad_step_keys(store: AnyStore, bad: Any) -> None:
    for call in (
        store.try_claim_step("r", bad),
        store.claim_step("r", bad),
        store.claim_steps("r", ["good", bad]),
        store.record_step_start("r", bad, "T"),
        store.record_skipped_step("r", bad, "T", "r"),
        store.try_record_dispatch("r", bad),
    ):
        with pytest.raises(ConfigurationError, match="step_key"):
            await call
    assert await store.get_claims() == []
    assert await store.get_step_statuses("r") == {}


async def test_values_over_the_limit(open_store: OpenStore) -> None:
    store = await open_store(value_limit=1000)
    big = "x" * 1001
    claim = await store.claim_step("r", "held")
    for call in (
        store.claim_step("r", "a", input_json=big),
        store.claim_step("r", "a", step_type=big),
        store.complete_step(claim, "Succeeded", output_json=big),
        store.complete_step(claim, "Failed", error="ä" * 501),
        store.defer_step(claim, reason=big),
        store.record_step_start("r", "a", "T", big),
        store.record_skipped_step("r", "a", "T", big),
        store.record_skipped_step("r", "a", "T", "r", big),
        store.start_run("f", "F", "r", "manual", big),
    ):
        with pytest.raises(RecordTooLargeError, match="1000 are allowed"):
            await call
    assert await store.get_step_statuses("r") == {"held": "Running"}
    assert await store.get_run("r") is None
    fits = "x" * 1000
    await store.complete_step(claim, "Succeeded", output_json=fits)


async def test_wrong_statuses_types_and_claims(store: AnyStore) -> None:
    claim = await store.claim_step("r", "a")
    await store.start_run("f", "F", "r", "manual")
    for call in (
        store.complete_step(claim, "Done"),
        store.complete_step(claim, "Pending"),
        store.complete_step(claim, "Running"),
        store.complete_step(claim, None),
        store.complete_step("r", "Succeeded"),
        store.complete_step(claim, "Succeeded", output_json={"not": "text"}),
        store.complete_step(claim, "Succeeded", output_json="\ud800"),
        store.record_step_complete("r", "a", "Running"),
        store.record_step_complete("r", "a", "nonsense"),
        store.complete_run("r", "Running"),
        store.complete_run("r", "Bogus"),
        store.release_claim(None),
        store.holds({}),
        store.claim_steps("r", "abc"),
        store.record_step_start("r", "b", None),
    ):
        with pytest.raises(ConfigurationError):
            await call
    assert await store.get_step_statuses("r") == {"a": "Running"}
    assert await store.get_run_status("r") == "Running"


async def test_use_after_close(open_store: OpenStore) -> None:
    store = await open_store()
    claim = await store.claim_step("r", "a")
    await store.close()
    await store.close()
    for call in (store.try_claim_step("r", "b"), store.complete_step(claim, "Succeeded"), store.get_run("r")):
        with pytest.raises(StoreClosedError, match="open another"):
            await call


async def test_errors_can_be_pickled(store: AnyStore) -> None:
    claim = await store.claim_step("r", "a")
    await store.release_claim(claim)
    with pytest.raises(ClaimLostError) as lost:
        await store.complete_step(claim, "Succeeded")
    again = pickle.loads(pickle.dumps(lost.value))  # noqa: S301 - our own bytes
    assert type(again) is type(lost.value)
    assert (str(again), again.claim) == (str(lost.value), claim)
