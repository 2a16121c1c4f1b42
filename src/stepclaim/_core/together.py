"""Programs run side by side by one caller: what they ask for at the same time goes out together.

While a pack of them is under way the next one is begun.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core.ops import Abandoned, Begin, Finish, Many, OpenSession, Txn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stepclaim._core.ops import Op, Program

R = TypeVar("R")

_PACK = 120
"""Programs that are begun together: as many transactions fit into a shared one."""

_UNDER_WAY = 3
"""Packs whose answers are not there yet."""


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

    After an error no more are begun. Should the caller go away, each that has not ended is told so and leaves nothing
    behind; `Abandoned` is among the errors then.
    """
    left = iter(programs)
    ended: list[_Strand] = []
    errors: list[Exception] = []
    under_way: deque[tuple[list[_Strand], Any]] = deque()
    while True:
        begun = [] if errors else [_Strand(each) for each in islice(left, _PACK)]
        if begun:
            under_way.append((begun, (yield from _sent(begun))))
        elif not under_way:
            break
        if not begun or len(under_way) == _UNDER_WAY:
            strands, sent = under_way.popleft()
            yield from _to_their_ends(strands, sent)
            ended += strands
            errors += [each.error for each in strands if each.error is not None]
            if any(isinstance(error, Abandoned) for error in errors):
                yield from _abandon(each for others, _ in under_way for each in others)
                break
    return [each.result for each in ended if each.error is None], errors


def _sent(strands: list[_Strand]) -> Program[Any]:
    """Give the programs what they need for a transaction, and send all of these; gives what to ask for the answers."""
    while opening := [each for each in strands if isinstance(each.op, OpenSession)]:
        assert opening[0].op is not None
        reply = yield from _asked(opening[0].op)
        for each in opening:
            each.go_on(reply)
    return (yield from _asked(Begin(Many(tuple(each.op for each in strands if isinstance(each.op, Txn))))))


def _to_their_ends(strands: list[_Strand], sent: Any) -> Program[None]:
    while True:
        asking = [each for each in strands if isinstance(each.op, Txn)]
        if asking:
            replies = sent if isinstance(sent, Exception) else (yield from _asked(Finish(sent)))
            for at, each in enumerate(asking):
                each.go_on(replies if isinstance(replies, Exception) else replies[at])
        for each in strands:
            while each.op is not None and not isinstance(each.op, Txn | OpenSession):
                each.go_on((yield from _asked(each.op)))
        if all(each.op is None for each in strands):
            return
        sent = yield from _sent(strands)


def _abandon(strands: Iterable[_Strand]) -> Program[None]:
    for each in strands:
        each.go_on(Abandoned())
        while each.op is not None:
            each.go_on((yield from _asked(each.op)))


def _asked(op: Op[Any]) -> Program[Any]:
    """Ask for an operation; an error comes back as its reply."""
    try:
        return (yield op)
    except Exception as error:  # noqa: BLE001 - each program decides
        return error
