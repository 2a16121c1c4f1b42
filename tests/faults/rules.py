"""What must hold of every history, rule by rule: each compares what callers were told with what etcd recorded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .case import CLAIMS, COMPLETIONS, GIVE_UPS, result_asked
from .history import Outcome
from .truth import FINAL, Anomaly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .case import Case
    from .history import Event, Fault
    from .truth import Life, StepTruth

SECOND = 1_000_000_000
NOTHING_WRITTEN = frozenset({Outcome.REFUSED, Outcome.LOST, Outcome.ERROR})


def won_claims_are_written(case: Case) -> Iterator[Anomaly]:
    """Demand that every won claim was created at the revision that is its token, by its winner."""
    for event in case.unmatched:
        yield Anomaly("claim not written", f"{event} was told of a claim that etcd has not got", (event.id,))
    for event in case.events:
        token = case.token(event)
        if event.call not in CLAIMS or token is None:
            continue
        life = case.life(event)
        if life is None or not life.held:
            text = f"{event} was told token {token}, but no claim was created there"
            yield Anomaly("claim not written", text, (event.id,), (token,))
        elif event.owner is not None and life.owner != event.owner:
            text = f"{event} was told token {token}, which {life.owner} created"
            yield Anomaly("claim not written", text, (event.id,), (token,))


def writes_lie_inside_their_calls(case: Case) -> Iterator[Anomaly]:
    """Demand that what a call wrote has its revision between those of everything that was before and after the call."""
    for event, revision in case.wrote:
        late, early = case.moments.not_after(revision), case.moments.not_before(revision)
        if late is not None and late.at < event.invoked:
            ids = (event.id, *((late.by.id,) if late.by is not None else ()))
            text = f"{event} wrote a revision that was there before it began"
            yield Anomaly("out of time", text, ids, (revision,))
        if early is not None and event.returned is not None and early.at > event.returned:
            ids = (event.id, *((early.by.id,) if early.by is not None else ()))
            text = f"{event} wrote a revision that came only after it had ended"
            yield Anomaly("out of time", text, ids, (revision,))


def one_winner_per_claim(case: Case) -> Iterator[Anomaly]:
    """Demand that a claim is told to one winner."""
    for key, events in case.of_step.items():
        by_token: dict[int, list[Event]] = {}
        for event in events:
            token = case.token(event)
            if event.call in CLAIMS and token is not None:
                by_token.setdefault(token, []).append(event)
        for token, winners in by_token.items():
            if len(winners) > 1:
                text = f"{len(winners)} callers were told that they won {key[1]!r} with token {token}"
                yield Anomaly("two winners", text, tuple(each.id for each in winners), (token,))


def tokens_and_attempts_grow(case: Case) -> Iterator[Anomaly]:
    """Demand that a later claim has a greater token, and a greater token a later attempt."""
    for key, events in case.of_step.items():
        won = [(token, each) for each in events if each.call in CLAIMS and (token := case.token(each)) is not None]
        newest: tuple[int, Event] | None = None
        ended: list[tuple[int, int, Event]] = sorted(
            ((each.returned, token, each) for token, each in won if each.returned is not None), key=lambda end: end[0]
        )
        place = 0
        for token, event in sorted(won, key=lambda pair: pair[1].invoked):
            while place < len(ended) and ended[place][0] < event.invoked:
                _, earlier, by = ended[place]
                newest = (earlier, by) if newest is None or earlier > newest[0] else newest
                place += 1
            if newest is not None and token <= newest[0]:
                text = f"{event} won {key[1]!r} with a token no greater than that of {newest[1]}, which was over before"
                yield Anomaly("tokens out of order", text, (newest[1].id, event.id), (newest[0], token))
        if case.removed:
            continue  # a run that was removed begins anew at attempt 1
        last: tuple[int, Event] | None = None
        for _, event in sorted(won, key=lambda pair: pair[0]):
            attempt = event.value.get("attempt") if isinstance(event.value, dict) else None
            if not attempt:
                continue
            if last is not None and attempt <= last[0]:
                text = f"{event} was told attempt {attempt} of {key[1]!r} after {last[1]} had been told {last[0]}"
                yield Anomaly("attempts out of order", text, (last[1].id, event.id))
            last = (attempt, event)


def attempts_have_no_gaps(case: Case) -> Iterator[Anomaly]:
    """Demand that a step's attempts are 1, 2, 3 in the truth; only a run that was removed begins anew."""
    for key, step in case.truth.steps.items():
        kept: set[int] = set()
        newest = 0
        changes = [(write.revision, 1, 0, write) for write in step.rows]
        changes += [(write.revision, 0, number, write) for number, write in step.attempts]
        before: str | None = None
        for revision, is_row, number, write in sorted(changes, key=lambda change: change[:3]):
            if not is_row:
                (kept.discard if write.record is None else kept.add)(number)
                if write.record is None and not kept and step.row_at(revision) is None:
                    newest = 0
                continue
            if write.record is None:
                newest = newest if kept else 0
                continue
            attempt = int(write.record.get("attempt") or 0)
            begins = write.record.get("status") == "Running" and not write.record.get("retried")
            again = begins and attempt == newest and write.record.get("write_id") != before
            if again or attempt not in {newest, newest + 1} or attempt < 1:
                text = f"attempt {attempt} of {key[1]!r} in run {key[0]!r} began after attempt {newest}"
                yield Anomaly("attempts with a gap", text, (), (revision,))
            newest, before = attempt, write.record.get("write_id")


def one_result_per_attempt(case: Case) -> Iterator[Anomaly]:
    """Demand that a claim is sealed once and an attempt finished once, in the truth and in what callers were told."""
    for key, step in case.truth.steps.items():
        for life in step.lives:
            if len(life.seals) > 1:
                yield Anomaly(
                    "two results", f"{life} was sealed twice", (), tuple(each.revision for each in life.seals)
                )
            told = [each for each in case.about(life, frozenset({"complete_step"})) if each.outcome == Outcome.OK]
            if len({result_asked(each) for each in told}) > 1:
                text = f"different results of {life} were acknowledged"
                yield Anomaly("two results", text, tuple(each.id for each in told), (life.token,))
        final: dict[int, tuple[int, str]] = {}
        for write in step.rows:
            row = write.record
            if row is None:
                continue
            attempt = int(row.get("attempt") or 0)
            if attempt == 1 and row.get("status") == "Running" and not row.get("retried"):
                final.clear()  # the first attempt of a run that was removed and begun anew
            if row.get("status") not in FINAL:
                continue
            if attempt in final:
                text = f"attempt {attempt} of {key[1]!r} in run {key[0]!r} was finished twice"
                yield Anomaly("two results", text, (), (final[attempt][0], write.revision))
            final[attempt] = (write.revision, str(row.get("write_id")))


def results_come_from_holders(case: Case) -> Iterator[Anomaly]:
    """Demand that a row becomes final together with the seal of its own claim, and nobody seals another's."""
    for key, step in case.truth.steps.items():
        for life in step.lives:
            for write in life.writes[1:]:
                record, born = write.record or {}, life.born
                if any(record.get(name) != born.get(name) for name in ("owner", "attempt_id")):
                    text = f"{life} was overwritten by {record.get('owner')}"
                    yield Anomaly("a stranger's write", text, _writers(case, life), (life.token, write.revision))
        if any(each.call in {"record_step_complete", "record_step_start"} for each in case.of_step.get(key, ())):
            continue  # an engine may finish a step whose claim is another's: that is its interface
        yield from _unclaimed_results(case, step, key)


def _unclaimed_results(case: Case, step: StepTruth, key: tuple[str, str]) -> Iterator[Anomaly]:
    for write in step.rows:
        row = write.record
        if row is None or row.get("token") is None or row.get("status") not in {"Succeeded", "Failed", "Pending"}:
            continue
        life = step.life(row["token"])
        if row["status"] == "Pending":  # a deferral ends the claim with it
            good = life is not None and life.ended == write.revision
            if life is not None and good and not _deferred(case, life):
                text = f"{key[1]!r} was deferred, but nobody who asked for that was told so"
                yield Anomaly("the loser wrote", text, _writers(case, life), (life.token, write.revision))
        else:
            good = life is not None and any(seal.revision == write.revision for seal in life.seals)
        if not good:
            ids = tuple(
                each.id
                for each in case.of_step.get(key, ())
                if each.call in COMPLETIONS | GIVE_UPS and case.token(each) == row["token"]
            )
            text = (
                f"{key[1]!r} in run {key[0]!r} became {row['status']} under token {row['token']}, which did not hold it"
            )
            yield Anomaly("a result without its claim", text, ids, (row["token"], write.revision))


def _deferred(case: Case, life: Life) -> bool:
    told = {each.outcome for each in case.about(life, frozenset({"defer_step"}))}
    return bool(told & {Outcome.OK, Outcome.UNKNOWN})


def _writers(case: Case, life: Life) -> tuple[int, ...]:
    return tuple(each.id for each in case.about(life, COMPLETIONS | GIVE_UPS))


def the_refused_wrote_nothing(case: Case) -> Iterator[Anomaly]:
    """Demand that nobody who was told that he lost is the one who wrote."""
    for step in case.truth.steps.values():
        for life in step.lives:
            if life.held and not case.winners(life) and not _won_again(case, life):
                yield from _claim_of_nobody(case, life)
            for seal in life.seals[:1] if life.held else ():
                result = case.result_written(life, seal)
                denied = [
                    each
                    for each in case.about(life, COMPLETIONS)
                    if each.outcome in NOTHING_WRITTEN
                    and result_asked(each) == result
                    and case.possible(each, seal.revision)
                ]
                if case.maybe_seals(life, result):
                    continue
                ids = tuple(each.id for each in denied)
                if denied:
                    text = f"{denied[0]} was refused, but its result is the one that stands"
                    yield Anomaly("the loser wrote", text, ids, (life.token, seal.revision))
                elif not any(each.call.startswith("record_") for each in case.of_step.get(life.step, ())):
                    text = f"{life} was sealed with a result that nobody told"
                    yield Anomaly("the loser wrote", text, _writers(case, life), (life.token, seal.revision))


def _won_again(case: Case, life: Life) -> bool:
    """Whether the call that made a claim was told of a later one: this one was gone when it asked again."""
    return life.ended is not None and any(
        case.possible(winner, life.token)
        for later in case.truth.steps[life.step].lives
        if later.call == life.call and later.token > life.ended
        for winner in case.winners(later)
    )


def _removed_meanwhile(case: Case, life: Life, by: Event) -> bool:
    """Whether somebody else's word, or the session's end, removed a claim before the call that made it was answered."""
    if life.ended is None or not case.possible(by, life.ended):
        return False
    told = {Outcome.OK, Outcome.UNKNOWN}
    return case.truth.ended_with_session(life) or any(
        each.outcome in told and each.invoked < (by.returned or 0) and case.possible(each, life.ended)
        for each in case.undoers(life.step)
    )


def _claim_of_nobody(case: Case, life: Life) -> Iterator[Anomaly]:
    tried = [each for each in case.claims(life.step) if each.owner in {None, life.owner}]
    late = case.moments.not_after(life.token)
    doubtful = [each for each in tried if each.outcome == Outcome.UNKNOWN and (late is None or each.invoked <= late.at)]
    if not doubtful:
        denied = [each for each in tried if each.outcome in NOTHING_WRITTEN and case.possible(each, life.token)]
        if any(_removed_meanwhile(case, life, each) for each in denied):
            return  # its reply was lost, and when its call looked it was gone
        if denied:
            text = f"{denied[0]} was refused, but {life} was created for it"
        else:
            text = f"{life} was created without any call of its owner's"
        yield Anomaly("the loser wrote", text, tuple(each.id for each in denied), (life.token,))


def every_end_has_a_cause(case: Case) -> Iterator[Anomaly]:
    """Demand that a held claim went by its holder's word, somebody's release, or with its session: never by itself."""
    for step in case.truth.steps.values():
        for life in step.lives:
            if life.ended is None or life.seals or not case.winners(life) or case.truth.ended_with_session(life):
                continue
            late = case.moments.not_after(life.ended)
            given_up = case.about(life, GIVE_UPS)
            causes = [*given_up, *case.undoers(life.step)]
            told = [each for each in causes if each.outcome == Outcome.OK]
            # one that was never answered may have been carried through at any time since
            doubtful = [each for each in causes if each.outcome == Outcome.UNKNOWN]
            if any(each in given_up or case.possible(each, life.ended) for each in told) or any(
                late is None or each.invoked <= late.at for each in doubtful
            ):
                continue
            denied = [each for each in given_up if case.possible(each, life.ended)]
            who = f"though {denied[0]} was refused" if denied else "by nobody's word, and its session was there"
            ids = tuple(each.id for each in denied)
            yield Anomaly("an end without a cause", f"{life} went, {who}", ids, (life.token, life.ended))


def nothing_is_left_behind(case: Case) -> Iterator[Anomaly]:
    """Demand that what is held to the end has a session and a caller that knows of it, and what is sealed no lease."""
    leased = case.history.config.get("lease_ttl") is not None
    for step in case.truth.steps.values():
        for life in step.lives:
            last = life.writes[-1]
            if life.seals:
                if last.lease:
                    yield Anomaly("a seal that ends", f"{life} was sealed under a lease", (), (last.revision,))
                continue
            if leased and not last.lease:
                yield Anomaly("a claim without a lease", f"{life} would never end", (), (life.token,))
            if life.ended is not None:
                continue
            lives = case.truth.session_lives(str(life.born.get("session", "")))
            told = case.winners(life)
            if leased and not lives:
                ids = tuple(each.id for each in told)
                yield Anomaly("a claim without its session", f"{life} outlived its session", ids, (life.token,))
            # at most once, a worker that died before it was told leaves its claim to an operator
            elif not told and (lives or leased):
                tried = [each for each in case.claims(life.step) if each.owner in {None, life.owner}]
                ids = tuple(each.id for each in tried if each.outcome == Outcome.UNKNOWN)
                yield Anomaly("a claim that nobody knows of", f"{life} is held to the end", ids, (life.token,))


def nothing_acknowledged_is_missing(case: Case) -> Iterator[Anomaly]:
    """Demand that an acknowledged completion was written with its output, and stands until somebody undoes it."""
    for event in case.events:
        token = case.token(event)
        if event.call != "complete_step" or event.outcome != Outcome.OK or token is None:
            continue
        life = case.life(event)
        if life is None or not life.seals:
            text = f"{event} was acknowledged, but its claim was never sealed"
            yield Anomaly("a result is missing", text, (event.id,), (token,))
            continue
        seal = life.seals[0]
        row = case.truth.steps[event.step].row_at(seal.revision) or {}
        written = case.result_written(life, seal)
        if written != result_asked(event) or row.get("status") != written[0] or row.get("token") != token:
            text = (
                f"{event} was acknowledged, but etcd has {written} (row: {row.get('status')}, token {row.get('token')})"
            )
            yield Anomaly("a result is missing", text, (event.id,), (token, seal.revision))
        elif case.undone(event.step):
            continue
        elif life.ended is not None:
            text = f"{event} was acknowledged, and its seal went again"
            yield Anomaly("a result is missing", text, (event.id,), (token, life.ended))
        elif (case.truth.steps[event.step].row_at(case.truth.last) or {}).get("status") != written[0]:
            text = f"{event} was acknowledged, and its row did not stay"
            yield Anomaly("a result is missing", text, (event.id,), (token, case.truth.last))


def what_was_given_up_is_gone(case: Case) -> Iterator[Anomaly]:
    """Demand that a claim that was released or deferred ended, and a deferred step is Pending from then on."""
    for event in case.events:
        if event.outcome != Outcome.OK:
            continue
        if event.call == "release_step_claim":
            step = case.step(event.step)
            for life in step.lives if step is not None else ():
                born, gone = case.moments.not_after(life.token), case.moments.not_before(life.ended or life.token)
                before = born is not None and born.at < event.invoked
                stayed = life.ended is None or (gone is not None and gone.at > (event.returned or gone.at))
                if before and stayed:
                    yield Anomaly("not given up", f"{event} left {life}", (event.id,), (life.token,))
        token, given_up = case.token(event), case.life(event)
        if event.call not in GIVE_UPS or token is None:
            continue
        if given_up is None or given_up.ended is None:
            yield Anomaly("not given up", f"{event} was told so, but the claim stands", (event.id,), (token,))
        elif event.call == "defer_step":
            row = case.truth.steps[event.step].row_at(given_up.ended) or {}
            if row.get("status") != "Pending":
                text = f"{event} was told so, but the step was {row.get('status')}"
                yield Anomaly("not given up", text, (event.id,), (token, given_up.ended))


def nothing_hangs(case: Case) -> Iterator[Anomaly]:
    """Demand that every call ended by its deadline, but for the time that its process was stopped."""
    config = case.history.config
    slack = float(config.get("slack", 2.0))
    killed = config.get("killed")
    stops = [
        (fault, re.split(r"[\s,]+", fault.what))
        for fault in case.history.faults
        if fault.kind.startswith(("stop", "pause"))
    ]
    for event in case.events:
        timeout = event.timeout if event.timeout is not None else config.get("timeout")
        if event.returned is None:
            if killed is not None and event.process not in killed:
                yield Anomaly("a hang", f"{event} never ended, and its process was not killed", (event.id,))
            continue
        if timeout is None:
            continue
        took = (event.returned - event.invoked - _stopped(event, stops)) / SECOND
        if took > timeout + slack:
            yield Anomaly("a hang", f"{event} took {took:.1f} s with a deadline of {timeout:g} s", (event.id,))


def _stopped(event: Event, stops: list[tuple[Fault, list[str]]]) -> int:
    """Tell for how many nanoseconds of a call its process was stopped."""
    total = 0
    for fault, processes in stops:
        if event.process in processes:
            end = event.returned or event.invoked
            total += max(0, min(end, fault.until if fault.until is not None else end) - max(event.invoked, fault.at))
    return total


RULES = (
    won_claims_are_written,
    writes_lie_inside_their_calls,
    one_winner_per_claim,
    tokens_and_attempts_grow,
    attempts_have_no_gaps,
    one_result_per_attempt,
    results_come_from_holders,
    the_refused_wrote_nothing,
    every_end_has_a_cause,
    nothing_is_left_behind,
    nothing_acknowledged_is_missing,
    what_was_given_up_is_gone,
    nothing_hangs,
)
