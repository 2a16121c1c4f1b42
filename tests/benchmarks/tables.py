"""Figures as tables in Markdown, which a terminal shows just as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

COLUMNS = {
    "claims_s": "claims/s",
    "steps_s": "steps/s",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "client_us": "client µs",
    "server_us": "server µs",
}
"""The figures that tables show, of those that were taken; all are in the JSON."""


def ratios(found: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None) -> list[str]:
    """Give one line a ratio: the median of the rounds, their spread, what was promised and whether it was kept."""
    rows = []
    for name, ratio in found.items():
        if names is not None and name not in names:
            continue
        promised = ""
        if "at_most" in ratio:
            promised = f"≤ {_number(ratio['at_most'])}"
        elif "at_least" in ratio:
            promised = f"≥ {_number(ratio['at_least'])}"
        kept = "" if "kept" not in ratio else "yes" if ratio["kept"] else "no"
        between = f"{_number(ratio['min'])} to {_number(ratio['max'])}"
        rows.append([f"`{name}`", _number(ratio["median"]), between, promised, kept, ratio["what"]])
    return table(["ratio", "median", "spread", "wanted", "kept", "of what"], rows, right=(1, 2))


def case(found: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """Give one line a participant: medians, with the spread of the first column."""
    participants = found["participants"]
    shown = [name for name in COLUMNS if any(name in figures for figures in participants.values())]
    extra = sorted({name for each in participants.values() for name in each if _is_extra(name, each)} - set(shown))
    rows = []
    for participant, figures in participants.items():
        first = next((name for name in (*shown, *extra) if name in figures), None)
        spread = "" if first is None else f"{_number(figures[first]['min'])} to {_number(figures[first]['max'])}"
        cells = [_number(figures[name]["median"]) if name in figures else "" for name in (*shown, *extra)]
        rows.append([titles.get(participant, participant), cells[0], spread, *cells[1:]])
    names = [COLUMNS.get(name, name.replace("_", " ")) for name in (*shown, *extra)]
    return table(["", names[0], "spread", *names[1:]], rows, right=range(1, len(names) + 2))


def _is_extra(name: str, figures: Mapping[str, Any]) -> bool:
    if "claims" in figures and name in ("claims", "mean_ms", "p90_ms", "max_ms"):
        return False  # slices have these; the JSON keeps them
    return isinstance(figures[name], dict)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Lay out a table; the columns named in `right` are numbers."""
    numbers = set(right)
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = ["-" * (width - 1) + ":" if column in numbers else "-" * width for column, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        laid = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        whole = "| " + " | ".join(laid)
        return (whole if len(head) - 1 in numbers else whole.rstrip()) + " |"  # a last text may be long

    return [line(head), line(rule), *map(line, rows)]


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
