"""The verdicts on other projects' locks: each known record gets its own, and broken ones are not taken for good."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from faults.locks.actor import Answer
from faults.locks.peers import PEERS
from faults.locks.replies import Life, Reply
from faults.locks.rounds import Turn
from faults.locks.stopping import Late
from faults.locks.table import narrow, replies, unfit
from faults.locks.verdicts import Finding, Outcome, describe, describe_late, judge, judge_late, told_at_release
from faults.locks.wire import Http, Jute, Resp

if TYPE_CHECKING:
    from faults.locks.wire import Wire

YES, NO, HUNG = Answer(), Answer(False), Answer(hung=True, seconds=9)
FAILED = Answer(error="ConnectionError")
GOOD = Life(
    "x", "cut", Reply("acquire", "Txn", 1), connect=YES, acquire=YES, held=["a"], second=NO, queue=["a"],
    write=YES, value="mine", had=["a"], release=YES,
)  # fmt: skip
LATE = Late("x", "plain", YES, 3.0, 2.1, YES, ["b"], YES, NO, NO, "second", ["b"])


@pytest.mark.parametrize(
    ("life", "verdicts", "said"),
    [
        (GOOD, [Finding.CLEAN], "unharmed"),
        (replace(GOOD, leases_left=1), [Finding.LEASE_LEFT], "unharmed"),
        (
            Life("x", "cut", GOOD.reply, connect=YES, acquire=NO, held=["a"], second=NO, again=NO, held_for=2.04),
            [Finding.ORPHAN],
            "no, but held 2.0 s; again: no",
        ),
        (
            replace(GOOD, acquire=FAILED, held=[], second=YES, again=YES),
            [Finding.FAILED],
            "ConnectionError, nothing held; again: yes",
        ),
        (replace(GOOD, acquire=FAILED, again=YES, queue=["a", "a"]), [Finding.TWICE, Finding.ORPHAN], None),
        (replace(GOOD, second=YES), [Finding.TWO_HOLDERS], None),
        (replace(GOOD, held=[], queue=[]), [Finding.NO_LOCK], None),
        (replace(GOOD, value=None), [Finding.WRITE_LOST], None),
        (replace(GOOD, write=FAILED), [Finding.UNTOLD], "ConnectionError, but written"),
        (replace(GOOD, write=FAILED, value=None), [Finding.NOT_WRITTEN], None),
        (replace(GOOD, release=FAILED), [Finding.FALSE_ALARM], "ConnectionError, but released"),
        (replace(GOOD, had=[], release=NO), [Finding.EXPIRED], "no: expired"),
        (replace(GOOD, kept=["a"]), [Finding.LEFT_UNTOLD], None),
        (
            replace(GOOD, write=FAILED, release=FAILED, kept=["a"], kept_for=1.5),
            [Finding.LEFT, Finding.UNTOLD],
            "ConnectionError, but written; lock held 1.5 s, release: ConnectionError",
        ),
        (replace(GOOD, write=HUNG, release=None), [Finding.HUNG, Finding.UNTOLD], "hung > 9 s"),
        (Life("x", "silence", GOOD.reply, connect=HUNG), [Finding.HUNG, Finding.FAILED], "hung > 9 s"),
    ],
)
def test_a_life_is_judged(life: Life, verdicts: list[Finding], said: str | None) -> None:
    assert judge(life) == verdicts
    assert describe(life) == (verdicts[0] if said is None else said)


@pytest.mark.parametrize(
    ("late", "verdict", "said"),
    [
        (replace(LATE, value="first"), Outcome.OVERWROTE, "overwritten"),
        (replace(LATE, write=FAILED), Outcome.REFUSED, "refused: ConnectionError"),
        (replace(LATE, write=NO), Outcome.REFUSED, "refused: no"),
        (LATE, Outcome.SWALLOWED, "told written, and it was not"),
        (replace(LATE, second_after=None), Outcome.NOT_SO_FAR, None),
        (replace(LATE, second_write=FAILED), Outcome.NOT_SO_FAR, None),
        (replace(LATE, value=None), Outcome.NOT_SO_FAR, None),
        (replace(LATE, way="not stopped"), Outcome.LAPSED, "lapsed after 2.1 s"),
        (replace(LATE, way="not stopped", second_after=None), Outcome.KEPT, "kept"),
    ],
)
def test_a_late_write_is_judged(late: Late, verdict: Outcome, said: str | None) -> None:
    assert judge_late(late) is verdict
    assert describe_late(late) == (verdict if said is None else said)


def test_a_release_that_takes_anothers_lock_is_seen() -> None:
    assert told_at_release(LATE) == "no"
    assert told_at_release(replace(LATE, queue_after=[])) == "no, and took the other's"


def test_harm_to_our_own_store_and_a_fault_that_did_not_happen_fail() -> None:
    ours = next(peer for peer in PEERS if peer.name == "stepclaim")
    theirs = next(peer for peer in PEERS if peer.name == "redis")
    harmed = replace(GOOD, second=YES)
    assert unfit([Turn(ours, lives=[GOOD], stops=[replace(LATE, write=FAILED)])]) == []
    assert unfit([Turn(theirs, lives=[harmed], stops=[replace(LATE, value="first")])]) == []
    assert len(unfit([Turn(ours, lives=[harmed, replace(GOOD, met=False)], stops=[LATE])])) == 3
    assert len(unfit([Turn(theirs, lives=[replace(harmed, reply=None)])])) == 1
    assert len(unfit([Turn(theirs, stops=[replace(LATE, second_after=None)])])) == 1


def test_replies_that_did_the_same_share_a_row_of_a_narrow_table() -> None:
    other = replace(GOOD, reply=Reply("acquire", "LeaseGrant", 1))
    lives = [GOOD, replace(GOOD, how="silence"), other, replace(other, how="silence")]
    rows = replies([Turn(PEERS[0], lives=lives)])
    assert rows[1:] == [[PEERS[0].title, "acquire", "Txn, LeaseGrant", "unharmed", "unharmed"]]
    assert max(map(len, narrow([*rows, ["word " * 40] * 5]).splitlines())) <= 100


@pytest.mark.parametrize(
    ("wire", "message", "name"),
    [
        (Http(), b"POST /v3/kv/txn HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", "kv/txn"),
        (Resp(), b"*3\r\n$6\r\nCLIENT\r\n$7\r\nSETINFO\r\n$1\r\nx\r\n", "CLIENT SETINFO"),
        (Jute(), b"\0\0\0\x08\0\0\0\x01\0\0\0\x05", "setData"),
        (Jute(), b"\0\0\0\x08\xff\xff\xff\xfe\0\0\0\x0b", ""),
    ],
)
def test_a_message_is_told_from_the_next_and_from_half_of_it(wire: Wire, message: bytes, name: str) -> None:
    assert wire.name(message, 1) == name
    assert wire.size(message + message) == len(message)
    assert not any(wire.size(message[:part]) for part in range(len(message)))


@pytest.mark.parametrize("reply", [b"+OK\r\n", b"$-1\r\n", b"*0\r\n", b"%1\r\n+a\r\n*2\r\n:1\r\n$1\r\nx\r\n", b"_\r\n"])
def test_redis_replies_are_measured(reply: bytes) -> None:
    assert Resp().size(reply + b"+more\r\n") == len(reply)
