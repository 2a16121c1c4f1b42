"""Keys read back: many at once tell what each by itself would tell."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from stepclaim._core.keys import Keyspace, last_segment, last_segments
from stepclaim.errors import CorruptRecordError

thoroughly = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

texts = st.text(min_size=1, max_size=8) | st.sampled_from(["a", "a/b", "steps", "/p/runs/r/steps/", "100%", "é", ".."])
texts = texts.filter(lambda each: not any("\ud800" <= letter <= "\udfff" for letter in each))
strays = st.sampled_from([b"", b"a/b", b"/", b"/p/runs/r/steps/", b"p/runs/r/steps/x", b"\xff", b"a\xff/b", b"%zz"])
runs = st.sampled_from(["r", "p", "steps", "a/b", "50%"])


def told(read: Any) -> Any:
    try:
        return read()
    except CorruptRecordError as error:
        return str(error)


@thoroughly
@given(runs, st.sampled_from(["/p", "/", "/p/runs", "/é"]), st.lists(texts, max_size=8), st.lists(strays, max_size=2))
def test_many_keys_are_read_as_each_by_itself(run: str, prefix: str, steps: list[str], stray: list[bytes]) -> None:
    keys = Keyspace(prefix.rstrip("/")).run(run)
    below = keys.below("steps")
    found = [keys.step(step).row for step in steps]
    assert last_segments(found, below) == steps
    found += [below + each for each in stray]
    one_by_one = told(lambda: [last_segment(key) for key in found])
    event("an error" if isinstance(one_by_one, str) else "names")
    assert told(lambda: last_segments(found, below)) == one_by_one
