"""What happened, as a file: the calls as their callers saw them, the faults, and the truth as etcd recorded it.

A history is one JSON file with the seed that made it. Each worker appends to a file of its own with a `Recorder`, one
line when a call begins and one when it ends, and the runner merges them. A worker that is killed leaves a call
without an end: nobody knows what came of it, which is what its outcome says.

Times are nanoseconds of the machine's monotonic clock, which is the same for all its processes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

VERSION = 2


class Outcome(StrEnum):
    """What a caller was told."""

    OK = "ok"
    """It took place: the claim was won, the completion stands, the release removed the claim, the look was answered."""
    REFUSED = "refused"
    """It lost a race, or what stands forbids it: None, False or `StepConflictError`. It wrote nothing."""
    LOST = "lost"
    """`ClaimLostError`: the claim is no longer the caller's. It wrote nothing."""
    UNKNOWN = "unknown"
    """It may or may not have taken place; also where the caller died before it was told."""
    ERROR = "error"
    """It failed for certain and wrote nothing: an error that says so, or one from before anything was sent."""


@dataclass(slots=True)
class Failure:
    """The error that a call raised."""

    type: str
    message: str
    definite: bool


@dataclass(slots=True)
class Event:
    """One call by one worker, from its beginning to its end.

    `args`: `run` and `step` as they were given; `token` and `attempt` of the claim that it is about; for a completion
    `status`, `output` and `error`. `value` is what came back: for a won claim `{"token": ..., "attempt": ...,
    "lease": ...}`, for `try_claim_step` and `holds` a bool, for `get_claim` None or `{"token": ..., "state": ...,
    "owner": ...}`.
    """

    id: int
    process: str
    call: str
    args: dict[str, Any]
    invoked: int
    returned: int | None = None
    outcome: Outcome = Outcome.UNKNOWN
    value: Any = None
    error: Failure | None = None
    owner: str | None = None
    """The owner that the caller's store writes into its claims."""
    timeout: float | None = None
    """The call's deadline, in seconds from `invoked`."""

    @property
    def step(self) -> tuple[str, str]:
        """The run and the step that the call is about."""
        return str(self.args.get("run", "")), str(self.args.get("step", ""))

    def __str__(self) -> str:
        """Name the call in an anomaly."""
        return f"operation {self.id} ({self.call} by {self.process}: {self.outcome})"


@dataclass(slots=True)
class Fault:
    """Something that was done to the cluster or to a worker, and when it was undone."""

    at: int
    kind: str
    what: str
    until: int | None = None


@dataclass(slots=True)
class Fact:
    """One change of one key, as the watch from the first revision told it; a value of None is the key's deletion."""

    revision: int
    key: str
    value: str | None
    create_revision: int = 0
    lease: int = 0
    seen: int | None = None
    """When the watch told it: it was certainly so by then."""


@dataclass(slots=True)
class Reading:
    """A linearizable read of the runner's: what it covers was before `answered`, what it does not after `asked`."""

    asked: int
    answered: int
    revision: int


@dataclass(slots=True)
class History:
    """All of it.

    `config`: `prefix` ("/stepclaim"), `lease_ttl` (seconds; None is at-most-once), `timeout` (seconds, for calls that
    name none), `slack` (seconds that a call may take past its deadline), and whatever else is worth keeping.
    """

    seed: int
    workload: str
    events: list[Event]
    truth: list[Fact]
    faults: list[Fault] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    version: int = VERSION

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a history."""
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if raw.get("version") != VERSION:
            raise ValueError(f"{path} has version {raw.get('version')!r}; this judge reads version {VERSION}")
        raw["events"] = [_event(each) for each in raw["events"]]
        raw["truth"] = [Fact(**each) for each in raw["truth"]]
        raw["faults"] = [Fault(**each) for each in raw["faults"]]
        raw["readings"] = [Reading(**each) for each in raw["readings"]]
        return cls(**raw)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history, at once or not at all: a file that is there can be read."""
        target = Path(path)
        half = target.with_name(target.name + ".part")
        half.write_text(json.dumps(asdict(self), indent=None, separators=(",", ":")), encoding="utf-8")
        half.replace(target)


def _event(raw: dict[str, Any]) -> Event:
    event = Event(**raw)
    event.outcome = Outcome(event.outcome)
    if raw.get("error") is not None:
        event.error = Failure(**raw["error"])
    return event


REFUSALS = frozenset({"StepConflictError", "ClaimTimeoutError"})
HARMLESS = frozenset({"ConfigurationError", "RecordTooLargeError", "StoreClosedError", "SessionLostError"})
"""Errors from before anything was sent."""


def judge_error(error: BaseException) -> tuple[Outcome, Failure]:
    """Say what an error of the store's told its caller; one that isn't known promises nothing."""
    name = type(error).__name__
    if name == "ClaimLostError":
        outcome, definite = Outcome.LOST, True
    elif name in REFUSALS:
        outcome, definite = Outcome.REFUSED, True
    elif name in HARMLESS or bool(getattr(error, "definite", False)):
        outcome, definite = Outcome.ERROR, True
    else:
        outcome, definite = Outcome.UNKNOWN, False
    return outcome, Failure(name, str(error), definite)


class Recorder:
    """Appends one worker's calls to its file. May be shared by threads; a process that was killed loses no line."""

    def __init__(self, path: str | os.PathLike[str], process: str, *, owner: str | None = None) -> None:
        """Open the file; one that a killed predecessor left behind is carried on."""
        self.process = process
        self.owner = owner
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._next = 0
        # numbers begin anew with each process: its own id keeps them apart from its predecessor's
        self._life = f"{os.getpid()}-{time.monotonic_ns()}"
        os.write(self._file, b"\n")  # ends a line that the predecessor did not

    def invoke(
        self,
        call: str,
        *,
        timeout: float | None = None,
        owner: str | None = None,
        **args: Any,
    ) -> str:
        """Write that a call begins, and give its name for `returned`. Call it last before the call itself."""
        with self._lock:
            self._next += 1
            name = f"{self._life}-{self._next}"
        line: dict[str, Any] = {
            "op": name,
            "process": self.process,
            "owner": owner or self.owner,
            "call": call,
            "args": args,
        }
        line |= {"timeout": timeout, "invoked": time.monotonic_ns()}
        self._append(line)
        return name

    def returned(
        self,
        op: str,
        outcome: Outcome | str,
        *,
        value: Any = None,
        error: Failure | None = None,
        at: int | None = None,
    ) -> None:
        """Write how a call ended. Call it first after the call; `at` is when that was, if something came between."""
        line: dict[str, Any] = {"op": op, "returned": time.monotonic_ns() if at is None else at, "value": value}
        self._append(line | {"outcome": Outcome(outcome), "error": None if error is None else asdict(error)})

    def failed(self, op: str, error: BaseException) -> None:
        """Write that a call raised an error."""
        outcome, failure = judge_error(error)
        self.returned(op, outcome, error=failure)

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")  # one write: lines never mix

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        """Give the open recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def merge(paths: Iterable[str | os.PathLike[str]]) -> list[Event]:
    """Put the workers' files together, in the order in which their calls began, and number them.

    A line that a killed worker wrote half is dropped: half a beginning was never carried out, half an end means that
    nobody was told.
    """
    begun: dict[str, dict[str, Any]] = {}
    for path in paths:
        for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if not isinstance(line, dict):
                continue
            begun.setdefault(line.pop("op"), {}).update(line)
    calls = [call for call in begun.values() if "invoked" in call]
    calls.sort(key=lambda call: int(call["invoked"]))
    return [_event({"id": number, **call}) for number, call in enumerate(calls, 1)]
