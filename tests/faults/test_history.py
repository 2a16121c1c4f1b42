"""What is kept of a history: the recorders' files, the history's own, the command that judges it, the timeline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from faults.history import Failure, Fault, History, Outcome, Reading, Recorder, judge_error, merge
from faults.judge import judge, main
from faults.story import MS, SECOND, clean
from faults.timeline import draw
from stepclaim import ClaimLostError, ConfigurationError, OutcomeUnknownError, StepConflictError, UnavailableError


def test_a_history_is_what_was_saved(tmp_path: Path) -> None:
    story = clean()
    story.history.events[0].error = Failure("ClaimLostError", "gone", definite=True)
    story.history.faults.append(Fault(1, "kill", "member-1"))
    story.history.readings.append(Reading(1, 2, 3))
    story.history.save(tmp_path / "h.json")
    assert History.load(tmp_path / "h.json") == story.history
    (tmp_path / "h.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="version 9"):
        History.load(tmp_path / "h.json")


def test_a_killed_recorder_loses_nothing_but_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "w1.jsonl"
    with Recorder(path, "p-1", owner="w1") as recorder:
        op = recorder.invoke("claim_step", run="r", step="s", timeout=5)
        recorder.returned(op, "ok", value={"token": 7})
        recorder.invoke("complete_step", run="r", step="s", token=7)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op":"half","returned":123')
    with Recorder(path, "p-1", owner="w1") as recorder:
        recorder.failed(recorder.invoke("holds", run="r", step="s", token=7), ClaimLostError("gone"))
    events = merge([path])
    assert [(each.id, each.call, each.outcome) for each in events] == [
        (1, "claim_step", "ok"),
        (2, "complete_step", "unknown"),
        (3, "holds", "lost"),
    ]
    assert events[0].timeout == 5
    assert events[1].returned is None
    assert events[2].error == Failure("ClaimLostError", "gone", definite=True)
    for cut in range(len(whole)):  # wherever it was killed
        path.write_bytes(whole[:cut])
        assert len(merge([path])) <= 2


def test_errors_say_what_they_promise() -> None:
    told = {
        ClaimLostError("x"): Outcome.LOST,
        StepConflictError("x"): Outcome.REFUSED,
        ConfigurationError("x"): Outcome.ERROR,
        OutcomeUnknownError("x"): Outcome.UNKNOWN,
        UnavailableError("x"): Outcome.UNKNOWN,
        UnavailableError("x", definite=True): Outcome.ERROR,
        KeyError("x"): Outcome.UNKNOWN,
    }
    for error, outcome in told.items():
        assert judge_error(error)[0] is outcome, repr(error)


def test_the_command_judges_and_ends_with_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = clean(), clean()
    bad.call("w2", "claim_step", "c", value={"token": 24, "attempt": 3})
    good.history.save(tmp_path / "good.json")
    bad.history.save(tmp_path / "bad.json")
    assert main([str(tmp_path / "good.json")]) == 0
    assert capsys.readouterr().out.startswith("good.json\tno anomaly\tby hand, seed 1:")
    assert main([str(tmp_path / "good.json"), str(tmp_path / "bad.json")]) == 1
    assert "two winners: 2 callers were told that they won 'c' with token 24 [operations" in capsys.readouterr().out


def test_the_command_runs_from_the_checkout(tmp_path: Path) -> None:
    log = tmp_path / "etcd_1.log"
    log.write_text("INFO  jepsen.util - 0\t:invoke\t:read\tnil\nINFO  jepsen.util - 0\t:ok\t:read\t3\n")
    command = [sys.executable, "-m", "tests.faults.judge", "register", str(log)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "etcd_1.log\tfalse\n"), done.stderr


def test_the_timeline_shows_everything_and_needs_nothing(tmp_path: Path) -> None:
    story = clean()
    story.call("w2", "claim_step", "c", value={"token": 24, "attempt": 3})
    story.history.faults.append(Fault(SECOND, "partition", "member-1 </script>", 2 * SECOND))
    story.history.save(tmp_path / "h.json")
    assert main(["timeline", str(tmp_path / "h.json"), "-o", str(tmp_path / "t.html")]) == 0
    page = (tmp_path / "t.html").read_text()
    assert page == draw(story.history, judge(story.history))
    for shown in ("p-w1", "p-w2", "two winners", "by hand, seed 1", "partition: member-1"):
        assert shown in page
    assert page.count("</script>") == 1
    assert "//" not in page, "no address of anything outside"


def test_overlapping_calls_stand_below_each_other() -> None:
    story = clean()
    first = story.history.events[0]
    story.history.events.append(replace(first, id=99, invoked=first.invoked + MS))
    page = draw(story.history, [])
    data = json.loads(page.split("const D=")[1].split(",LEFT=")[0])
    lanes = {lane["name"]: lane["rows"] for lane in data["lanes"]}
    assert (lanes["p-w1"], lanes["p-w2"]) == (1, 2)
