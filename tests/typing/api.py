"""The public API as a typed program uses it. Checked by mypy, never run: a type that changes shows here."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import assert_type
from uuid import UUID, uuid4

from stepclaim import (
    AsyncEtcdRunStore,
    AsyncFlowRunRuntimeStore,
    AttemptRecord,
    BackendError,
    ClaimError,
    ClaimInfo,
    ClaimLostError,
    ClaimState,
    ClaimTimeoutError,
    ConfigurationError,
    CorruptRecordError,
    DeadlineExceededError,
    EtcdRunStore,
    FlowRunRuntimeStore,
    RecordTooLargeError,
    RunRecord,
    RunStatus,
    Session,
    SessionState,
    Settings,
    StepClaim,
    StepClaimError,
    StepRecord,
    StepStatus,
    UnavailableError,
)
from stepclaim.embedded import EmbeddedEtcd
from stepclaim.testing import AsyncInMemoryRunStore, InMemoryBackend, InMemoryRunStore


def open_for_threads(client: object) -> None:
    """Say where etcd is, in every way, and what may be said besides."""
    with EtcdRunStore.connect("127.0.0.1:2379", owner="worker-7", lease_ttl=30) as store:
        assert_type(store, EtcdRunStore)
    EtcdRunStore.connect().close()
    EtcdRunStore.connect(["a:2379", "b:2379"], lease_ttl=None, timeout=5.0, attempt_timeout=1.0).close()
    EtcdRunStore.connect(Settings(prefix="/mine"), value_limit=1024, session=False).close()
    EtcdRunStore.connect("a:2379", user="u", password="p", ca_file=Path("ca.pem"), tls_server_name="etcd").close()  # noqa: S106 - nobody's
    EtcdRunStore.connect("a:2379", cert_file="c.pem", key_file="k.pem", tls=True, prefix="/mine").close()
    EtcdRunStore.from_client(client, owner="worker-7").close()
    EtcdRunStore.connect("a:2379", lease_tll=30)  # type: ignore[call-arg]  # a slip is seen
    EtcdRunStore.connect(2379)  # type: ignore[arg-type]


async def open_for_asyncio(client: object) -> None:
    """Do the same; `connect` itself is not awaited where `async with` follows."""
    async with AsyncEtcdRunStore.connect("127.0.0.1:2379", owner="worker-7", lease_ttl=30) as store:
        assert_type(store, AsyncEtcdRunStore)
    opened = await AsyncEtcdRunStore.connect(Settings())
    assert_type(opened, AsyncEtcdRunStore)
    await opened.close()
    async with AsyncEtcdRunStore.from_client(client, session=False) as borrowed:
        assert_type(borrowed, AsyncEtcdRunStore)
    with AsyncEtcdRunStore.connect():  # type: ignore[attr-defined]  # the other face's `with`
        pass


def work_in_threads(store: EtcdRunStore | InMemoryRunStore, run_id: UUID | str) -> None:
    """Claim, finish, write as an engine does, read."""
    assert_type(store.try_claim_step(run_id, "a"), bool)
    claim = store.claim_step(run_id, "a", step_type="T", input_json="{}", job_id="j")
    assert_type(claim, StepClaim | None)
    if claim is None:  # lost: a result, and the type checker asks for it
        return
    assert_type(store.holds(claim), bool)
    assert_type(store.claim_steps(run_id, ["b", "c"]), Mapping[str, StepClaim])
    assert_type(store.get_claim(run_id, "a"), ClaimInfo | None)
    assert_type(store.get_claims(), Sequence[ClaimInfo])
    assert_type(store.get_claimed_step_keys(run_id), frozenset[str])
    store.complete_step(claim, StepStatus.SUCCEEDED, output_json="1", error=None)
    store.complete_step(claim, "Succeeded")
    store.defer_step(claim, reason="later")
    assert_type(store.release_claim(claim), bool)
    store.release_step_claim(run_id, "a")
    store.complete_step("a", "Succeeded")  # type: ignore[arg-type]  # a claim, not a key
    store.claim_step(run_id, "a", "T")  # type: ignore[call-arg]  # keywords only

    assert_type(store.start_run(uuid4(), "Flow", run_id, "manual", "{}", "j", source_run_id="r"), RunRecord)
    assert_type(store.complete_run(run_id, RunStatus.SUCCEEDED), bool)
    assert_type(store.record_step_start(run_id, "a", "T", "{}", "j"), int)
    store.record_step_complete(run_id, "a", StepStatus.FAILED, None, "why")
    store.record_skipped_step(run_id, "b", "T", "why", "{}")
    store.record_skipped_step_with_trace(run_id, "b", "T", "why", "{}")
    assert_type(store.try_record_dispatch(run_id, "a"), bool)
    store.annotate_dispatch(run_id, "a", "j")
    store.release_dispatch(run_id, "a")

    assert_type(store.get_step_statuses(run_id), Mapping[str, StepStatus])
    assert_type(store.get_run_status(run_id), str | None)
    assert_type(store.get_run(run_id), RunRecord | None)
    assert_type(store.get_active_runs(), Sequence[RunRecord])
    assert_type(store.get_runs(), Sequence[RunRecord])
    assert_type(store.get_dispatched_step_keys(run_id), frozenset[str])
    assert_type(store.session, Session)
    store.get_run(7)  # type: ignore[arg-type]


async def work_in_tasks(store: AsyncEtcdRunStore | AsyncInMemoryRunStore, run_id: UUID | str) -> None:
    """Do the same, awaited."""
    assert_type(await store.try_claim_step(run_id, "a"), bool)
    claim = await store.claim_step(run_id, "a", step_type="T", input_json="{}", job_id="j")
    assert_type(claim, StepClaim | None)
    if claim is None:
        return
    assert_type(await store.holds(claim), bool)
    assert_type(await store.claim_steps(run_id, ["b", "c"]), Mapping[str, StepClaim])
    assert_type(await store.get_claim(run_id, "a"), ClaimInfo | None)
    assert_type(await store.get_claims(run_id), Sequence[ClaimInfo])
    assert_type(await store.get_claimed_step_keys(run_id), frozenset[str])
    await store.complete_step(claim, StepStatus.SUCCEEDED, output_json="1", error=None)
    await store.complete_step(claim, "Succeeded")
    await store.defer_step(claim, reason="later")
    assert_type(await store.release_claim(claim), bool)
    await store.release_step_claim(run_id, "a")
    await store.complete_step("a", "Succeeded")  # type: ignore[arg-type]
    await store.claim_step(run_id, "a", "T")  # type: ignore[call-arg]
    assert_type(store.claim_step(run_id, "a").run_id, str)  # type: ignore[attr-defined, assert-type]  # not awaited

    assert_type(await store.start_run(uuid4(), "Flow", run_id, "manual", "{}", "j", source_run_id="r"), RunRecord)
    assert_type(await store.complete_run(run_id, RunStatus.SUCCEEDED), bool)
    assert_type(await store.record_step_start(run_id, "a", "T", "{}", "j"), int)
    await store.record_step_complete(run_id, "a", StepStatus.FAILED, None, "why")
    await store.record_skipped_step(run_id, "b", "T", "why", "{}")
    await store.record_skipped_step_with_trace(run_id, "b", "T", "why", "{}")
    assert_type(await store.try_record_dispatch(run_id, "a"), bool)
    await store.annotate_dispatch(run_id, "a", "j")
    await store.release_dispatch(run_id, "a")

    assert_type(await store.get_step_statuses(run_id), Mapping[str, StepStatus])
    assert_type(await store.get_run_status(run_id), str | None)
    assert_type(await store.get_run(run_id), RunRecord | None)
    assert_type(await store.get_active_runs(), Sequence[RunRecord])
    assert_type(await store.get_runs(), Sequence[RunRecord])
    assert_type(await store.get_dispatched_step_keys(run_id), frozenset[str])
    assert_type(store.session, Session)


def read_records(run: RunRecord, claim: StepClaim, info: ClaimInfo) -> None:
    """Read fields of the documented types; records are frozen."""
    assert_type(run.run_id, str)
    assert_type(run.status, RunStatus)
    assert_type(run.status.is_final, bool)
    assert_type(run.started_at, datetime)
    assert_type(run.completed_at, datetime | None)
    assert_type(run.steps, tuple[StepRecord, ...])
    assert_type(run.steps[0].attempts, tuple[AttemptRecord, ...])
    assert_type(run.steps[0].fencing_token, int | None)
    assert_type(claim.fencing_token, int)
    assert_type(info.state, ClaimState)
    assert_type(info.status, StepStatus | None)
    run.status = RunStatus.FAILED  # type: ignore[misc]
    claim.attempt = 2  # type: ignore[misc]


def watch_session(session: Session) -> None:
    """Ask and be told whether the claims are still there."""
    assert_type(session.owner, str)
    assert_type(session.state, SessionState)
    assert_type(session.lease_id, int)
    session.expires_in()
    session.on_lost(lambda lost: lost.owner.encode())


def handle(store: EtcdRunStore, claim: StepClaim) -> None:
    """Catch an error by its own name, its group's, or the built-in that it also is."""
    try:
        store.complete_step(claim, "Succeeded")
    except ClaimLostError as lost:
        assert_type(lost.claim, StepClaim | None)
    except BackendError as error:
        assert_type(error.code, str)
        assert_type(error.definite, bool)
    except CorruptRecordError as error:
        assert_type((error.key, error.revision), tuple[str, int])
    except StepClaimError:
        raise


VALUE_ERRORS: list[type[ValueError]] = [ConfigurationError, RecordTooLargeError, CorruptRecordError]
TIMEOUTS: list[type[TimeoutError]] = [DeadlineExceededError, ClaimTimeoutError]
CONNECTION_ERRORS: list[type[ConnectionError]] = [UnavailableError]
CLAIM_ERRORS: list[type[ClaimError]] = [ClaimLostError, ClaimTimeoutError]


def run_one(store: FlowRunRuntimeStore, step: str) -> bool:
    """Be an engine that knows the published interface only."""
    return store.try_claim_step(uuid4(), step)


async def run_one_async(store: AsyncFlowRunRuntimeStore, step: str) -> bool:
    """Be the same for asyncio."""
    return await store.try_claim_step(uuid4(), step)


class OwnStore(FlowRunRuntimeStore):
    """A user's store: the type checker knows what it must have, and that two methods are not among it."""

    def try_claim_step(self, run_id: UUID | str, step_key: str) -> bool:
        """Claim."""
        return bool(run_id and step_key)

    def get_claimed_step_keys(self, run_id: UUID | str) -> frozenset[str]:
        """Name."""
        return frozenset([str(run_id)])

    def get_step_statuses(self, run_id: UUID | str) -> dict[str, StepStatus]:
        """Give; a narrower type than the interface's."""
        return {str(run_id): StepStatus.PENDING}

    def record_skipped_step(
        self,
        run_id: UUID | str,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None = None,
    ) -> None:
        """Skip."""

    def get_run_status(self, run_id: UUID | str) -> str | None:
        """Give."""
        return str(run_id)


class LackingStore(FlowRunRuntimeStore):
    """A store that lacks all that it must have."""


def use_stores_as_what_they_are(backend: InMemoryBackend, etcd: EmbeddedEtcd) -> None:
    """Give any of them where the interface is asked for; the other face does not fit."""
    run_one(OwnStore(), "a")
    LackingStore()  # type: ignore[abstract]
    with InMemoryRunStore(backend, owner="one", lease_ttl=None) as memory, EtcdRunStore.connect(etcd.endpoint) as real:
        run_one(memory, "a")
        run_one(real, "a")
        memory.lose_session()
        asyncio.run(run_one_async(real, "a"))  # type: ignore[arg-type]
        threading.Thread(target=work_in_threads, args=(real, "r")).start()
    run_one(AsyncEtcdRunStore.connect(), "a")  # type: ignore[arg-type]
