"""Cost against size: the first claim in stores that hold nothing, or a hundred thousand keys, or a million."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from benchmarks.driver import Driver, DriverError
from benchmarks.etcd import Etcd
from benchmarks.rounds import fresh

if TYPE_CHECKING:
    from benchmarks.against_stub import Bench

SIZES = (0, 100_000, 1_000_000)
OPENED = 12
"""Stores that are opened on each server in a round."""
LATER = 15
"""Claims that each of them makes after its first."""


def first_claims(bench: Bench) -> None:
    """Open stores on three servers in turns and time their first claims."""
    table = bench.table("first_claim", "The first claim of a new store, by the number of keys that stand in etcd")
    with contextlib.ExitStack() as stack:
        servers = {str(size): stack.enter_context(Etcd()) for size in SIZES}
        driver = stack.enter_context(Driver("side_by_side"))
        for size in SIZES[1:]:
            bench.tell(f"filling a store with {size:,} keys")
            driver.ask("fill", endpoint=servers[str(size)].endpoint, keys=size, patience=400)
            if driver.ask("count_keys", endpoint=servers[str(size)].endpoint) < size:
                raise DriverError(f"the store does not hold {size} keys")
        endpoints = {name: server.endpoint for name, server in servers.items()}
        for number in range(bench.lengths.rounds):
            told = driver.ask("first_claims", endpoints=endpoints, run=fresh(), rounds=OPENED, later=LATER)
            for name, figures in told.items():
                table.add(f"keys_{name}", figures)
            bench.tell(f"{table.title}: round {number + 1} of {bench.lengths.rounds}")
    for size in SIZES[1:]:
        for what, said in (
            ("first", "the first claim of a new store"),
            ("later", "a claim after it"),
            ("open", "opening a store"),
        ):
            bench.findings.ratio(
                f"{what}_claim_{size}" if what != "open" else f"open_{size}",
                f"median time of {said} with {size:,} keys in etcd / with none",
                table.ratios(f"{what}_ms", f"keys_{size}", "keys_0"),
                at_most=1.2 if (what, size) == ("first", 1_000_000) else None,
            )
