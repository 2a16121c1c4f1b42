"""A distributed step-claim store on etcd: who runs which step of which run, decided once for the whole cluster."""

from stepclaim.abc import AsyncFlowRunRuntimeStore, FlowRunRuntimeStore
from stepclaim.async_store import AsyncEtcdRunStore
from stepclaim.errors import (
    AuthenticationError,
    BackendError,
    ClaimError,
    ClaimLostError,
    ClaimTimeoutError,
    ConfigurationError,
    CorruptRecordError,
    DeadlineExceededError,
    OutcomeUnknownError,
    PermissionDeniedError,
    RecordTooLargeError,
    ResourceExhaustedError,
    SessionLostError,
    StepClaimError,
    StepConflictError,
    StoreClosedError,
    UnavailableError,
)
from stepclaim.models import (
    AttemptRecord,
    ClaimInfo,
    ClaimState,
    RunRecord,
    RunStatus,
    SessionState,
    StepClaim,
    StepRecord,
    StepStatus,
)
from stepclaim.session import Session
from stepclaim.settings import Settings
from stepclaim.sync_store import EtcdRunStore

__all__ = [
    "AsyncEtcdRunStore",
    "AsyncFlowRunRuntimeStore",
    "AttemptRecord",
    "AuthenticationError",
    "BackendError",
    "ClaimError",
    "ClaimInfo",
    "ClaimLostError",
    "ClaimState",
    "ClaimTimeoutError",
    "ConfigurationError",
    "CorruptRecordError",
    "DeadlineExceededError",
    "EtcdRunStore",
    "FlowRunRuntimeStore",
    "OutcomeUnknownError",
    "PermissionDeniedError",
    "RecordTooLargeError",
    "ResourceExhaustedError",
    "RunRecord",
    "RunStatus",
    "Session",
    "SessionLostError",
    "SessionState",
    "Settings",
    "StepClaim",
    "StepClaimError",
    "StepConflictError",
    "StepRecord",
    "StepStatus",
    "StoreClosedError",
    "UnavailableError",
]
