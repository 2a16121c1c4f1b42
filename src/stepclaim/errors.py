"""Every error that leaves the package, as one tree.

StepClaimError
├── ConfigurationError (ValueError)      an argument or a setting is wrong; nothing was sent
├── RecordTooLargeError (ValueError)     a field is over the limit; nothing was written
├── CorruptRecordError (ValueError)      a stored value can't be read
├── StoreClosedError                     used after close, before open, or in a forked child
├── SessionLostError                     no live session to claim with
├── StepConflictError                    what stands forbids the change; nothing was written
├── ClaimError
│   ├── ClaimLostError                   the claim is no longer the caller's; its write was refused
│   └── ClaimTimeoutError (TimeoutError) waited for a claim in vain
└── BackendError                         etcd, or the way to it
    ├── UnavailableError (ConnectionError)
    ├── DeadlineExceededError (TimeoutError)
    ├── AuthenticationError
    ├── PermissionDeniedError
    ├── ResourceExhaustedError
    └── OutcomeUnknownError              a write may or may not have happened

All of them can be pickled, so that they cross process pools unharmed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepclaim.models import StepClaim


class StepClaimError(Exception):
    """The root: catch this to catch everything that stepclaim raises."""


class ConfigurationError(StepClaimError, ValueError):
    """An argument or a setting is wrong. Nothing was sent to etcd."""


class RecordTooLargeError(StepClaimError, ValueError):
    """A field is over the store's limit. Nothing was written."""


class CorruptRecordError(StepClaimError, ValueError):
    """A stored value can't be read; `key` and `revision` say which, so that an operator can look at it."""

    def __init__(self, message: str, *, key: str = "", revision: int = 0) -> None:
        super().__init__(message)
        self.key = key
        self.revision = revision


class StoreClosedError(StepClaimError):
    """The store was closed, not opened yet, or carried through a fork."""


class SessionLostError(StepClaimError):
    """The store's session ended and no new one could be had before the deadline."""


class StepConflictError(StepClaimError):
    """What etcd holds forbids this change. Nothing was written."""


class ClaimError(StepClaimError):
    """Something is wrong with one claim; `claim` is that claim, where there is one."""

    def __init__(self, message: str, claim: StepClaim | None = None) -> None:
        super().__init__(message)
        self.claim = claim


class ClaimLostError(ClaimError):
    """The claim is no longer the caller's. Its write was refused, and the record of the new holder is untouched."""


class ClaimTimeoutError(ClaimError, TimeoutError):
    """The step could not be claimed before the deadline."""


class BackendError(StepClaimError):
    """etcd refused, or the way to it failed.

    `code` is the gRPC status' name, `definite` says whether the request has certainly had no effect.
    """

    def __init__(self, message: str, *, code: str = "UNKNOWN", definite: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.definite = definite


class UnavailableError(BackendError, ConnectionError):
    """No endpoint could serve the request."""


class DeadlineExceededError(BackendError, TimeoutError):
    """The call's deadline passed before an answer came."""


class AuthenticationError(BackendError):
    """etcd does not accept the user, the password or the certificate."""


class PermissionDeniedError(BackendError):
    """The user may not touch these keys."""


class ResourceExhaustedError(BackendError):
    """etcd is out of room or of patience: its space quota, its request limits."""


class OutcomeUnknownError(BackendError):
    """A write may or may not have happened, and the deadline left no time to find out.

    For a claim: whatever may still have been under way was fenced, or is being undone in the background.
    """
