"""What a seed plays: everything in its turn, and again as it was."""

from __future__ import annotations

from itertools import product

import pytest

from faults.catalogue import FAULTS
from faults.rounds import Plan
from faults.variants import VARIANTS
from faults.workloads import WORKLOADS

PAIRS = set(product(FAULTS, WORKLOADS))


@pytest.mark.parametrize("first", [1, 4001])
def test_seeds_in_a_row_play_every_fault_with_every_workload(first: int) -> None:
    plans = [Plan.from_seed(seed) for seed in range(first, first + len(PAIRS))]
    assert {(fault, plan.workload) for plan in plans for fault in plan.faults} == PAIRS
    assert {plan.variant for plan in plans} == set(VARIANTS)
    assert {plan.lease_ttl for plan in plans} == {None, 3.0}
    for plan in plans:
        assert 1 <= len(plan.faults) <= 3
        assert all(VARIANTS[plan.variant].can(FAULTS[fault]) for fault in plan.faults)
        assert not any(FAULTS[fault].excludes.intersection(plan.faults) for fault in plan.faults)


def test_a_seed_plays_the_same_again() -> None:
    assert Plan.from_seed(7) == Plan.from_seed(7) != Plan.from_seed(8)


def test_what_is_named_is_not_drawn() -> None:
    for seed in range(200):
        assert Plan.from_seed(seed, workload="watch", faults=("delay",)) == Plan(seed, "watch", ("delay",))
        plan = Plan.from_seed(seed, workload="release", variant="namespaces")
        assert (plan.workload, plan.variant) == ("release", "namespaces")
        assert plan.faults
