"""The judge: a history without fault passes, and for every rule one that breaks it is caught."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from faults.history import Fault, History, Outcome, Reading
from faults.judge import judge
from faults.story import BASE, MS, SECOND, Story, change, clean, event, facts

if TYPE_CHECKING:
    from collections.abc import Callable


def rules(story: Story | History) -> set[str]:
    return {anomaly.rule for anomaly in judge(story.history if isinstance(story, Story) else story)}


def test_a_history_without_fault_passes() -> None:
    assert judge(clean().history) == []


def test_an_empty_history_passes() -> None:
    assert judge(History(0, "", [], [])) == []


BROKEN: list[tuple[str, str, Callable[[Story], Any]]] = []


def breaks(rule: str) -> Callable[[Callable[[Story], Any]], Callable[[Story], Any]]:
    def note(function: Callable[[Story], Any]) -> Callable[[Story], Any]:
        BROKEN.append((rule, function.__name__, function))
        return function

    return note


@breaks("claim not written")
def a_token_that_etcd_has_not(story: Story) -> None:
    event(story, "claim_step", "c", 1).value["token"] = 99


@breaks("claim not written")
def a_token_of_another(story: Story) -> None:
    event(story, "claim_step", "c", 1).owner = "w1"


@breaks("claim not written")
def a_claim_by_trying_that_etcd_has_not(story: Story) -> None:
    story.call("w1", "try_claim_step", "d", value=True)


@breaks("out of time")
def a_claim_seen_before_it_was_asked_for(story: Story) -> None:
    for fact in facts(story, "claims", 24):
        fact.seen = SECOND


@breaks("out of time")
def a_claim_at_a_revision_of_before(story: Story) -> None:
    asked = event(story, "claim_step", "c", 1).invoked
    story.history.readings.append(Reading(asked - 2 * MS, asked - MS, 24))


@breaks("out of time")
def a_claim_at_a_revision_of_after(story: Story) -> None:
    returned = event(story, "claim_step", "a").returned or 0
    story.history.readings.append(Reading(returned + MS, returned + 2 * MS, 9))


@breaks("two winners")
def the_same_claim_told_twice(story: Story) -> None:
    story.call("w2", "claim_step", "c", value={"token": 24, "attempt": 3})


@breaks("tokens out of order")
def a_token_that_shrinks(story: Story) -> None:
    first, second = (event(story, "claim_step", "b", n) for n in (0, 1))
    first.value, second.value = second.value, first.value


@breaks("attempts out of order")
def an_attempt_told_twice(story: Story) -> None:
    event(story, "claim_step", "b", 1).value["attempt"] = 1


@breaks("attempts with a gap")
def an_attempt_left_out(story: Story) -> None:
    for fact in facts(story, "steps", 14):
        change(fact, attempt=3)


@breaks("attempts with a gap")
def an_attempt_begun_twice(story: Story) -> None:
    story.attempts["c"] -= 1
    story.ended("c", 30)
    story.call("w2", "release_claim", "c", token=24)
    story.claim("w1", "c", 31)


@breaks("two results")
def a_claim_sealed_twice(story: Story) -> None:
    story.sealed("w1", "a", 10, 30)


@breaks("two results")
def an_attempt_finished_twice(story: Story) -> None:
    story.row(30, "a", 1, "Succeeded", None, "w2")


@breaks("two results")
def two_results_acknowledged(story: Story) -> None:
    event(story, "complete_step", "a", 1).args["output"] = "another"


@breaks("a stranger's write")
def a_seal_over_anothers_claim(story: Story) -> None:
    for fact in facts(story, "claims", 19):
        change(fact, owner="w1", attempt_id="id16")


@breaks("a result without its claim")
def a_row_finished_by_a_stale_holder(story: Story) -> None:
    for fact in facts(story, "steps", 19):
        change(fact, token=16)


@breaks("a result without its claim")
def a_result_after_the_claim_ended(story: Story) -> None:
    story.claim("w1", "d", 30)
    story.ended("d", 31)
    story.row(32, "d", 1, "Succeeded", 30, "w1")
    story.complete("w1", "d", 30)


@breaks("a result without its claim")
def a_deferral_that_leaves_the_claim(story: Story) -> None:
    story.row(30, "c", 3, "Pending", 24, "w2")


@breaks("the loser wrote")
def a_claim_of_one_who_was_refused(story: Story) -> None:
    story.claimed("w1", "d", 30)
    story.call("w1", "claim_step", "d", "refused")


@breaks("the loser wrote")
def a_claim_that_nobody_asked_for(story: Story) -> None:
    story.claimed("w1", "d", 30)


@breaks("the loser wrote")
def a_result_of_one_who_was_told_lost(story: Story) -> None:
    story.history.events.remove(event(story, "complete_step", "a", 1))
    event(story, "complete_step", "a").outcome = Outcome.LOST


@breaks("the loser wrote")
def a_result_that_nobody_told(story: Story) -> None:
    story.claim("w1", "d", 30)
    story.sealed("w1", "d", 30, 31)


@breaks("an end without a cause")
def a_release_that_was_refused_and_took_place(story: Story) -> None:
    event(story, "release_claim", "b").outcome = Outcome.REFUSED


@breaks("an end without a cause")
@breaks("the loser wrote")
def a_deferral_that_was_told_lost_and_took_place(story: Story) -> None:
    event(story, "defer_step", "b").outcome = Outcome.LOST


@breaks("an end without a cause")
def a_claim_that_goes_while_its_session_lives(story: Story) -> None:
    story.ended("c", 30)


@breaks("a claim without its session")
def a_claim_that_outlives_its_session(story: Story) -> None:
    story.fact(30, "/stepclaim/sessions/w2-s", None)


@breaks("a claim that nobody knows of")
def a_claim_in_doubt_that_is_kept_alive(story: Story) -> None:
    story.history.truth = [fact for fact in story.history.truth if fact.revision < 21]
    story.history.events = story.history.events[: event(story, "claim_step", "c").id]


@breaks("a claim without a lease")
def a_claim_that_never_ends(story: Story) -> None:
    for fact in facts(story, "claims", 24):
        fact.lease = 0


@breaks("a seal that ends")
def a_seal_under_a_lease(story: Story) -> None:
    for fact in facts(story, "claims", 11):
        fact.lease = 7


@breaks("a result is missing")
def an_acknowledged_result_that_was_not_written(story: Story) -> None:
    story.complete("w2", "c", 24)


@breaks("a result is missing")
def an_acknowledged_result_with_another_output(story: Story) -> None:
    for fact in facts(story, "payloads", 11):
        change(fact, output="something else")


@breaks("a result is missing")
def an_acknowledged_result_that_went_again(story: Story) -> None:
    story.ended("a", 30)


@breaks("a result is missing")
def an_acknowledged_row_that_went_again(story: Story) -> None:
    story.fact(30, f"{BASE}/steps/a", None)


@breaks("not given up")
def a_release_that_left_the_claim(story: Story) -> None:
    story.call("w2", "release_claim", "c", token=24)


@breaks("not given up")
def a_release_by_anybody_that_left_the_claim(story: Story) -> None:
    story.call("w1", "release_step_claim", "c")


@breaks("not given up")
def a_deferral_that_is_not_pending(story: Story) -> None:
    for fact in facts(story, "steps", 13):
        change(fact, status="Running")


@breaks("a hang")
def a_call_past_its_deadline(story: Story) -> None:
    late = event(story, "claim_step", "c", 1)
    late.returned = late.invoked + 8 * SECOND


@breaks("a hang")
def a_call_that_never_ended(story: Story) -> None:
    story.call("w1", "holds", "c", "unknown", token=24).returned = None


@breaks("not linearizable")
def a_stale_look(story: Story) -> None:
    event(story, "get_claim", "a", 1).value = None


@breaks("not linearizable")
def a_stale_holder_that_is_told_it_holds(story: Story) -> None:
    story.call("w1", "holds", "b", value=True, token=16)


@breaks("not linearizable")
def refused_where_nobody_had_it(story: Story) -> None:
    story.call("w1", "claim_step", "d", "refused")


@breaks("not linearizable")
def told_lost_while_it_was_held(story: Story) -> None:
    story.complete("w2", "c", 24, "lost")


@breaks("not linearizable")
def a_second_winner_while_it_was_held(story: Story) -> None:
    story.call("w1", "claim_step", "c", value={"token": 30, "attempt": 4})


@breaks("unreadable truth")
def a_record_that_is_none(story: Story) -> None:
    facts(story, "claims", 10)[0].value = "{"


@breaks("unreadable truth")
def a_watch_with_a_hole(story: Story) -> None:
    story.history.truth.remove(facts(story, "claims", 10)[0])


@breaks("unreadable truth")
def a_watch_that_goes_back(story: Story) -> None:
    story.fact(3, "/stepclaim/other", {})


@pytest.mark.parametrize(("rule", "name", "break_it"), BROKEN, ids=[f"{rule}: {name}" for rule, name, _ in BROKEN])
def test_what_breaks_a_rule_is_caught(rule: str, name: str, break_it: Callable[[Story], Any]) -> None:
    story = clean()
    break_it(story)
    found = judge(story.history)
    assert rule in {anomaly.rule for anomaly in found}, f"{name}: {[str(each) for each in found]}"
    for anomaly in found:
        if anomaly.rule == rule:
            assert anomaly.operations or anomaly.revisions, "an anomaly says where to look"


# --- what is no fault, though it looks like one ----------------------------------------------------------------------


def test_a_stopped_process_may_end_late() -> None:
    story = clean()
    late = event(story, "claim_step", "c", 1)
    late.returned = late.invoked + 9 * SECOND
    story.history.faults.append(Fault(late.invoked, "stop", "p-w2", late.invoked + 6 * SECOND))
    assert rules(story) == set()
    story.history.faults[0].what = "p-w22"
    assert rules(story) == {"a hang"}


def test_a_killed_process_ends_nothing() -> None:
    story = clean()
    story.call("w1", "holds", "c", "unknown", token=24).returned = None
    story.history.config["killed"] = ["p-w1"]
    assert rules(story) == set()


def test_at_most_once_a_dead_workers_claim_stays() -> None:
    story = Story()
    story.history.config["lease_ttl"] = None
    story.claimed("w1", "a", 10)
    story.history.truth[-2].lease = 0
    story.call("w1", "claim_step", "a", "unknown").returned = None
    story.history.config["killed"] = ["p-w1"]
    assert rules(story) == {"a claim that nobody knows of"}, "its session lives"
    story.fact(30, "/stepclaim/sessions/w1-s", None)
    assert rules(story) == set()


def _twice(story: Story, how: str = "claim_step", value: Any = None, **second: Any) -> None:
    """Tell of a claim whose reply was lost, which somebody released, and which its call made again."""
    story.now += 100 * MS
    asked = story.now
    story.claimed("w1", "d", 30)
    story.ended("d", 31)
    story.call("w2", "release_step_claim", "d")
    story.claimed("w1", "d", 32, attempt_id="id30" if not second else second["attempt_id"])
    story.call("w1", how, "d", value=value or {"token": 32, "attempt": 2}).invoked = asked


@pytest.mark.parametrize(("how", "value"), [("claim_step", None), ("try_claim_step", True)])
def test_a_call_may_win_twice_if_its_first_claim_was_released(how: str, value: Any) -> None:
    story = clean()
    _twice(story, how, value)
    assert judge(story.history) == []
    story = clean()
    _twice(story, how, value, attempt_id="fresh")
    assert "the loser wrote" in rules(story), "another attempt is another call"


def test_of_two_calls_by_one_owner_the_one_that_ended_first_won_first() -> None:
    story = clean()
    asked = story.now
    story.now += 50 * MS
    story.claimed("w1", "d", 30)
    story.call("w1", "try_claim_step", "d", value=True)
    story.ended("d", 31)
    story.call("w1", "release_step_claim", "d")
    story.claimed("w1", "d", 32)
    story.call("w1", "try_claim_step", "d", value=True).invoked = asked  # it waited through the whole of the other
    story.history.events.sort(key=lambda each: each.invoked)
    assert judge(story.history) == []


def test_a_call_may_lose_if_its_claim_was_released_before_it_was_answered() -> None:
    def told(*, returned: int = 0) -> Story:
        story = clean()
        asked = story.now
        story.claimed("w1", "d", 30)
        story.now += 50 * MS
        story.ended("d", 31)
        story.call("w2", "release_step_claim", "d")
        story.claim("w2", "d", 32)
        refused = story.call("w1", "claim_step", "d", "refused")
        refused.invoked, refused.returned = asked, asked + returned if returned else refused.returned
        return story

    assert judge(told().history) == []
    assert "the loser wrote" in rules(told(returned=20 * MS)), "it stood when the call was answered"
    unasked = told()
    unasked.history.events.remove(event(unasked, "release_step_claim", "d"))
    assert "the loser wrote" in rules(unasked), "nobody took it away"


def test_a_retried_step_has_another_result() -> None:
    story = clean()
    story.ended("a", 30)
    story.row(30, "a", 1, "Running", 10, "w1")
    change(facts(story, "steps", 30)[0], retried=True)
    story.call("w2", "retry_step", "a")
    story.claim("w2", "a", 31)
    story.complete("w2", "a", 31, revision=32)
    assert judge(story.history) == []


def test_several_steps_claimed_at_once_are_judged_each() -> None:
    story = clean()
    story.claimed("w1", "x", 30)
    story.claimed("w1", "y", 31)
    won = {step: {"token": token, "attempt": 1} for step, token in (("x", 30), ("y", 31))}
    several = story.call("w1", "claim_steps", "", value=won, steps=["x", "y", "a"])
    assert judge(story.history) == []
    several.args["steps"] = ["x", "y", "z"]
    assert rules(story) == {"not linearizable"}, "z was free"
