"""How a driver is spoken to: one JSON object a line, a request with its answer, until the other end is gone."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer `{"do": name, ...arguments}` with `{"told": result}`, or with `{"error": traceback}`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a client prints must not be taken for an answer
    try:
        for line in sys.stdin:
            asked: dict[str, Any] = json.loads(line)
            try:
                answer = {"told": commands[asked.pop("do")](**asked)}
            except Exception:  # noqa: BLE001 - whatever it is, the one who asked is told, and fails
                answer = {"error": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except (KeyboardInterrupt, BrokenPipeError):
        pass
