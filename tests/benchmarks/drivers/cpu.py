"""CPU time and memory of processes, as Linux tells them."""

from __future__ import annotations

import os
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pids: list[int]) -> float:
    """Add up the CPU time of the processes and of all that they started, ended ones included."""
    started: dict[int, list[int]] = {}
    spent: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        pid = int(folder.name)
        started.setdefault(int(fields[1]), []).append(pid)
        spent[pid] = sum(map(int, fields[11:15])) / _TICK
    todo = list(pids)
    total = 0.0
    while todo:
        pid = todo.pop()
        total += spent.get(pid, 0.0)
        todo += started.get(pid, [])
    return total


def resident_bytes() -> int:
    """Tell how much memory this process has in use."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * _PAGE
