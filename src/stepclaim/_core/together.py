"""Programs run side by side by one caller: what they ask for at the same time goes out together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core.ops import Abandoned, Many, OpenSession, Txn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.ops import Op, Program

R = TypeVar("R")


class _Strand:
    """One of the programs, what it asks for now, and how it ended."""

    __slots__ = ("error", "op", "program", "result")

    def __init__(self, program: Program[Any]) -> None:
        self.program = program
        self.op: Op[Any] | None = None
        self.result: Any = None
        self.error: Exception | None = None
        self.go_on(None)

    def go_on(self, reply: Any) -> None:
        """Give the program its reply, or throw the error that stands in its place, up to what it asks for next."""
        try:
            self.op = self.program.throw(reply) if isinstance(reply, Exception) else self.program.send(reply)
        except StopIteration as stop:
            self.op, self.result = None, stop.value
        except Exception as error:  # noqa: BLE001 - told to the caller, once the others have ended, too
            self.op, self.error = None, error


def together(programs: Iterable[Program[R]]) -> Program[tuple[list[R], list[Exception]]]:
    """Run programs to their ends, step by step with each other; gives the results and the errors.

    Should the caller go away, each is told so and leaves nothing behind; then `Abandoned` goes on.
    """
    strands = [_Strand(program) for program in programs]
    ended = strands
    strands = [each for each in strands if each.op is not None]
    while strands:
        txns = [each for each in strands if isinstance(each.op, Txn)]
        if len(txns) > 1:
            replies = yield from _asked(Many(tuple(each.op for each in txns if isinstance(each.op, Txn))), len(txns))
            for each, reply in zip(txns, replies, strict=True):
                each.go_on(reply)
        else:
            opening = [each for each in strands if isinstance(each.op, OpenSession)] or strands[:1]
            assert opening[0].op is not None
            (reply,) = yield from _asked(opening[0].op, 1)
            for each in opening:
                each.go_on(reply)
        strands = [each for each in strands if each.op is not None]
    errors = [each.error for each in ended if each.error is not None]
    if any(isinstance(error, Abandoned) for error in errors):
        raise Abandoned
    return [each.result for each in ended if each.error is None], errors


def _asked(op: Op[Any], times: int) -> Program[list[Any]]:
    """Ask for an operation; an error comes back as the reply of each."""
    try:
        reply = yield op
    except Exception as error:  # noqa: BLE001 - each program decides
        return [error] * times
    return reply if isinstance(op, Many) else [reply]
