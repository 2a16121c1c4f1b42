"""One round: a cluster, workers on it, faults by a seed, what was seen, and what the judge says of it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from faults.catalogue import FAULTS
from faults.checks import look_after, look_at
from faults.cluster import KNOWN, PREFIX, Cluster, Options
from faults.fleet import Fleet
from faults.history import Fault as Done
from faults.history import History
from faults.judge import judge
from faults.nemesis import Fault, Scene
from faults.readings import Readings
from faults.tape import Tape
from faults.variants import VARIANTS
from faults.workloads import WORKLOADS

if TYPE_CHECKING:
    from collections.abc import Sequence

RECOVERY = 10.0
"""Seconds after a fault's end within which every worker must get an answer to a write."""
SLACK = 1.5
"""Seconds that a call may take past its deadline on a machine this busy."""
WARM_UP = 1.5

_PAIRS = list(product(sorted(FAULTS), sorted(WORKLOADS)))
Random("pairs").shuffle(_PAIRS)  # noqa: S311
_ELSEWHERE, _AT_MOST_ONCE = 0.15, 0.1
"""The share of rounds that are not played on the wheel's etcd, and of those whose claims have no lease."""


@dataclass
class Plan:
    """What a round does; all of it follows from the seed but for what is named."""

    seed: int
    workload: str
    faults: tuple[str, ...]
    variant: str = "binary"
    bug: str = ""
    lease_ttl: float | None = 3.0
    timeout: float = 5.0

    @classmethod
    def from_seed(
        cls, seed: int, *, workload: str | None = None, faults: Sequence[str] = (), variant: str | None = None
    ) -> Plan:
        """Choose what is not named: the workload, one to three faults, where etcd runs, and how long claims live.

        Seeds in a row play every fault with every workload once, before any pair comes again; what joins is drawn.
        """
        if faults:  # then only what is named
            return cls(seed, workload or _PAIRS[seed % len(_PAIRS)][1], tuple(faults), variant or "binary")
        random = Random(f"plan {seed}")  # noqa: S311  # what is done, nothing secret
        fault, chosen = _PAIRS[seed % len(_PAIRS)]
        if variant is None:
            elsewhere = [name for name, kind in VARIANTS.items() if name != "binary" and kind.can(FAULTS[fault])]
            variant = random.choice(elsewhere) if random.random() < _ELSEWHERE else "binary"
        drawn: list[str] = []
        possible = [name for name, kind in sorted(FAULTS.items()) if VARIANTS[variant].can(kind)]
        more = random.sample(possible, max(random.choice((0, 0, 1, 1, 2)), fault not in possible))
        for name in dict.fromkeys((fault, *more)):
            if name in possible and not FAULTS[name].excludes.intersection(drawn):
                drawn.append(name)
        lease_ttl = None if random.random() < _AT_MOST_ONCE else cls.lease_ttl
        return cls(seed, workload or chosen, tuple(drawn), variant, lease_ttl=lease_ttl)

    @property
    def manner(self) -> list[str]:
        """How it differs from most."""
        return [self.variant] * (self.variant != "binary") + ["at most once"] * (self.lease_ttl is None)

    @property
    def command(self) -> str:
        """The command that does it again."""
        faults = " ".join(f"--fault {name}" for name in self.faults)
        return (
            f"python -m tests.faults.run --rounds 1 --seed {self.seed} --workload {self.workload} {faults} "
            f"--variant {self.variant}{' --at-most-once' * (self.lease_ttl is None)}"
        )


@dataclass
class Report:
    """What came of a round."""

    plan: Plan
    history: History
    anomalies: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    unknown: int = 0
    late: float = 0.0
    """The seconds that the slowest call took past its deadline; below zero, none did."""
    took: float = 0.0

    @property
    def line(self) -> str:
        """Tell it in one line."""
        slowest = f"{max(self.recoveries):.1f}" if self.recoveries else "-"
        return (
            f"seed {self.plan.seed}  {self.plan.workload:<9}  {', '.join((*self.plan.faults, *self.plan.manner)):<40}  "
            f"{len(self.history.events)} operations, {self.unknown} unknown, recovered in {slowest} s, "
            f"{len(self.anomalies)} anomalies  ({self.took:.0f} s)"
            + "".join(f"\n    {each}" for each in self.history.config["crashes"])
        )


def play(plan: Plan) -> Report:
    """Play one round. `Impossible` where this machine can't."""
    started = time.monotonic()
    random = Random(f"round {plan.seed}")  # noqa: S311
    kinds = [FAULTS[name] for name in plan.faults]
    variant = VARIANTS[plan.variant]
    needs: dict[str, Any] = {}
    for kind in kinds:
        needs |= kind.needs
    options = replace(Options(binary=variant.binary(), seed=plan.seed), **needs)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepclaim-round-")))
        cluster = stack.enter_context(variant.make(options))
        tape = stack.enter_context(Tape(cluster))
        readings = stack.enter_context(Readings(cluster))
        fleet = stack.enter_context(
            Fleet(
                cluster,
                folder,
                plan.workload,
                plan.seed,
                lease_ttl=plan.lease_ttl,
                timeout=plan.timeout,
                bug=plan.bug,
            )
        )
        report = _Round(plan, cluster, tape, fleet, random).play(kinds)
        report.history.readings = list(readings.taken)
    report.anomalies += [str(each) for each in judge(report.history)]
    report.took = time.monotonic() - started
    return report


class _Round:
    def __init__(self, plan: Plan, cluster: Cluster, tape: Tape, fleet: Fleet, random: Random) -> None:
        self._plan, self._cluster, self._tape, self._fleet, self._random = plan, cluster, tape, fleet, random
        self._done: list[Done] = []
        self._wrong: list[str] = []
        self._recoveries: list[float] = []

    def play(self, kinds: Sequence[type[Fault]]) -> Report:
        scene = Scene(self._cluster, self._fleet, self._tape, self._random)
        time.sleep(WARM_UP)
        waiting = [kind(scene) for kind in kinds]
        while waiting:
            count = min(len(waiting), self._random.choice((1, 1, 2)))
            together, waiting = waiting[:count], waiting[count:]
            self._break(together)
        plan = self._plan
        self._wrong += self._fleet.stop(plan.timeout + SLACK + 3.0)
        self._settle()
        facts = self._tape.finish()
        self._wrong += self._fleet.close(plan.timeout + SLACK + 3.0)
        self._wrong += look_after(self._tape, plan.lease_ttl)
        events = self._fleet.events()
        self._wrong += [each for each in self._cluster.crashes if KNOWN not in each]
        config = {
            "prefix": PREFIX,
            "lease_ttl": plan.lease_ttl,
            "timeout": plan.timeout,
            "slack": SLACK,
            "killed": [worker.name for worker in self._fleet.workers if not worker.alive],
            "variant": plan.variant,
            "command": plan.command,
            "recoveries": self._recoveries,
            "crashes": self._cluster.crashes,
        }
        history = History(plan.seed, plan.workload, events, facts, self._done, config)
        report = Report(plan, history, self._wrong, self._recoveries)
        report.anomalies += look_at(history)
        report.unknown = sum(event.outcome == "unknown" for event in events)
        late = [
            (event.returned - event.invoked) / 1e9 - event.timeout
            for event in events
            if event.returned is not None and event.timeout is not None
        ]
        report.late = max(late, default=0.0)
        return report

    def _break(self, together: list[Fault]) -> None:
        begun: list[tuple[Fault, Done]] = []
        try:
            for fault in together:
                at = time.monotonic_ns()
                done = Done(at, fault.name, fault.inject())
                self._done.append(done)
                begun.append((fault, done))
            time.sleep(max(self._random.uniform(*fault.hold) for fault in together))
        finally:
            for fault, done in sorted(begun, key=lambda each: each[0].heals_last):
                fault.heal()
                done.until = time.monotonic_ns()
                done.what += fault.aftermath
        self._cluster.revive()
        healed = time.monotonic_ns()
        self._recover(healed, begun)

    def _recover(self, healed: int, begun: list[tuple[Fault, Done]]) -> None:
        names = " and ".join(done.kind for _, done in begun)
        deadline = time.monotonic() + RECOVERY + self._plan.timeout
        while None in (first := self._fleet.first_success(healed)).values() and time.monotonic() < deadline:
            time.sleep(0.25)
        for worker, at in first.items():
            took = float("inf") if at is None else (at - healed) / 1e9
            self._recoveries.append(took)
            if took > RECOVERY:
                self._wrong.append(f"slow recovery: {worker} needed {took:.1f} s after {names}")
        time.sleep(1.0)

    def _settle(self) -> None:
        """Give what is settled in the background its time, and leases of the dead theirs."""
        self._cluster.whole()
        time.sleep((self._plan.lease_ttl or 0.0) + 1.5)
