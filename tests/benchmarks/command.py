"""The command line: what is measured, and where the figures go.

`python -m tests.benchmarks` sets up every peer that it finds and measures all there is, in about 25 minutes; with
`--quick` only the ratios against the bare stub, in 4. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks import against_peers, against_stub, cost, document, flow, machine, plots, processes, sizes, tables
from benchmarks.against_stub import Bench
from benchmarks.etcd import SETTINGS, Etcd
from benchmarks.field import Field
from benchmarks.figures import Findings
from benchmarks.profiles import profiles
from benchmarks.rounds import Lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

QUICK = Lengths(rounds=5, slice_seconds=1.0, lone_calls=600)
FULL = Lengths(rounds=5, slice_seconds=1.0, lone_calls=1000)
TITLES = {
    "ours_async": "**stepclaim**, asyncio",
    "ours_threads": "**stepclaim**, threads",
    "ours_claim_step": "**stepclaim**, claim_step",
    "ours_claim_steps": "**stepclaim**, claim_steps of 10,000",
    "stub_async": "bare stub, asyncio",
    "stub_threads": "bare stub, threads",
    "stub_async_beside_claim_step": "bare stub, asyncio (beside claim_step)",
    **flow.UPSTREAM,
}
STATUSES = (10, 1000, 10_000)
INTERRUPTED = 130


def quick(bench: Bench) -> None:
    """Measure the ratios against the bare stub alone."""
    against_stub.alone(bench)
    against_stub.together(bench, 64)
    against_stub.together(bench, 256)
    against_stub.statuses(bench, STATUSES[-1:], calls=5)
    against_stub.identical(bench)


def _three_members(bench: Bench) -> None:
    from benchmarks import members  # noqa: PLC0415 - the tests' own cluster needs the tests' packages

    members.three(bench)


def _processes(bench: Bench, field: Field) -> None:
    processes.side_by_side(bench, field, 2)
    processes.side_by_side(bench, field, 4)


def _costs(bench: Bench) -> None:
    cost.of_a_step(bench)
    cost.of_memory(bench)


CASES: Mapping[str, Callable[[Bench, Field], None]] = {
    "alone": lambda bench, _: against_stub.alone(bench),
    "callers": against_peers.callers,
    "processes": _processes,
    "race": lambda bench, _: processes.race(bench),
    "f1": flow.f1,
    "statuses": lambda bench, _: against_stub.statuses(bench, STATUSES, calls=10),
    "sizes": lambda bench, _: sizes.first_claims(bench),
    "members": lambda bench, _: _three_members(bench),
    "identical": lambda bench, _: against_stub.identical(bench),
    "cost": lambda bench, _: _costs(bench),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and give the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick and options.document:
        parser.error("--document wants all the figures, --quick takes few")
    signal.signal(signal.SIGTERM, _interrupt)
    if options.figures is not None:
        told = json.loads(options.figures.read_text(encoding="utf-8"))
    else:
        told = _measured(options)
    path = options.json
    if path is None and options.figures is None and not options.quick:
        path = Path.home() / ".cache" / "stepclaim-tests" / "benchmarks" / f"{told['machine']['at'][:19]}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _say(f"the figures are in {path}")
    for case in told["cases"].values():
        print(f"\n{case['title']}\n", *tables.case(case, told["titles"]), sep="\n")
    print("", *tables.ratios(told["ratios_in_full"]), sep="\n")
    if not options.quick:
        _draw(told, document.KEPT.parent if options.document else path.with_suffix("") if path else None)
    if options.document:
        document.write(told)
        _say(f"written: {document.PAGE.name}")
    if "failed" in told:
        print(f"\nFAILED: {told['failed']}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the ratios against the bare stub")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures are written to")
    parser.add_argument("--document", action="store_true", help="write docs/benchmarks.md and its pictures from them")
    parser.add_argument(
        "--from", type=Path, metavar="FILE", dest="figures", help="measure nothing: take the figures of that JSON"
    )
    parser.add_argument("--only", metavar="CASES", type=lambda text: text.split(","), help=f"some of {','.join(CASES)}")
    parser.add_argument("--no-profile", action="store_true", help="don't look where the client's time goes")
    parser.add_argument("--rounds", type=int, help="rounds that count, after one of warm-up")
    parser.add_argument("--seconds", type=float, help="measured seconds of a slice")
    return parser


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    given = {"rounds": options.rounds, "slice_seconds": options.seconds}
    lengths = replace(
        QUICK if options.quick else FULL, **{name: value for name, value in given.items() if value is not None}
    )
    began = time.monotonic()

    def tell(what: str) -> None:
        _say(f"{time.monotonic() - began:6.1f} s  {what}")

    told: dict[str, Any] = {
        "quick": options.quick,
        "machine": machine.describe(machine.use_a_disk()),
        "lengths": asdict(lengths),
        "about": {"etcd": {"version": Etcd().version, "settings": SETTINGS}},
        "titles": dict(TITLES),
    }
    findings = Findings()
    bench = Bench(findings, lengths, tell)
    try:
        if options.quick:
            quick(bench)
        else:
            _full(bench, options.only or list(CASES), told, profile=not options.no_profile)
    except Exception as error:  # noqa: BLE001 - what was found before is told all the same
        traceback.print_exc()
        told["failed"] = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    told["machine"]["took_seconds"] = round(time.monotonic() - began)
    return {**told, **findings.told()}


def _full(bench: Bench, cases: Sequence[str], told: dict[str, Any], *, profile: bool) -> None:
    field = Field(bench.findings, bench.lengths, bench.tell)
    with field.set_up():
        told["about"] |= field.about
        told["titles"] |= field.titles
        for name in cases:
            CASES[name](bench, field)
    if profile:
        told["profiles"] = profiles(bench.tell)


def _draw(told: Mapping[str, Any], folder: Path | None) -> None:
    if folder is None:
        return
    if not plots.can_draw():
        _say("no pictures: matplotlib is not installed (pip install 'stepclaim[bench]')")
        return
    for path in plots.draw(told, folder):
        _say(f"drawn: {path.name}")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
