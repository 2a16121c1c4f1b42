"""Medians, spreads and ratios of what was measured round by round."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Sample = dict[str, Any]
"""What one participant's slice gave: numbers by name, and percentiles."""


def spread(values: Iterable[float]) -> dict[str, float]:
    """Give median, least and most."""
    kept = list(values)
    return {"median": _short(statistics.median(kept)), "min": _short(min(kept)), "max": _short(max(kept))}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass
class Table:
    """A case's samples: for each participant one a round."""

    title: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def add(self, participant: str, sample: Sample) -> None:
        """Take a round's sample in."""
        self.samples.setdefault(participant, []).append(sample)

    def values(self, participant: str, name: str) -> list[float]:
        """Give a figure round by round."""
        return [float(sample[name]) for sample in self.samples[participant]]

    def median(self, participant: str, name: str) -> float:
        """Give a figure's median."""
        return statistics.median(self.values(participant, name))

    def ratios(self, name: str, ours: str, theirs: str) -> list[float]:
        """Divide one participant's figure by another's, round by round."""
        pairs = zip(self.values(ours, name), self.values(theirs, name), strict=True)
        return [mine / other for mine, other in pairs]

    def told(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        return {"title": self.title, "participants": {name: _told(each) for name, each in self.samples.items()}}


def _told(samples: Sequence[Sample]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, value in samples[0].items():
        if isinstance(value, list):
            columns = zip(*(sample[name] for sample in samples), strict=True)
            told[name] = [_short(statistics.median(column)) for column in columns]
        else:
            told[name] = spread(sample[name] for sample in samples)
    return told


@dataclass(frozen=True)
class Ratio:
    """One of the figures that were promised, or that are told beside them."""

    name: str
    what: str
    rounds: tuple[float, ...]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self) -> float:
        """The figure that is quoted."""
        return _short(statistics.median(self.rounds))

    @property
    def kept(self) -> bool | None:
        """Whether what was promised was measured; None where nothing was promised."""
        if self.at_most is not None:
            return self.median <= self.at_most
        if self.at_least is not None:
            return self.median >= self.at_least
        return None

    def told(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        limits = {"at_most": self.at_most, "at_least": self.at_least}
        return {
            "what": self.what,
            **spread(self.rounds),
            **{name: limit for name, limit in limits.items() if limit is not None},
            **({} if self.kept is None else {"kept": self.kept}),
        }


@dataclass
class Findings:
    """All that a run found out."""

    tables: dict[str, Table] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Participants that could not be set up, and why."""

    def ratio(
        self,
        name: str,
        what: str,
        rounds: Sequence[float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Note a ratio."""
        self.ratios.append(Ratio(name, what, tuple(rounds), at_most, at_least))

    def told(self) -> Mapping[str, Any]:
        """Give all of it for JSON; `ratios` is flat, for programs."""
        return {
            "ratios": {ratio.name: ratio.median for ratio in self.ratios},
            "ratios_in_full": {ratio.name: ratio.told() for ratio in self.ratios},
            "cases": {name: table.told() for name, table in self.tables.items()},
            "left_out": self.left_out,
        }
