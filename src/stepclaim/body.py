"""A step while its body runs: what the body may ask and say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepclaim.models import StepClaim, StepStatus

if TYPE_CHECKING:
    from datetime import datetime


class ActiveStep:
    """What `store.step(...)` gives to the body: the claim, whether it was lost, and what is to become of the step.

    A body that just ends has succeeded; `output_json` is then recorded with it.
    """

    def __init__(self, claim: StepClaim, lost: Any) -> None:
        self.claim = claim
        """The claim itself, as a value."""
        self.lost = lost
        """Set once the claim is known to be lost: a threading.Event, or an asyncio.Event on the asyncio face."""
        self.output_json: str | None = None
        self.status: StepStatus = StepStatus.SUCCEEDED
        self.error: str | None = None
        self.dispatch_again: bool | datetime = False
        self.reason: str | None = None

    run_id = property(lambda self: self.claim.run_id, doc="The claim's run.")
    step_key = property(lambda self: self.claim.step_key, doc="The claim's step.")
    owner = property(lambda self: self.claim.owner, doc="Who holds it.")
    fencing_token = property(lambda self: self.claim.fencing_token, doc="Grows with each new claim of the step.")
    attempt = property(lambda self: self.claim.attempt, doc="The attempt's number, from 1.")
    lease_id = property(lambda self: self.claim.lease_id, doc="The lease that it ends with.")

    def fail(self, error: str, *, output_json: str | None = None) -> None:
        """Record Failed when the body ends, without an exception."""
        self.status, self.error, self.output_json = StepStatus.FAILED, error, output_json

    def defer(self, reason: str | None = None, *, dispatch: bool | datetime = False) -> None:
        """Set the step back to Pending and give the claim up when the body ends; with a fresh dispatch, if asked."""
        self.status, self.reason, self.dispatch_again = StepStatus.PENDING, reason, dispatch

    def __repr__(self) -> str:
        """Show the claim."""
        return f"<ActiveStep {self.claim} lost={self.lost.is_set()}>"
