"""A profile of this process, added up by file and function."""

from __future__ import annotations

import cProfile
import pstats
import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LINES = 18


def profiled(work: Callable[[], Any]) -> list[tuple[float, str]]:
    """Do something, and tell which functions took which share of the time, the largest first."""
    profile = cProfile.Profile(time.thread_time)  # CPU time: waiting costs nothing
    profile.enable()
    work()
    profile.disable()
    own: dict[str, float] = {}
    found: Any = pstats.Stats(profile)
    for (file, _, function), (_, _, spent, _, _) in found.stats.items():
        name = _named(file, function)
        own[name] = own.get(name, 0.0) + spent
    total = sum(own.values())
    largest = sorted(own.items(), key=lambda each: each[1], reverse=True)[:LINES]
    return [(spent / total, name) for name, spent in largest]


def _named(file: str, function: str) -> str:
    bare = re.sub(r" at 0x[0-9a-f]+", "", function)
    inside = re.search(r"(?:site-packages|src|python3\.\d+)/(.+)$", file)
    return f"`{inside[1]}` {bare}" if inside else bare.strip("<>")
