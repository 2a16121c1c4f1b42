"""stepclaim against whatever else decides who runs a step: every client in the same rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import against_stub
from benchmarks.peers import PEERS

if TYPE_CHECKING:
    import contextlib

    from benchmarks.against_stub import Bench
    from benchmarks.etcd import Etcd
    from benchmarks.field import Field
    from benchmarks.rounds import Group

CALLERS = (1, 8, 64, 256)


def callers(bench: Bench, field: Field) -> None:
    """One to 256 callers in one process."""
    for count in CALLERS:

        def groups(stack: contextlib.ExitStack, etcd: Etcd, count: int = count) -> list[Group]:
            return field.groups(stack, etcd, count)

        against_stub.together(bench, count, groups)
        _judge(bench, count)


def _judge(bench: Bench, count: int) -> None:
    table = bench.findings.tables[f"callers_{count}"]
    took_part = [peer for peer in PEERS if peer.name in table.samples and (peer.one if count == 1 else peer.many)]
    if count == 1:
        if took_part:
            fastest = min(took_part, key=lambda peer: table.median(peer.name, "p50_ms"))
            bench.findings.ratio(
                "alone_over_fastest_peer",
                f"median time of a lone try_claim_step (threads) / of the fastest durable peer's, {fastest.title}",
                table.ratios("p50_ms", "ours_threads", fastest.name),
                at_most=1.4,
            )
        return
    for peer in took_part:
        bench.findings.ratio(
            f"over_{peer.name}_{count}",
            f"claims a second, {count} asyncio callers / {peer.title}",
            table.ratios("claims_s", "ours_async", peer.name),
            at_least=_wanted(peer.backend, count),
        )


def _wanted(backend: str, count: int) -> float | None:
    if count == 64:
        return {"etcd": 3.0, "redis": 2.5, "postgres": 2.5}.get(backend)
    return 1.0 if count == 256 else None
