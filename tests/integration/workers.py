"""Worker processes for tests that race, kill and stop them: each has a client of its own."""

import json
import sys
from typing import Any

from stepclaim import ClaimLostError, EtcdRunStore


def say(**facts: Any) -> None:
    """Tell the test, a line at a time."""
    print(json.dumps(facts), flush=True)


def hear() -> str:
    """Wait for the test's word."""
    return sys.stdin.readline().strip()


def race(store: EtcdRunStore, keys: list[str]) -> None:
    """Wait at the gate, then claim every key; tell those that were won."""
    say(ready=True)
    hear()
    say(won=[key for key in keys if store.try_claim_step("r", key)])
    hear()  # closing ends the claims: nobody may close before all have tried


def hold(store: EtcdRunStore, keys: list[str]) -> None:
    """Claim one step, and finish it when told to."""
    claim = store.claim_step("r", keys[0], step_type="T")
    say(token=claim.fencing_token if claim else None, attempt=claim.attempt if claim else None)
    if claim is None:
        return
    hear()
    try:
        store.complete_step(claim, "Succeeded", output_json=json.dumps(store.session.owner))
    except ClaimLostError as lost:
        say(lost=str(lost), state=store.session.state)
    else:
        say(done=True)


def main() -> None:
    """Run one worker: role, endpoint, prefix, owner, TTL, keys."""
    role, endpoint, prefix, owner, ttl, *keys = sys.argv[1:]
    with EtcdRunStore.connect(
        endpoint, prefix=prefix, owner=owner, lease_ttl=None if ttl == "none" else float(ttl)
    ) as store:
        {"race": race, "hold": hold}[role](store, keys)


if __name__ == "__main__":
    main()
