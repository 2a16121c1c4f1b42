"""Recovery finds what a crash left, mends it once, and lets live what lives; on all four stores."""

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import pytest

from fix_stores import AnyStore, OpenStore, gated
from stepclaim import ConfigurationError, RunRecord, RunStatus, StepStatus
from stepclaim.models import Finding, NextSteps
from stepclaim.recovery import recover, recover_async

RUN = "r"
Recover = Callable[..., Awaitable[tuple[list[Finding], list[str]]]]


def chain(_: RunRecord, statuses: Mapping[str, StepStatus]) -> NextSteps:
    """Plan a, then b, then c."""
    ready, unreachable = set(), set()
    before = StepStatus.SUCCEEDED
    for key in ("a", "b", "c"):
        if key not in statuses:
            if before is StepStatus.SUCCEEDED:
                ready.add(key)
            elif before.is_final:
                unreachable.add(key)
            break
        before = statuses[key]
    over = not ready and not unreachable and len(statuses) == 3 and all(each.is_final for each in statuses.values())
    outcome = RunStatus.SUCCEEDED if all(each == "Succeeded" for each in statuses.values()) else RunStatus.FAILED
    return NextSteps(frozenset(ready), frozenset(unreachable), outcome if over else None)


async def recovered(store: AnyStore, **options: Any) -> tuple[list[Finding], list[str]]:
    """Recover under either face; give the findings and what was dispatched."""
    sent: list[str] = []
    options.setdefault("plan", chain)
    options.setdefault("grace", 0.0)
    if hasattr(store.raw, "__aenter__"):

        async def send(_: str, key: str) -> None:
            sent.append(key)

        return await recover_async(store.raw, dispatch=send, **options), sent
    work = partial(recover, store.raw, dispatch=lambda _, key: sent.append(key), **options)
    return await asyncio.to_thread(work), sent


def kinds(findings: list[Finding]) -> list[tuple[str, str | None, bool]]:
    return [(str(finding.kind), finding.step_key, finding.mended) for finding in findings]


async def done(store: AnyStore, key: str, status: str = "Succeeded") -> None:
    claim = await store.claim_step(RUN, key)
    await store.complete_step(claim, status)


@pytest.fixture
async def started(store: AnyStore) -> AnyStore:
    await store.start_run("f", "F", RUN, "manual")
    return store


async def test_v3_a_ready_step_not_in_the_ledger_is_dispatched(started: AnyStore) -> None:
    await done(started, "a")
    findings, sent = await recovered(started)
    assert (kinds(findings), sent) == ([("undispatched step", "b", False)], [])
    findings, sent = await recovered(started, mend=True)
    assert (kinds(findings), sent) == ([("undispatched step", "b", True)], ["b"])
    assert await started.get_dispatched_step_keys(RUN) == {"b"}


async def test_v4_a_ready_step_in_the_ledger_is_not(started: AnyStore) -> None:
    await started.try_record_dispatch(RUN, "a")
    assert await recovered(started, mend=True, grace=60.0) == ([], [])


async def test_a_dispatch_that_was_never_started(started: AnyStore) -> None:
    await started.try_record_dispatch(RUN, "a")
    findings, sent = await recovered(started, mend=True)
    assert (kinds(findings), sent) == ([("lost dispatch", "a", True)], ["a"])
    await started.claim_step(RUN, "a")
    assert await recovered(started, mend=True) == ([], [])


async def test_v6_of_many_recoveries_one_dispatches(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(4)]
    await stores[0].start_run("f", "F", RUN, "manual")
    await done(stores[0], "a")
    answers = await gated([partial(recovered, store, mend=True, grace=60.0) for store in stores])
    assert sorted(key for _, sent in answers for key in sent) == ["b"]


async def test_an_orphan_is_dispatched_anew_by_one(open_store: OpenStore) -> None:
    dead = await open_store()
    stores = [await open_store() for _ in range(4)]
    await stores[0].start_run("f", "F", RUN, "manual")
    await stores[0].try_record_dispatch(RUN, "a")
    await dead.claim_step(RUN, "a")
    assert await recovered(stores[0], mend=True) == ([], [])
    await dead.close()
    answers = await gated([partial(recovered, store, mend=True, grace=60.0) for store in stores])
    assert [key for _, sent in answers for key in sent] == ["a"]
    claim = await stores[0].claim_step(RUN, "a")
    assert claim.attempt == 2


async def test_what_lives_or_is_parked_is_never_touched(open_store: OpenStore) -> None:
    one, other = await open_store(), await open_store()
    await one.start_run("f", "F", RUN, "manual")
    parked = await one.claim_step(RUN, "a")
    await one.defer_step(parked, reason="approval")
    await one.start_run("f", "F", "other", "manual")
    await other.claim_step("other", "a")
    before = await one.get_run(RUN), await one.get_run("other"), await one.get_claims()
    assert await recovered(other, mend=True) == ([], [])
    assert await recovered(one, mend=True, plan=None) == ([], [])
    assert (await one.get_run(RUN), await one.get_run("other"), await one.get_claims()) == before


async def test_a_message_that_was_put_off_and_lost(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(3)]
    await stores[0].start_run("f", "F", RUN, "manual")
    now = dt.datetime.now(dt.UTC)
    claim = await stores[0].claim_step(RUN, "a")
    await stores[0].defer_step(claim, dispatch=now + dt.timedelta(hours=1))
    assert await recovered(stores[1], mend=True) == ([], [])
    claim = await stores[0].claim_step(RUN, "a")
    await stores[0].defer_step(claim, dispatch=now - dt.timedelta(seconds=90))
    answers = await gated([partial(recovered, store, mend=True, grace=60.0) for store in stores])
    assert [key for _, sent in answers for key in sent] == ["a"]
    claim = await stores[0].claim_step(RUN, "a")
    await stores[0].defer_step(claim, dispatch=True)  # no time was said: it waits for whoever sends it
    assert await recovered(stores[1], mend=True) == ([], [])
    claim = await stores[0].claim_step(RUN, "a")
    with pytest.raises(ConfigurationError, match="time zone"):
        await stores[0].defer_step(claim, dispatch=dt.datetime(2030, 1, 1))  # noqa: DTZ001 - the point


async def test_a_dispatch_whose_prerequisites_are_not_met_is_left(started: AnyStore) -> None:
    await started.try_record_dispatch(RUN, "c")
    findings, sent = await recovered(started, mend=True)
    assert (kinds(findings), sent) == ([("undispatched step", "a", True)], ["a"])


async def test_what_cannot_be_reached_is_skipped_and_the_run_completed(started: AnyStore) -> None:
    await done(started, "a", "Failed")
    for _ in range(3):
        await recovered(started, mend=True)
    assert await started.get_step_statuses(RUN) == {"a": "Failed", "b": "Skipped", "c": "Skipped"}
    assert await started.get_run_status(RUN) == "Failed"
    assert await recovered(started, mend=True) == ([], [])


async def test_a_run_that_was_never_completed(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(3)]
    await stores[0].start_run("f", "F", RUN, "manual")
    for key in ("a", "b", "c"):
        await done(stores[0], key)
    findings, _ = await recovered(stores[0], plan=None, mend=True)
    assert kinds(findings) == [("uncompleted run", None, False)]
    assert await stores[0].get_run_status(RUN) == "Running"
    answers = await gated([partial(recovered, store, mend=True) for store in stores])
    assert sum(finding.mended for findings, _ in answers for finding in findings) == 1
    assert await stores[0].get_run_status(RUN) == "Succeeded"
