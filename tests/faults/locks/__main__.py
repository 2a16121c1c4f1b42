"""Shows what locks do when replies are lost and holders are stopped: `python -m tests.faults.locks [--only NAME]`.

Sets up each peer that it finds, with a server, a virtual environment and processes of its own; prints what they did.
Ends with 1 if a fault did not happen as it was ordered, or if our own store was harmed by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' own modules

from faults.locks import table
from faults.locks.peers import PEERS
from faults.locks.rounds import Turn, play
from faults.locks.verdicts import describe, describe_late, judge, judge_late

if TYPE_CHECKING:
    from collections.abc import Sequence


def record(turns: Sequence[Turn]) -> list[dict[str, object]]:
    """Write all that was seen, each life with what was made of it."""
    return [
        {
            "peer": turn.peer.title,
            "configured": turn.peer.configured,
            "as shipped": turn.peer.shipped,
            "pins": turn.peer.pins,
            "server": turn.server,
            "missing": turn.missing,
            "lives": [{**asdict(each), "verdicts": judge(each), "said": describe(each)} for each in turn.lives],
            "stops": [
                {**asdict(each), "verdict": judge_late(each), "said": describe_late(each)} for each in turn.stops
            ],
        }
        for turn in turns
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Play, tell, and give the exit code."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="python -m tests.faults.locks", description=__doc__)
    parser.add_argument("--only", choices=names, action="append", help="this peer; may be given more than once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record into a file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as the README has them")
    parser.add_argument("--jobs", type=int, default=2, help="so many peers at a time: most of it is waiting")
    arguments = parser.parse_args(words)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a proxy that ends beneath a connection is as it should be
    chosen = [peer for peer in PEERS if peer.name in (arguments.only or names)]
    began = time.monotonic()

    over = threading.Event()

    def tell(what: str) -> None:
        if over.is_set():
            raise InterruptedError
        print(f"{time.monotonic() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            turns = list(pool.map(lambda peer: play(peer, tell), chosen))
        except KeyboardInterrupt:
            over.set()  # all end, with what they started, as soon as they have something to tell
            pool.shutdown(cancel_futures=True)
            print("interrupted")
            return 130
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record(turns), indent=1), encoding="utf-8")
    draw = table.markdown if arguments.markdown else table.narrow
    for title, rows in (
        ("A reply is lost: the worst of each phase", table.lost(turns)),
        ("A holder is stopped past its TTL, and writes after another", table.stopped(turns)),
        ("Every reply", table.replies(turns)),
        ("How each was configured", table.configured(turns)),
    ):
        if len(rows) > 1:
            print(f"\n{title}\n\n{draw(rows)}")
    for turn in turns:
        if turn.missing:
            print(f"{turn.peer.title} can't run here: {turn.missing}")
    bad = table.unfit(turns)
    print(*bad, f"{time.monotonic() - began:.0f} s", sep="\n")
    return 1 if bad else 0


def _end(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # everything that was started is ended on the way out
    sys.exit(main())
