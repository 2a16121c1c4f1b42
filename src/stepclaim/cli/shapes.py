"""Runs, steps and claims as JSON and as tables.

The JSON shapes are public: fields may be added, never renamed. Times are ISO 8601, lease ids hexadecimal as etcdctl has
them, and all else is named as in the package's records:

    runs       {"total": 2, "runs": [a RunRecord without its steps]}
    show       {"run": a RunRecord with its steps and their attempts, "claims": [a ClaimInfo]}
    claims     {"claims": [a ClaimInfo]}
    release    {"run_id": "...", "step_key": "...", "released": true, "claim": the ClaimInfo that stood, or null}
    demo       {"ok": true, "problems": [], ..., "etcdctl": "..."}: the fields of `stepclaim.cli.demo.Report`
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepclaim.models import ClaimState, RunStatus, StepStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

    from stepclaim.models import ClaimInfo, RunRecord, StepRecord

_WIDE = 400
_COLOURS = {"Succeeded": "green", "Failed": "red", "Running": "cyan", "Pending": "cyan", "Skipped": "yellow"}


def console(*, stderr: bool = False) -> Console:
    """Give the console; where nobody looks at it, lines are as long as they need to be."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDE)


def print_json(value: Any) -> None:
    """Print for machines: times in ISO 8601, lease ids in hexadecimal as etcdctl has them."""
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def plain(value: Any) -> Any:
    """Turn records into what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _field(field.name, getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _field(name: str, value: Any) -> Any:
    return f"{value:x}" if name == "lease_id" else plain(value)


def run_shape(run: RunRecord, *, steps: bool) -> dict[str, Any]:
    """Give a run as JSON has it, with or without its steps."""
    shape: dict[str, Any] = plain(run)
    if not steps:
        del shape["steps"]
    return shape


def print_runs(runs: Sequence[RunRecord]) -> None:
    """Print runs as a table."""
    table = _table("run", "flow", "status", "started (UTC)", ">took")
    for run in runs:
        lasted = took(run.started_at, run.completed_at)
        table.add_row(Text(run.run_id), Text(run.flow_name), status(run.status), when(run.started_at), lasted)
    console().print(table)


def print_run(run: RunRecord, claims: Iterable[ClaimInfo]) -> None:
    """Print a run and its steps."""
    held = {claim.step_key for claim in claims if claim.state is ClaimState.HELD}
    out = console()
    out.print(Text.assemble("run      ", (run.run_id, "bold")))
    out.print(Text(f"flow     {run.flow_name}"))
    out.print(Text.assemble("status   ", status(run.status)))
    lasted = f", took {took(run.started_at, run.completed_at)}" if run.completed_at else ""
    out.print(Text(f"started  {when(run.started_at)} UTC by {run.trigger_key}{lasted}\n"))
    table = _table("step", "status", ">attempts", "owner", ">token", ">took", "note")
    for step in run.steps:
        table.add_row(
            Text(step.step_key),
            status(step.status),
            str(step.attempt_count),
            Text(step.owner or ""),
            str(step.fencing_token or ""),
            took(step.started_at, step.completed_at),
            Text(_note(step, step.step_key in held)),
        )
    out.print(table if run.steps else "no steps are recorded yet")


def _note(step: StepRecord, held: bool) -> str:
    if step.status is StepStatus.RUNNING and not held:
        return "nobody holds it: its worker is gone"
    return (step.error or "").strip().rpartition("\n")[2]


def print_claims(claims: Sequence[ClaimInfo], *, of_one_run: bool) -> None:
    """Print claims as a table."""
    names = ["step", "state", "owner", ">token", ">attempt", "claimed (UTC)", "lease"]
    table = _table(*([] if of_one_run else ["run"]), *names)
    for claim in claims:
        state = Text("held", "cyan") if claim.status is None else status(claim.status)
        cells: list[RenderableType] = [
            Text(claim.run_id),
            Text(claim.step_key), state, Text(claim.owner), str(claim.fencing_token), str(claim.attempt),
            when(claim.claimed_at), f"{claim.lease_id:x}" if claim.lease_id else "none",
        ]  # fmt: skip
        table.add_row(*cells[of_one_run:])
    console().print(table)


def status(value: RunStatus | StepStatus) -> Text:
    """Give a status in its colour."""
    return Text(value, _COLOURS.get(value, "red"))


def when(moment: datetime | None) -> str:
    """Tell a time, short."""
    return "" if moment is None else f"{moment.astimezone(UTC):%m-%d %H:%M:%S}"


def took(began: datetime | None, ended: datetime | None) -> str:
    """Tell how long something took, or has taken so far."""
    if began is None:
        return ""
    seconds = ((ended or datetime.now(UTC)) - began).total_seconds()
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"  # noqa: PLR2004


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table
