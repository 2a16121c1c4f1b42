"""How a program is run: each operation is performed by the caller's means, and its reply or its error goes back in.

An interruption of the caller (a cancelled task, Ctrl-C) reaches the program as `Abandoned`, so that it can hand on what
it leaves behind, and then goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from stepclaim._core.ops import Abandoned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stepclaim._core.ops import Op, Program

R = TypeVar("R")


def drive(program: Program[R], perform: Callable[[Op[Any], float], Any], deadline: float) -> R:
    """Run a program for a thread."""
    gone: BaseException | None = None
    try:
        op = next(program)
        while True:
            try:
                reply = perform(op, deadline)
            except Exception as error:  # noqa: BLE001 - the program decides
                op = program.throw(error)
            except BaseException as error:  # noqa: BLE001 - raised again once the program has cleaned up
                gone = error
                op = program.throw(Abandoned())
            else:
                op = program.send(reply)
    except StopIteration as stop:
        result: R = stop.value
        return result
    except Abandoned:
        if gone is None:
            raise
        raise gone from None


async def drive_async(
    program: Program[R],
    perform: Callable[[Op[Any], float], Awaitable[Any]],
    deadline: float,
    calls: set[Program[Any]],
) -> R:
    """Run a program for a task; it is among the calls until it ends."""
    gone: BaseException | None = None
    calls.add(program)
    try:
        op = next(program)
        while True:
            try:
                reply = await perform(op, deadline)
            except Exception as error:  # noqa: BLE001 - the program decides
                op = program.throw(error)
            except BaseException as error:  # noqa: BLE001 - raised again once the program has cleaned up
                gone = error
                op = program.throw(Abandoned())
            else:
                op = program.send(reply)
    except StopIteration as stop:
        result: R = stop.value
        return result
    except Abandoned:
        if gone is None:
            raise
        raise gone from None
    finally:
        calls.discard(program)
