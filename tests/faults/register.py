"""The register of Jepsen's etcd tests: its log, and what a single caller would see of it.

A log line is `INFO jepsen.util - PROCESS KIND CALL VALUE`. A call that ends with `:fail` did not take place; one that
ends with `:info`, or never, may have taken place at any time since. A read that failed says nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .linearizability import Operation

if TYPE_CHECKING:
    import os

LINE = re.compile(r"INFO\s+jepsen\.util\s+-\s+(\d+)\s+:(invoke|ok|fail|info)\s+:(read|write|cas)\s+(.*?)\s*$")

Asked: TypeAlias = tuple[str, int | None, int | None]
"""The call, and its numbers: ("read", None, None), ("write", 3, None), ("cas", 1, 3)."""


class Register:
    """One value that is read, written, or exchanged if it is the one expected. It begins without any."""

    init: int | None = None

    def step(
        self, state: int | None, asked: Asked, answer: tuple[str, int | None] | None, /
    ) -> tuple[bool, int | None]:
        """Answers are ("ok", the value read) and ("fail", None)."""
        call, one, two = asked
        if call == "read":
            return answer is None or answer[1] == state, state
        if call == "write":
            return True, one
        matches = state == one
        allowed = answer is None or (answer[0] == "ok") == matches
        return allowed, two if matches else state


def read_log(path: str | os.PathLike[str]) -> list[Operation]:
    """Read a log; its lines' numbers serve as times."""
    operations: list[Operation] = []
    running: dict[str, tuple[Asked, int]] = {}

    def end(process: str, answer: tuple[str, int | None] | None, returned: int | None) -> None:
        asked, invoked = running.pop(process)
        name = f"line {invoked} ({process} {' '.join(str(part) for part in asked if part is not None)})"
        operations.append(Operation(asked, answer, invoked, returned, name))

    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        line = LINE.match(text)
        if line is None:
            if text.strip():
                raise ValueError(f"{path}, line {number}: not a line of a register's log: {text!r}")
            continue
        process, kind, call, value = line.groups()
        if kind == "invoke":
            if process in running:
                raise ValueError(f"{path}, line {number}: process {process} begins a call inside another")
            running[process] = (_asked(call, value), number)
            continue
        if process not in running or running[process][0][0] != call:
            raise ValueError(f"{path}, line {number}: process {process} ends a {call} that it never began")
        if (call == "read" and kind != "ok") or (call == "write" and kind == "fail"):
            del running[process]  # nothing was read, or nothing written
        elif kind == "info":
            end(process, None, None)
        else:
            end(process, (kind, _number(value) if call == "read" else None), number)
    for process in list(running):
        end(process, None, None)
    return operations


def _asked(call: str, value: str) -> Asked:
    if call == "read":
        return call, None, None
    if call == "write":
        return call, _number(value), None
    expected, new = value.strip("[]").split()
    return call, _number(expected), _number(new)


def _number(text: str) -> int | None:
    return None if text == "nil" else int(text)
