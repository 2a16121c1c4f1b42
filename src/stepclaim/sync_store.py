"""The stores for threads: each method names its program, `_run` runs it."""

from __future__ import annotations

import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core import claims, runs, steps
from stepclaim._core.context import Context
from stepclaim._core.keys import Keyspace
from stepclaim._etcd.channel import NO_ACCESS, Access
from stepclaim._etcd.client import Client
from stepclaim._etcd.keeper import Keeper
from stepclaim._etcd.perform import run_program
from stepclaim.abc import FlowRunRuntimeStore, RunId
from stepclaim.errors import ConfigurationError, StoreClosedError
from stepclaim.identity import borrowed, fork_error, new_id, utc_now
from stepclaim.settings import Endpoints, Overrides, Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    from stepclaim._core.ops import Program
    from stepclaim.models import ClaimInfo, RunRecord, RunStatus, StepClaim, StepStatus
    from stepclaim.session import Session

R = TypeVar("R")


class RunStore(FlowRunRuntimeStore):
    """Everything a store can do, whatever it stands on."""

    _ctx: Context

    def _run(self, program: Program[R]) -> R:
        raise NotImplementedError

    # --- claims --------------------------------------------------------------------------------------------------

    def try_claim_step(self, run_id: RunId, step_key: str) -> bool:
        """Claim a step: True for exactly one caller, False for every other and for ever once the step is final.

        The store remembers the claim: its own `record_step_start` and `record_step_complete` are guarded by it.
        Raises `OutcomeUnknownError` if the deadline passed in doubt; no claim is left behind then.
        Costs one RPC and, when won, one write.
        """
        return self._run(claims.try_claim(self._ctx, run_id, step_key))

    def claim_step(
        self,
        run_id: RunId,
        step_key: str,
        *,
        step_type: str = "",
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> StepClaim | None:
        """Claim a step and start its next attempt, in one transaction; None if somebody else has it or it is final.

        Raises `OutcomeUnknownError` if the deadline passed in doubt; no claim is left behind then.
        Costs one RPC for a first attempt, two or three for a later one.
        """
        return self._run(claims.claim_step(self._ctx, run_id, step_key, step_type, input_json, job_id))

    def claim_steps(self, run_id: RunId, step_keys: Iterable[str]) -> Mapping[str, StepClaim]:
        """Claim and start several steps of a run, and give the claims that were won. Costs one RPC a step."""
        return self._run(claims.claim_steps(self._ctx, run_id, step_keys))

    def release_step_claim(self, run_id: RunId, step_key: str) -> None:
        """Remove the step's claim, whoever holds it and whether it is held or sealed. Doing it again does nothing.

        A claim made after this call has looked is never removed. Costs two RPCs and one write.
        """
        self._run(claims.release_step(self._ctx, run_id, step_key))

    def release_claim(self, claim: StepClaim) -> bool:
        """Give a claim back, only if it is still held by it; False if it was lost before.

        Raises `OutcomeUnknownError` if a reply was lost and the claim is gone: it is released, by whomever.
        Costs one RPC and one write.
        """
        return self._run(claims.release_claim(self._ctx, claim))

    def holds(self, claim: StepClaim) -> bool:
        """Ask etcd, linearizable, whether the claim is still held. Costs one read."""
        return self._run(claims.holds(self._ctx, claim))

    def get_claim(self, run_id: RunId, step_key: str) -> ClaimInfo | None:
        """Tell who holds a step, or what its claim was sealed with; None for an unclaimed one. Costs one read."""
        return self._run(claims.get_claim(self._ctx, run_id, step_key))

    def get_claims(self, run_id: RunId | None = None) -> Sequence[ClaimInfo]:
        """Tell all claims of a run, held and sealed, or of all runs at the cost of a look at every key."""
        return self._run(claims.list_claims(self._ctx, run_id))

    def get_claimed_step_keys(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are claimed and not yet completed. Costs one read a 2,000 claims."""
        return self._run(claims.claimed_step_keys(self._ctx, run_id))

    # --- finishing -----------------------------------------------------------------------------------------------

    def complete_step(
        self, claim: StepClaim, status: StepStatus | str, *, output_json: str | None = None, error: str | None = None
    ) -> None:
        """Finish a claimed step: final status, attempt and the sealing of the claim, in one guarded transaction.

        Raises `ClaimLostError` if the claim is no longer held; nothing is written then. Telling the same result
        again does nothing. Costs one RPC and one transaction; from another store than the claiming one, one read more.
        """
        self._run(steps.complete(self._ctx, claim, status, output_json, error))

    def defer_step(self, claim: StepClaim, *, reason: str | None = None) -> None:
        """Set a claimed step back to Pending and give the claim up, in one guarded transaction.

        Raises `ClaimLostError` if the claim is no longer held. Costs one RPC and one transaction.
        """
        self._run(steps.defer(self._ctx, claim, reason))

    # --- the engine's writers ------------------------------------------------------------------------------------

    def start_run(
        self,
        flow_id: RunId,
        flow_name: str,
        run_id: RunId,
        trigger_key: str,
        trigger_data_json: str | None = None,
        job_id: str | None = None,
        *,
        source_run_id: RunId | None = None,
    ) -> RunRecord:
        """Record a run as Running, or give the record that stands under its id, unchanged. Costs one RPC."""
        return self._run(
            runs.start_run(
                self._ctx, flow_id, flow_name, run_id, trigger_key, trigger_data_json, job_id, source_run_id
            )
        )

    def complete_run(self, run_id: RunId, status: RunStatus | str) -> bool:
        """Give a run its final status; the first wins. False: unknown, or final already. Costs two RPCs."""
        return self._run(runs.complete_run(self._ctx, run_id, status))

    def record_step_start(
        self, run_id: RunId, step_key: str, step_type: str, input_json: str | None = None, job_id: str | None = None
    ) -> int:
        """Begin the step's next attempt and give its number, from 1 and without gaps.

        Works without claim, dispatch or run. Where this store took the step's claim the write is guarded by it and
        raises `ClaimLostError` once it is lost. Costs one RPC for a first attempt, two or three for a later one.
        """
        return self._run(steps.record_start(self._ctx, run_id, step_key, step_type, input_json, job_id))

    def record_step_complete(
        self,
        run_id: RunId,
        step_key: str,
        status: StepStatus | str,
        output_json: str | None = None,
        error: str | None = None,
    ) -> None:
        """Record what came of the current attempt. A final status seals the claim; Pending leaves it as it is.

        Without a start nothing happens. Where this store took the step's claim the write is guarded by it and raises
        `ClaimLostError` once it is lost. A second, different result raises `StepConflictError`. Costs one RPC where
        this store took the claim and began the attempt, else two.
        """
        self._run(steps.record_complete(self._ctx, run_id, step_key, status, output_json, error))

    def record_skipped_step(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None = None,
    ) -> None:
        """Set the step to Skipped in one visible transition; it can't be claimed afterwards. Needs no claim.

        On a step that is Skipped already nothing happens. Raises `StepConflictError`, with nothing written, if the
        step is Succeeded or Failed or is claimed by somebody else. Costs one RPC for a step that is not recorded yet.
        """
        self._run(steps.skip(self._ctx, run_id, step_key, step_type, reason, evaluation_trace_json))

    def record_skipped_step_with_trace(
        self,
        run_id: RunId,
        step_key: str,
        step_type: str,
        reason: str | None,
        evaluation_trace_json: str | None,
    ) -> None:
        """Skip a step and keep the trace of the clause that decided it, byte for byte."""
        self._run(steps.skip(self._ctx, run_id, step_key, step_type, reason, evaluation_trace_json))

    def try_record_dispatch(self, run_id: RunId, step_key: str) -> bool:
        """Write the step into the dispatch ledger: True for exactly one caller until it is released. One RPC."""
        return self._run(runs.try_record_dispatch(self._ctx, run_id, step_key))

    def annotate_dispatch(self, run_id: RunId, step_key: str, job_id: str) -> None:
        """Note the job that a dispatch became; on a released dispatch nothing happens. Costs two RPCs."""
        self._run(runs.annotate_dispatch(self._ctx, run_id, step_key, job_id))

    def release_dispatch(self, run_id: RunId, step_key: str) -> None:
        """Take the step out of the dispatch ledger, so that it can be dispatched again. Costs two RPCs."""
        self._run(runs.release_dispatch(self._ctx, run_id, step_key))

    # --- reading -------------------------------------------------------------------------------------------------

    def get_step_statuses(self, run_id: RunId) -> Mapping[str, StepStatus]:
        """Give every recorded step's status as one linearizable snapshot; empty for an unknown run.

        Costs one read a 2,000 steps.
        """
        return self._run(steps.statuses(self._ctx, run_id))

    def get_run_status(self, run_id: RunId) -> str | None:
        """Give the run's status, "Running" to "TimedOut"; None for an unknown run. Costs one read."""
        return self._run(runs.run_status(self._ctx, run_id))

    def get_run(self, run_id: RunId) -> RunRecord | None:
        """Give a run with its steps and all their attempts, as of one revision; None for an unknown run."""
        return self._run(runs.get_run(self._ctx, run_id))

    def get_active_runs(self) -> Sequence[RunRecord]:
        """Give the runs that are Running, newest first, without steps. Costs reads of the active runs alone."""
        return self._run(runs.active_runs(self._ctx))

    def get_runs(self) -> Sequence[RunRecord]:
        """Give all runs, newest first, without steps. Costs a look at every key: for operators, not for workers."""
        return self._run(runs.list_runs(self._ctx))

    def get_dispatched_step_keys(self, run_id: RunId) -> frozenset[str]:
        """Name the run's steps that are in the dispatch ledger. Costs one read a 2,000 entries."""
        return self._run(runs.dispatched_step_keys(self._ctx, run_id))


class EtcdRunStore(RunStore):
    """A store on etcd, for any number of threads."""

    def __init__(self, settings: Settings, access: Access = NO_ACCESS, *, session: bool = True) -> None:
        """Open the store. Use `connect` or `from_client`."""
        self._pid = os.getpid()
        self._closed = True
        self._timeout = settings.timeout
        self._calls = 0
        self._idle = threading.Condition()
        keys = Keyspace(settings.prefix)
        owner = settings.owner_name
        self._ctx = Context(keys, owner, value_limit=settings.value_limit, now=utc_now, new_id=new_id)
        self._client = Client(settings, access)
        self._keeper: Keeper | None = None
        deadline = time.monotonic() + settings.timeout
        try:
            if session:
                self._keeper = Keeper(
                    settings, access, keys, owner,
                    deliver=lambda tell: tell(), lost_event=threading.Event, changed=lambda: None,
                )
                self._keeper.open(deadline)
            else:
                run_program(self._client, None, runs.ping(self._ctx), deadline, attempts=3)
        except BaseException:
            self._client.close()
            raise
        self._closed = False

    @classmethod
    def connect(
        cls, endpoints: Settings | Endpoints | None = None, *, session: bool = True, **overrides: Unpack[Overrides]
    ) -> Self:
        """Connect, open a session and begin to renew it; a cluster that can't be reached or refuses is told at once.

        `endpoints`: host:port, several of them, or `Settings`; by default what STEPCLAIM_* in the environment says.
        Keywords override settings: `owner`, `prefix`, `lease_ttl` (seconds; None is at-most-once), `timeout` (seconds
        that each call may take, retries included), `attempt_timeout`, `value_limit`, `user`, `password`, `ca_file`,
        `cert_file`, `key_file`, `tls`, `tls_server_name`. `session=False` opens a store that can look and release but
        not claim, and writes nothing for itself.
        Raises `ConfigurationError`, `UnavailableError`, `AuthenticationError` or `PermissionDeniedError`.
        """
        return cls(Settings.resolve(endpoints, overrides), session=session)

    @classmethod
    def from_client(cls, client: Any, *, session: bool = True, **overrides: Unpack[Overrides]) -> Self:
        """Connect to where an `etcd3` client of the user's is connected, with its TLS credentials and its token.

        The client itself is neither used nor closed. It doesn't keep the password: give `user` and `password` for a
        token that can be renewed.
        """
        endpoints, access = borrowed(client)
        return cls(Settings.resolve(endpoints, overrides), access, session=session)

    @property
    def session(self) -> Session:
        """The session in use: its owner, state and lease, and what to call when it is lost."""
        self._check()
        if self._keeper is None:
            raise ConfigurationError("this store was opened with session=False: it has no session and can't claim")
        return self._keeper.session

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise fork_error(self._pid)
        if self._closed:
            raise StoreClosedError("the store is closed: open another one")

    def _run(self, program: Program[R]) -> R:
        with self._idle:
            self._check()
            self._calls += 1
        try:
            return run_program(self._client, self._keeper, program, time.monotonic() + self._timeout)
        finally:
            with self._idle:
                self._calls -= 1
                if self._closed and not self._calls:
                    self._idle.notify_all()

    def close(self) -> None:
        """End the session: wait for calls under way, settle what is in doubt, revoke the lease, close the channels.

        In at-least-once mode that ends every claim still held. Doing it again does nothing; in a forked child it
        leaves the parent's session alone.
        """
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + self._timeout
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._calls, self._timeout)
        try:
            if self._keeper is not None:
                self._keeper.close(deadline)
        finally:
            self._client.close()

    def __enter__(self) -> Self:
        """Give the open store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def __del__(self) -> None:
        """Tell of a store that nobody closed."""
        if not getattr(self, "_closed", True) and os.getpid() == self._pid:
            warnings.warn(f"{self!r} was never closed: its session lives until its lease ends", ResourceWarning, 2)
