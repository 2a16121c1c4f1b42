"""How the demo looks: what happens while it runs, on the error output, and its report as a table or as JSON."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from stepclaim.cli import dev_server, shapes

if TYPE_CHECKING:
    from types import TracebackType

    from stepclaim.cli.demo import Plan, Report
    from stepclaim.cli.fleet import Fleet
    from stepclaim.embedded import EmbeddedEtcd


class View:
    """What is shown while the demo runs: a moving bar on a terminal, else a line now and then."""

    def __init__(self, plan: Plan) -> None:
        """Draw nothing yet."""
        self._console = shapes.console(stderr=True)
        self._total = plan.runs * len(plan.flow.expected())
        self._began = time.monotonic()
        self._told_tenths = 0
        self._bar = Progress(
            TextColumn("steps"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[bodies]} bodies ran, {task.fields[live]} workers"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("steps", total=self._total, bodies=0, live=plan.workers, visible=False)

    def __enter__(self) -> Self:
        """Begin to draw, where somebody looks."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self.end()

    def end(self) -> None:
        """Stop drawing; doing it again does nothing."""
        if self._console.is_terminal:
            self._bar.stop()

    def tell(self, sentence: str) -> None:
        """Show one event, with the seconds since the beginning."""
        elapsed = f"{time.monotonic() - self._began:5.1f} s  "
        self._console.print(Text.assemble((elapsed, "dim"), sentence), soft_wrap=not self._console.is_terminal)

    def progress(self, fleet: Fleet) -> None:
        """Show how far the fleet is."""
        done = len(fleet.broker.finished)
        self._bar.update(
            self._task, completed=done, bodies=fleet.broker.counts["bodies"], live=len(fleet.broker.live), visible=True
        )
        tenths = done * 4 // self._total
        if tenths > self._told_tenths and not self._console.is_terminal:
            self._told_tenths = tenths
            self.tell(f"{done} of {self._total} steps are over")


def etcdctl_line(server: EmbeddedEtcd | None, report: Report) -> str:
    """Give the line that shows the keys."""
    program = f"etcdctl --endpoints={','.join(report.endpoints)}" if server is None else dev_server.etcdctl(server)
    return f"{program} get --prefix {report.prefix}/"


def print_report(report: Report, line: str, *, as_json: bool, gone: bool) -> None:
    """Print what happened; `gone` says that the server ends with the demo."""
    if as_json:
        shapes.print_json({**report.to_json(), "etcdctl": line})
        return
    out = shapes.console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column(style="dim", overflow="fold")
    for name, value, remark in _rows(report):
        table.add_row(name, value, remark)
    out.print()
    out.print(table)
    out.print()
    for note in report.notes:
        out.print(Text(f"note: {note}", "yellow"))
    for problem in report.problems:
        out.print(Text(f"WRONG: {problem}", "red"), soft_wrap=True)
    if report.ok:
        each = f"{report.steps_committed} of {report.steps_expected} results"
        out.print(Text(f"{each} committed exactly once, by etcd's own revision history.", "green"))
    later = "; the etcd of this demo ends now, --keep lets it stay" if gone else ""
    out.print(Text(f"\nthe keys{later}:", "dim"))
    out.print(Text(line), soft_wrap=True)


def _rows(report: Report) -> list[tuple[str, str, str]]:
    told = report.delivered
    runs = ", ".join(f"{count} {status}" for status, count in report.run_statuses.items())
    final, held = told["duplicates_refused_final"], told["duplicates_refused_held"]
    methods = " + ".join(f"{count} {name}" for name, count in report.rpcs.items())
    counted = "by etcd's own count" if report.rpcs_counted_by == "etcd" else "counted in the workers"
    ttl = "no lease" if report.lease_ttl is None else f"lease TTL {report.lease_ttl:g} s"
    rows = [
        ("runs", str(sum(report.run_statuses.values())), runs),
        ("steps", str(report.steps_expected), f"{report.steps_committed} results in etcd's history"),
        ("bodies that ran", str(report.bodies), f"etcd has {report.attempts} attempts"),
        ("deliveries", str(told["deliveries"]), f"of {told['messages']} messages: each twice, some again"),
        ("duplicate deliveries refused", str(report.duplicates_refused), f"{held} held by another, {final} final"),
        _takeover_row(report, "kill", "takeovers after the kill"),
        _takeover_row(report, "stop", "takeovers after the stop"),
        ("stale results refused", str(report.stale_results_refused), _refusals(report)),
        ("RPCs a step", f"{report.rpcs_per_step:.1f}", f"{methods}, {counted}; duplicates, ledger, reads included"),
        ("elapsed", f"{report.elapsed_seconds:.1f} s", f"{report.workers} workers, {ttl}"),
    ]
    if any(each.after == "lease" for each in report.takeovers):
        rows.append(_takeover_row(report, "lease", "other takeovers"))
    if told["errors"]:
        rows.append(("deliveries that failed", str(told["errors"]), "etcd's troubles; delivered again"))
    return rows


def _refusals(report: Report) -> str:
    refused = [victim.worker for victim in report.victims if victim.refused]
    return f"ClaimLostError for {', '.join(refused)}" if refused else ""


def _takeover_row(report: Report, after: str, label: str) -> tuple[str, str, str]:
    taken = [each for each in report.takeovers if each.after == after]
    remarks = []
    for each in taken[:3]:
        seconds = "" if each.seconds is None else f", {each.seconds:.1f} s"
        tokens = f"token {each.from_token}→{each.to_token}"
        remarks.append(f"{each.step_key} {each.from_owner}→{each.to_owner}, {tokens}{seconds}")
    return label, str(len(taken)), "\n".join(remarks)
