"""Where our own client's time goes: a slice under cProfile, added up by who owns the code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.against_stub import MANY, started
from benchmarks.etcd import Etcd
from benchmarks.rounds import fresh

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = {
    "alone": ("A lone try_claim_step, asyncio", ("tasks", "try_claim"), 1),
    "async_64": ("try_claim_step, 64 asyncio callers", ("tasks", "try_claim"), 64),
    "claim_step_64": ("claim_step, 64 asyncio callers", ("tasks", "claim"), 64),
    "claim_steps": (f"claim_steps of {MANY:,} steps", ("tasks", "claim"), 0),
}


def profiles(tell: Callable[[str], None]) -> dict[str, Any]:
    """Profile each of the cases."""
    found: dict[str, Any] = {}
    with Etcd() as etcd:
        for name, (title, way, callers) in CASES.items():
            with started("ours", *way, address=etcd.address, callers=max(1, callers)) as driver:
                rows = driver.ask("profile", run=fresh(), callers=callers, count=MANY, seconds=1.5)
            found[name] = {"title": title, "rows": [[f"{share:.1%}", where] for share, where in rows]}
            tell(f"profile: {title}")
    return found
