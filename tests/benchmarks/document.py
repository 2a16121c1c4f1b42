"""`docs/benchmarks.md`: what stands between two marks is written from a run's JSON, all else is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
KEPT = PAGE.with_suffix("") / "run.json"
BEGIN = "<!-- written by `python -m tests.benchmarks --document`; change nothing by hand from here -->"
END = "<!-- to here -->"

PROMISES = (
    ("A lone claim", ("alone_sync", "alone_async", "alone_over_fastest_peer")),
    ("64 and 256 callers in one process", ("async_64", "async_64_latency", "threads_64", "async_256")),
    ("Claim, status and attempt in one", ("claim_step_64", "claim_steps_10000")),
    ("Against the peers", ("over_",)),
    ("Whole steps", ("f1_", "whole_step_rpcs_64")),
    ("A race of eight processes", ("race",)),
    ("Size", ("first_claim_", "later_claim_", "open_", "statuses_")),
    ("Identical claims", ("identical_64",)),
)
"""What was promised, by the beginnings of the ratios' names."""

PICTURES = {
    "throughput": "Claims a second against callers",
    "latency": "How the time of a claim is distributed",
    "size": "Cost against size",
}


def write(told: Mapping[str, Any]) -> None:
    """Write the page's figures, and keep the JSON beside its pictures."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + figures(told) + after, encoding="utf-8")


def figures(told: Mapping[str, Any]) -> str:
    """Give all that stands between the marks, and the marks."""
    return "\n".join((BEGIN, "", *_lines(told), END))


def _lines(told: Mapping[str, Any]) -> Iterator[str]:
    yield from _machine(told)
    yield "## What was wanted, and what was measured"
    yield ""
    yield "Each ratio is the median of the rounds' ratios, with the least and the most of them."
    yield ""
    left = dict(told["ratios_in_full"])
    for title, beginnings in PROMISES:
        found = {name: left.pop(name) for name in list(left) if name.startswith(beginnings)}
        if found:
            yield from (f"### {title}", "", *tables.ratios(found), "")
    if left:
        yield from ("### Also measured", "", *tables.ratios(left), "")
    pictures = [name for name in PICTURES if (KEPT.parent / f"{name}.svg").exists()]
    if pictures:
        yield from ("## Pictures", "")
        for name in pictures:
            yield from (f"![{PICTURES[name]}](benchmarks/{name}.svg)", "")
    yield "## Every case"
    yield ""
    yield "Medians of the rounds; the spread is the first figure's. `client µs` and `server µs` are CPU time a claim."
    yield ""
    for case in told["cases"].values():
        yield from (f"### {case['title']}", "", *tables.case(case, told.get("titles", {})), "")
    yield from _profiles(told)


def _machine(told: Mapping[str, Any]) -> Iterator[str]:
    machine = told["machine"]
    lengths = told["lengths"]
    yield "## The run"
    yield ""
    yield (
        f"{machine['at'][:10]}, {machine['cores']} cores ({machine['processor']}), {machine['memory_gib']} GiB, "
        f"data on {machine['file_system']}, Linux {machine['kernel']}, Python {machine['python']}; clients and servers "
        f"share the machine, whose load was {machine['load_at_start']} when it began. "
        f"{lengths['rounds']} rounds after one of warm-up, slices of {lengths['slice_seconds']} s after "
        f"{lengths['warm_up_seconds']} s, {lengths['lone_calls']} lone calls a round; "
        f"it took {machine['took_seconds'] / 60:.0f} minutes."
    )
    yield ""
    rows = [[f"`{name}`", about["version"], about["settings"]] for name, about in told.get("about", {}).items()]
    rows += [[f"`{name}`", found, ""] for name, found in machine["packages"].items()]
    yield from (*tables.table(["part", "version", "settings"], rows), "")
    if told["left_out"]:
        yield from ("Left out:", "")
        yield from (*(f"- `{name}`: {why}" for name, why in told["left_out"].items()), "")


def _profiles(told: Mapping[str, Any]) -> Iterator[str]:
    if not told.get("profiles"):
        return
    yield "## Where the client's time goes"
    yield ""
    yield "By cProfile, whose own cost weighs on small functions: read shares, not times."
    yield ""
    for profile in told["profiles"].values():
        yield from (f"### {profile['title']}", "")
        yield from (*tables.table(["share of CPU", "where"], profile["rows"], right=(0,)), "")
