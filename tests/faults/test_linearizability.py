"""The checker: against 62 histories of a real register, small ones made by hand, and one without any cleverness."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.claim_register import ClaimRegister
from faults.judge import main
from faults.linearizability import Operation, Verdict, check, check_each
from faults.register import Register, read_log

if TYPE_CHECKING:
    from collections.abc import Sequence

BESIDE = Path(__file__).parents[3] / "shared" / "linearizability-logs"
"""A folder of logs beside the checkout."""


@pytest.fixture
def logs() -> Path:
    named = os.environ.get("STEPCLAIM_LINEARIZABILITY_LOGS")
    folder = Path(named) if named else BESIDE
    if not (folder / "verdicts.tsv").is_file():
        pytest.skip("no logs: name a folder of them in STEPCLAIM_LINEARIZABILITY_LOGS")
    return folder


def read(value: int | None, begin: float, end: float) -> Operation:
    return Operation(("read", None, None), ("ok", value), begin, end)


def write(value: int, begin: float, end: float | None) -> Operation:
    return Operation(("write", value, None), None if end is None else ("ok", None), begin, end)


def cas(old: int, new: int, answer: str, begin: float, end: float | None) -> Operation:
    return Operation(("cas", old, new), None if end is None else (answer, None), begin, end)


TRUE: dict[str, list[Operation]] = {
    "nothing": [],
    "one after another": [read(None, 0, 1), write(1, 2, 3), read(1, 4, 5), cas(1, 2, "ok", 6, 7), read(2, 8, 9)],
    "a read beside a write sees either": [write(1, 0, 9), read(None, 1, 2), read(1, 3, 4)],
    "an open write is seen late": [write(1, 0, None), read(None, 1, 2), read(1, 3, 4)],
    "an open write is never seen": [write(1, 0, None), read(None, 1, 2), read(None, 3, 4)],
    "an open write is seen between two reads": [write(1, 0, 1), write(2, 2, None), read(1, 3, 4), read(2, 5, 6)],
    "equal open writes count each": [
        *(write(1, 0, None), write(1, 0, None), write(2, 1, 2)),
        *(read(1, 3, 4), write(2, 5, 6), read(1, 7, 8)),
    ],
    "a failed cas saw another value": [write(1, 0, 1), cas(2, 3, "fail", 2, 3), read(1, 4, 5)],
    "an open cas": [write(1, 0, 1), cas(1, 2, "", 2, None), read(1, 3, 4), read(2, 5, 6)],
}
FALSE: dict[str, list[Operation]] = {
    "a value from nowhere": [read(1, 0, 1)],
    "a stale read": [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)],
    "back in time": [write(1, 0, 9), read(1, 1, 2), read(None, 3, 4)],
    "an open write is seen once only": [write(1, 0, None), read(1, 1, 2), write(2, 3, 4), read(1, 5, 6)],
    "a cas that can't have matched": [write(1, 0, 1), cas(2, 3, "ok", 2, 3)],
    "a cas that must have matched": [write(1, 0, 1), cas(1, 3, "fail", 2, 3)],
    "both of two equal exchanges": [write(1, 0, 1), cas(1, 2, "ok", 2, 5), cas(1, 2, "ok", 3, 4)],
    "an open write before it began": [read(1, 0, 1), write(1, 2, None)],
}


@pytest.mark.parametrize("name", TRUE)
def test_histories_that_could_be(name: str) -> None:
    assert check(Register(), TRUE[name]).verdict is Verdict.TRUE
    assert by_force(Register(), TRUE[name])


@pytest.mark.parametrize("name", FALSE)
def test_histories_that_could_not(name: str) -> None:
    result = check(Register(), FALSE[name])
    assert result.verdict is Verdict.FALSE
    assert result.stuck in FALSE[name]
    assert not by_force(Register(), FALSE[name])


def test_each_key_is_judged_by_itself() -> None:
    both = [replace(each, name="a") for each in TRUE["one after another"]]
    both += [replace(each, name="b") for each in FALSE["a stale read"]]
    verdicts = check_each(Register(), both, lambda each: each.name)
    assert {key: result.verdict for key, result in verdicts.items()} == {"a": Verdict.TRUE, "b": Verdict.FALSE}


def test_time_that_is_up_is_a_verdict_of_its_own() -> None:
    many = [write(n, 0, 10_000) for n in range(3000)]
    assert check(Register(), many, timeout=-1).verdict is Verdict.UNDECIDED


def test_a_long_history_is_judged() -> None:
    chance = random.Random(4)  # noqa: S311 - a history, nothing secret
    history, value = [], None
    for n in range(20_000):
        begin = n * 10.0
        if chance.random() < 0.5:
            value = chance.randrange(5)
            history.append(write(value, begin, begin + chance.randrange(1, 10)))
        else:
            history.append(read(value, begin, begin + chance.randrange(1, 10)))
    assert check(Register(), history, timeout=30).verdict is Verdict.TRUE
    history.append(read(9, 300_000, 300_001))
    assert check(Register(), history, timeout=30).verdict is Verdict.FALSE


# --- against the logs ------------------------------------------------------------------------------------------------


def test_all_verdicts_agree(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (logs / "verdicts.tsv").read_text().splitlines()[1:]
    assert len(lines) == 62
    assert main(["register", *(str(logs / line.split("\t")[0]) for line in lines)]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_one_flipped_answer_in_a_log_is_wrong(logs: Path) -> None:
    chance = random.Random(62)  # noqa: S311 - a sample, nothing secret
    flips = 0
    for path in sorted(logs.glob("*.log")):
        history = read_log(path)
        if check(Register(), history).verdict is not Verdict.TRUE:
            continue
        reads = [n for n, each in enumerate(history) if each.asked[0] == "read"]
        for number in chance.sample(reads, min(5, len(reads))):
            flipped = list(history)
            flipped[number] = replace(history[number], answer=("ok", 9))  # which nobody ever wrote
            result = check(Register(), flipped)
            assert (result.verdict, result.stuck) == (Verdict.FALSE, flipped[number]), f"{path.name}: {result}"
            flips += 1
    assert flips > 50


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for text in (
        "what is this",
        "INFO  jepsen.util - 1\t:ok\t:read\t3",
        "INFO  jepsen.util - 1\t:invoke\t:read\tnil\n" * 2,
    ):
        log.write_text(text)
        with pytest.raises(ValueError, match=r"a\.log, line"):
            read_log(log)


# --- against a checker that tries everything -------------------------------------------------------------------------


def by_force(model: Any, operations: Sequence[Operation]) -> bool:
    """Try every order: no memo, no cuts."""

    def explains(state: Any, left: tuple[Operation, ...]) -> bool:
        if all(each.returned is None for each in left):
            return True
        for number, first in enumerate(left):
            rest = left[:number] + left[number + 1 :]
            if any(each.returned is not None and each.returned < first.invoked for each in rest):
                continue
            allowed, following = model.step(state, first.asked, first.answer)
            if allowed and explains(following, rest):
                return True
        return False

    return explains(model.init, tuple(operations))


values = st.integers(0, 2)
questions = st.one_of(
    st.tuples(st.just("read"), st.none(), st.none()),
    st.tuples(st.just("write"), values, st.none()),
    st.tuples(st.just("cas"), values, values),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Draw calls of three processes with answers that may or may not fit."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        now = 0
        for asked in draw(st.lists(questions, max_size=3)):
            begin = now + draw(st.integers(1, 4))
            now = begin + draw(st.integers(1, 6))
            if asked[0] != "read" and draw(st.integers(0, 3)) == 0:
                found.append(Operation(asked, None, begin))
                break  # a process that wasn't told begins nothing more
            answer = ("ok", draw(st.none() | values)) if asked[0] == "read" else ("ok", None)
            if asked[0] == "cas" and draw(st.booleans()):
                answer = ("fail", None)
            found.append(Operation(asked, answer, begin, now))
    return found


@settings(max_examples=400, deadline=None)
@given(histories())
def test_it_agrees_with_brute_force(history: list[Operation]) -> None:
    assert check(Register(), history).verdict == ("true" if by_force(Register(), history) else "false")


def flipped(operation: Operation) -> Operation:
    answer = operation.answer
    if operation.asked[0] == "cas":
        return replace(operation, answer=("fail" if answer[0] == "ok" else "ok", None))
    return replace(operation, answer=("ok", 0 if answer[1] is None else (answer[1] + 1) % 3))


def true_history(chance: random.Random) -> list[Operation]:
    """Make a history that is true: each call has its moment, and begins and ends somewhere around it."""
    state: int | None = None
    found = []
    for moment in range(10, 10 + 10 * chance.randint(3, 7), 10):
        name = chance.choice(["read", "write", "cas", "cas"])
        asked = (name, None if name == "read" else chance.randrange(3), chance.randrange(3) if name == "cas" else None)
        fits = name == "cas" and asked[1] == state
        answer = ("ok", state) if name == "read" else ("ok" if name == "write" or fits else "fail", None)
        state = Register().step(state, asked, None)[1]
        open_end = name != "read" and chance.random() < 0.15
        end = None if open_end else moment + chance.random() * 15
        found.append(Operation(asked, None if open_end else answer, moment - chance.random() * 15, end))
    return found


def test_flipped_answers_are_called_what_brute_force_calls_them() -> None:
    chance = random.Random(4711)  # noqa: S311 - a sample, nothing secret
    wrong = 0
    for _ in range(300):
        history = true_history(chance)
        assert check(Register(), history).verdict is Verdict.TRUE
        for number, operation in enumerate(history):
            if operation.returned is None or operation.asked[0] == "write":
                continue
            other = [*history[:number], flipped(operation), *history[number + 1 :]]
            expected = by_force(Register(), other)
            assert check(Register(), other).verdict == ("true" if expected else "false"), other
            wrong += not expected
    assert wrong > 500


# --- the register of a claim -----------------------------------------------------------------------------------------


def told(name: str, token: int | None, answer: Any, begin: float, end: float | None, result: Any = None) -> Operation:
    return Operation((name, token, result), answer, begin, end)


DONE = ("Succeeded", None, None)
CLAIMS_THAT_COULD_BE = {
    "claim, complete": [
        told("claim", 5, "ok", 0, 1),
        told("seal", 5, "ok", 2, 3, DONE),
        told("claim", None, "no", 4, 5),
    ],
    "the same result twice": [told("claim", 5, "ok", 0, 1), *(told("seal", 5, "ok", n, n + 1, DONE) for n in (2, 4))],
    "a lease ends": [told("claim", 5, "ok", 0, 1), told("end", 5, "ok", 1, None), told("claim", 9, "ok", 3, 4)],
    "a stale holder is refused": [
        *(told("claim", 5, "ok", 0, 1), told("end", 5, "ok", 1, None), told("claim", 9, "ok", 3, 4)),
        *(told("seal", 5, "no", 5, 6, DONE), told("seal", 9, "ok", 5, 6, DONE)),
    ],
    "a release by anybody": [told("claim", 5, "ok", 0, 1), told("end", 5, "ok", 2, 9), told("free", None, "ok", 3, 4)],
    "looks": [
        *(told("look", None, ("free", 0), 0, 1), told("claim", 5, "ok", 2, 3), told("look", None, ("held", 5), 4, 5)),
        *(told("holds", 5, "ok", 4, 5), told("give up", 5, "ok", 6, 7), told("holds", 5, "no", 8, 9)),
    ],
}
CLAIMS_THAT_COULD_NOT = {
    "two holders": [told("claim", 5, "ok", 0, 1), told("claim", 9, "ok", 2, 3)],
    "a token that shrinks": [
        told("claim", 9, "ok", 0, 1),
        told("give up", 9, "ok", 2, 3),
        told("claim", 5, "ok", 4, 5),
    ],
    "refused by nobody": [told("claim", None, "no", 0, 1)],
    "two results": [*(told("seal", 5, "ok", n, n + 1, (s, None, None)) for n, s in ((2, "Failed"), (4, "Succeeded")))],
    "a stale holder's result": [
        *(told("claim", 5, "ok", 0, 1), told("end", 5, "ok", 1, None), told("claim", 9, "ok", 3, 4)),
        told("seal", 5, "ok", 5, 6, DONE),
    ],
    "lost while it is held": [
        told("claim", 5, "ok", 0, 1),
        told("seal", 5, "no", 2, 3, DONE),
        told("holds", 5, "ok", 4, 5),
    ],
    "claimed after the end": [
        *(told("claim", 5, "ok", 0, 1), told("seal", 5, "ok", 2, 3, DONE), told("claim", 9, "ok", 4, 5))
    ],
    "given up twice": [told("claim", 5, "ok", 0, 1), told("give up", 5, "ok", 2, 3), told("give up", 5, "ok", 2, 3)],
}


@pytest.mark.parametrize("name", [*CLAIMS_THAT_COULD_BE, *CLAIMS_THAT_COULD_NOT])
def test_the_claim_register(name: str) -> None:
    history = (CLAIMS_THAT_COULD_BE | CLAIMS_THAT_COULD_NOT)[name]
    expected = name in CLAIMS_THAT_COULD_BE
    assert check(ClaimRegister(), history).verdict == ("true" if expected else "false")
    assert by_force(ClaimRegister(), history) == expected


def test_the_claim_register_agrees_with_brute_force() -> None:
    chance = random.Random(7)  # noqa: S311 - a sample, nothing secret
    kinds = [
        *product(("claim", "seal", "give up"), (1, 2), ("ok", "no")),
        ("end", 1, "ok"),
        ("look", None, ("held", 1)),
    ]
    verdicts = set()
    for _ in range(2000):
        history = []
        for _ in range(chance.randint(1, 5)):
            name, token, answer = chance.choice(kinds)
            begin = chance.randrange(8)
            end = None if name == "end" else begin + chance.randrange(1, 8)
            history.append(told(name, token, answer, begin, end, DONE if name == "seal" else None))
        expected = by_force(ClaimRegister(), history)
        assert check(ClaimRegister(), history).verdict == ("true" if expected else "false"), history
        verdicts.add(expected)
    assert verdicts == {True, False}
