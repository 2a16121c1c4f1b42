"""The figures as pictures, where matplotlib is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COLOURS = {
    "ours_async": "#d62728", "ours_threads": "#ff7f0e", "stub_async": "#555555", "stub_threads": "#999999",
    "etcd3_lock": "#8c564b", "aetcd_lock": "#1f77b4", "etcd3gw_lock": "#17becf", "kazoo_lock": "#9467bd",
    "redis_lock": "#e377c2", "redis_pipelined": "#f7b6d2", "postgres": "#2ca02c", "postgres_pipelined": "#98df8a",
}  # fmt: skip

_TICKS = [digit * 10**power for power in range(-2, 4) for digit in (1, 2, 5)]
"""Milliseconds that are written beside an axis."""


def can_draw() -> bool:
    """Tell whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(told: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what the cases allow, and give the files."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "stepclaim", "svg.fonttype": "none", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3}
    )
    pyplot = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for name, picture in (("throughput", _throughput), ("latency", _latency), ("size", _size)):
        figure = picture(pyplot, told["cases"], told.get("titles", {}))
        if figure is not None:
            path = folder / f"{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            drawn.append(path)
    return drawn


def _line(axes: Any, name: str, titles: Mapping[str, str], x: list[float], y: list[float], **how: Any) -> None:
    ours = name.startswith("ours")
    axes.plot(
        x, y, label=titles.get(name, name).replace("*", ""), color=COLOURS.get(name), linewidth=2.6 if ours else 1.4,
        zorder=3 if ours else 2, linestyle="--" if name.startswith("stub") else "-", **how,
    )  # fmt: skip


def _throughput(pyplot: Any, cases: Mapping[str, Any], titles: Mapping[str, str]) -> Any:
    """Show claims a second against callers."""
    counts = sorted(int(name.removeprefix("callers_")) for name in cases if name.startswith("callers_"))
    if len(counts) < 2:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, colour in COLOURS.items():
        points = [
            (count, cases[f"callers_{count}"]["participants"][name]["claims_s"])
            for count in counts
            if name in cases[f"callers_{count}"]["participants"]
        ]
        if points:
            x, y = [count for count, _ in points], [each["median"] for _, each in points]
            _line(axes, name, titles, list(x), y, marker="o", markersize=4)
            axes.fill_between(
                x, [each["min"] for _, each in points], [each["max"] for _, each in points],
                color=colour, alpha=0.12,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="callers in one process", ylabel="claims a second (band: all rounds)")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _latency(pyplot: Any, cases: Mapping[str, Any], titles: Mapping[str, str]) -> Any:
    """Show how the time of a claim is distributed."""
    counts = [count for count in (1, 64) if f"callers_{count}" in cases]
    if not counts:
        return None
    figure, all_axes = pyplot.subplots(1, len(counts), figsize=(5.5 * len(counts), 5), squeeze=False, sharey=True)
    for axes, count in zip(all_axes[0], counts, strict=True):
        participants = cases[f"callers_{count}"]["participants"]
        for name in COLOURS:
            if name in participants:
                _line(axes, name, titles, participants[name]["percentiles_ms"], list(range(101)))
        axes.set(xscale="log", xlabel="milliseconds a claim", title=f"{count} caller{'s' if count > 1 else ''}")
    for axes in all_axes[0]:
        axes.xaxis.set_major_formatter("{x:g}")
    all_axes[0][0].set_ylabel("per cent of the claims that took no longer")
    all_axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _size(pyplot: Any, cases: Mapping[str, Any], titles: Mapping[str, str]) -> Any:
    """Show the first claim against the store's keys, and the statuses against the run's steps."""
    if "first_claim" not in cases or "statuses" not in cases:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    by_keys = {int(name.removeprefix("keys_")): each for name, each in cases["first_claim"]["participants"].items()}
    places = list(range(len(by_keys)))
    for what, said in (("open_ms", "opening a store"), ("first_ms", "its first claim"), ("later_ms", "a later claim")):
        medians = [each[what]["median"] for each in by_keys.values()]
        errors = [
            [each[what]["median"] - each[what]["min"] for each in by_keys.values()],
            [each[what]["max"] - each[what]["median"] for each in by_keys.values()],
        ]
        left.errorbar(places, medians, yerr=errors, marker="o", capsize=3, label=said)
    left.set_xticks(places, [f"{size:,}" for size in by_keys])
    left.set(xlabel="keys in etcd", ylabel="milliseconds", ylim=(0, None))
    left.legend(frameon=False)
    statuses = cases["statuses"]["participants"]
    sizes = sorted(int(name.removeprefix("ours_")) for name in statuses if name.startswith("ours_"))
    for who, name, said in (
        ("ours", "ours_async", "get_step_statuses"),
        ("stub", "stub_async", "bare paged range read"),
    ):
        medians = [statuses[f"{who}_{size}"]["p50_ms"]["median"] for size in sizes]
        _line(right, name, {**titles, name: said}, list(sizes), medians, marker="o")
    right.set(xscale="log", yscale="log", xlabel="steps of the run", ylabel="milliseconds")
    right.set_xticks(sizes, [f"{size:,}" for size in sizes])
    right.xaxis.set_minor_formatter("")
    right.yaxis.set_major_formatter("{x:g}")
    right.set_yticks([each for each in _TICKS if right.get_ylim()[0] <= each <= right.get_ylim()[1]])
    right.yaxis.set_minor_formatter("")
    right.legend(frameon=False)
    return figure
