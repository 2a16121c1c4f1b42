"""The tables for people: narrow ones for a terminal, and the same in Markdown."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from faults.locks.peers import TTL
from faults.locks.replies import HANG, Life
from faults.locks.stopping import MARGIN
from faults.locks.verdicts import Finding, Outcome, describe, describe_late, judge, judge_late, told_at_release

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faults.locks.rounds import Turn

Rows = list[list[str]]
_PHASES = ("acquire", "write", "release")


def lost(turns: Sequence[Turn]) -> Rows:
    """Sum up what a lost reply does, the worst for each phase."""
    rows = [["", *(f"lost on {phase}" for phase in _PHASES), "silence, as shipped", "leases left"]]
    for turn in turns:
        if not turn.lives:
            continue
        cells = [turn.peer.title]
        for phase in _PHASES:
            lives = [life for life in _dropped(turn) if _phase(turn, life) == phase and not _shipped(life)]
            cells.append(_worst(lives))
        silent = [life for life in turn.lives if life.how == "silence" and _phase(turn, life) in _PHASES]
        shipped = [life for life in turn.lives if _shipped(life)] or silent
        hung = sum(Finding.HUNG in judge(life) for life in shipped)
        slowest = max((life.taken for life in shipped), default=0.0)
        cells.append(f"{hung} of {len(shipped)} hung > {HANG:g} s" if hung else f"answers in {slowest:.1f} s")
        least = next(life.leases_left for life in turn.lives if life.reply is None)
        most = max(life.leases_left for life in turn.lives)
        cells.append(f"{least} to {most}" if most > least else f"{least}")
        rows.append(cells)
    return rows


def _worst(lives: list[Life]) -> str:
    if not lives:
        return "-"
    order = list(Finding)
    return describe(min(lives, key=lambda life: order.index(judge(life)[0])))


def _phase(turn: Turn, life: Life) -> str:
    assert life.reply is not None
    return "release" if turn.peer.write_releases and life.reply.phase == "write" else life.reply.phase


def _dropped(turn: Turn) -> list[Life]:
    return [life for life in turn.lives if life.reply is not None]


def _shipped(life: Life) -> bool:
    return life.how == "silence, as shipped"


def replies(turns: Sequence[Turn]) -> Rows:
    """List every reply, those of a phase together where they did the same."""
    rows = [["", "phase", "lost reply", "connection cut", "silence"]]
    for turn in turns:
        groups: dict[tuple[str, str, str], list[str]] = {}
        cut = [life for life in turn.lives if life.how == "cut"]
        silent = [life for life in turn.lives if life.how == "silence"]
        for one, two in zip(cut, silent, strict=True):
            assert one.reply is not None
            groups.setdefault((one.reply.phase, describe(one), describe(two)), []).append(one.reply.method)
        for (phase, one_cell, two_cell), methods in groups.items():
            names = ", ".join(dict.fromkeys(methods))
            rows.append([turn.peer.title, phase, names, one_cell, two_cell])
    return rows


def stopped(turns: Sequence[Turn]) -> Rows:
    """Sum up what a late holder does."""
    looked = ("plain write", "look, then write", "checked in one step")
    rows = [["", f"works {TTL + MARGIN:g} s", *looked, "release says"]]
    for turn in turns:
        if turn.stops:
            cells = [_often(turn, way) for way in ("not stopped", "plain", "look first", "guarded")]
            releases = [told_at_release(late) for late in turn.stops if late.way == "plain"]
            rows.append([turn.peer.title, *cells, ", ".join(releases)])
    return rows


def _often(turn: Turn, way: str) -> str:
    seen = Counter(describe_late(late) for late in turn.stops if late.way == way)
    if len(seen) < 2:
        return "".join(seen)
    return "; ".join(f"{count} of {seen.total()} {said}" for said, count in seen.items())


def configured(turns: Sequence[Turn]) -> Rows:
    """Say in which version each was played, and how it was configured."""
    rows = [["", "client", "server", "configured", "as shipped"]]
    for turn in turns:
        peer = turn.peer
        rows.append([peer.title, peer.pins[0] if peer.pins else "ours", turn.server, peer.configured, peer.shipped])
    return rows


def unfit(turns: Sequence[Turn]) -> list[str]:
    """Say what must not be: harm without a fault, a fault that did not happen, and our own store harmed by one."""
    bad = []
    for turn in turns:
        if turn.missing and turn.peer.name.startswith("stepclaim"):
            bad.append(f"{turn.peer.title}: {turn.missing}")
        for life in turn.lives:
            where = f"{turn.peer.title}, {life.how or 'nothing dropped'}, {life.reply}"
            if not life.met:
                bad.append(f"{where}: the fault did not happen")
            harm = set(judge(life)) - {Finding.CLEAN, Finding.LEASE_LEFT}
            if harm and (life.reply is None or turn.peer.name.startswith("stepclaim")):
                bad.append(f"{where}: {', '.join(sorted(harm))}")
        for late in turn.stops:
            ours = turn.peer.name.startswith("stepclaim") and not turn.peer.late_only
            if judge_late(late) is Outcome.NOT_SO_FAR:
                bad.append(f"{turn.peer.title}, {late.way}: the second holder did not get in and write")
            elif ours and judge_late(late) not in {Outcome.REFUSED, Outcome.KEPT}:
                bad.append(f"{turn.peer.title}, {late.way}: {judge_late(late)}")
    return bad


def markdown(rows: Rows) -> str:
    """Write a table in Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])


def narrow(rows: Rows, width: int = 100) -> str:
    """Write a table in columns, cells broken over lines and errors' names without their end."""
    rows = [[re.sub(r"(\w{8})Error\b", r"\1", cell) for cell in row] for row in rows]
    columns = list(zip(*rows, strict=True))
    natural = [max(map(len, column)) for column in columns]
    share = [max(len(word) for cell in column for word in [*cell.split(), "-"]) for column in columns]
    while sum(share) + 2 * (len(share) - 1) < width and share != natural:  # what is over goes to who can use it
        at = max(range(len(share)), key=lambda column: natural[column] - share[column])
        share[at] += 1
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, size) or [""] for cell, size in zip(row, share, strict=True)]
        for at in range(max(map(len, cells))):
            parts = [(cell[at] if at < len(cell) else "").ljust(size) for cell, size in zip(cells, share, strict=True)]
            lines.append("  ".join(parts).rstrip())
        if row is rows[0]:
            lines.append("  ".join("-" * size for size in share))
    return "\n".join(lines)
