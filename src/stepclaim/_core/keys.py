"""Where everything stands in etcd. The only module that knows how a key looks."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote
from uuid import UUID

from msgspec import Struct

from stepclaim.errors import ConfigurationError, CorruptRecordError

if TYPE_CHECKING:
    from stepclaim.abc import RunId

KEY_LIMIT = 1000
_HEX = re.compile(r"[0-9a-fA-F]{32}")
_PLAIN = re.compile(r"[0-9A-Za-z_.~-]*")
_SHORT_AND_PLAIN = re.compile(rf"[0-9A-Za-z_.~-]{{1,{KEY_LIMIT}}}").fullmatch
_KEPT_NAMES = 4096
"""Runs whose names are kept: most calls are about the same few."""


def text(value: object, what: str) -> str:
    """Check one part of a key: any non-empty text up to 1,000 bytes of UTF-8."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} must be a str, not {type(value).__name__}: {value!r}")
    if not value:
        raise ConfigurationError(f"{what} must not be empty")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{what} {value!r} is not valid Unicode: it can't be written as UTF-8") from error
    if size > KEY_LIMIT:
        raise ConfigurationError(f"{what} has {size} bytes of UTF-8; at most {KEY_LIMIT} are allowed")
    return value


def run_name(run_id: RunId, what: str = "run_id") -> str:
    """Give the canonical text of a run's id: a UUID in lower case with hyphens, any other text as it is."""
    if isinstance(run_id, UUID):
        return str(run_id)
    if not isinstance(run_id, str):
        raise ConfigurationError(f"{what} must be a uuid.UUID or a str, not {type(run_id).__name__}: {run_id!r}")
    bare = run_id.replace("urn:", "").replace("uuid:", "").strip("{}").replace("-", "")
    if _HEX.fullmatch(bare):
        return str(UUID(bare))
    return text(run_id, what)


@lru_cache(_KEPT_NAMES)
def _base_of(prefix: str, run_id: RunId) -> tuple[str, str]:
    """Give a run's canonical id and what all its keys begin with."""
    name = run_name(run_id)
    return name, f"{prefix}/runs/{segment(name)}/"


def segment(value: str) -> str:
    """Percent-encode one path segment, so that no user's text can leave its place."""
    return value if _PLAIN.fullmatch(value) else quote(value, safe="")


def last_segment(key: bytes) -> str:
    """Give back the text that a key's last segment was made of."""
    try:
        name = str(key[key.rfind(b"/") + 1 :], "ascii")
    except UnicodeDecodeError:
        name = ""
    if not name:
        raise stray(key)
    return unquote(name) if "%" in name else name


def last_segments(keys: list[bytes], prefix: bytes) -> list[str]:
    """Do so for many keys below one prefix, all at once: one by one they cost twice as much."""
    joined, before = (str(each, "ascii", "replace") for each in (b"".join(keys), prefix))
    names = joined.split(before)[1:] if before.startswith("/") else []
    slashes = len(keys) * before.count("/")
    if len(names) != len(keys) or joined.count("/") != slashes or not joined.isascii() or not all(names):
        return [last_segment(key) for key in keys]  # which tells the one that is none of ours
    return [unquote(name) if "%" in name else name for name in names] if "%" in joined else names


def attempt_number(key: bytes) -> int:
    """Give back the attempt's number that a key ends with."""
    name = key.rpartition(b"/")[2]
    if not name.isdigit():
        raise stray(key)
    return int(name)


def stray(key: bytes) -> CorruptRecordError:
    """Tell of a key that stepclaim did not write."""
    told = key.decode(errors="backslashreplace")
    return CorruptRecordError(f"the key {told!r} is none that stepclaim writes: delete it with etcdctl", key=told)


class StepKeys(Struct, gc=False):
    """One step's keys."""

    run_id: str
    step_key: str
    claim: bytes
    row: bytes
    _base: str
    _segment: str

    def attempt(self, number: int) -> bytes:
        """Give the key that an earlier attempt is kept under."""
        return f"{self._base}attempts/{self._segment}/{number}".encode()

    @property
    def attempts(self) -> bytes:
        """The prefix of all earlier attempts."""
        return f"{self._base}attempts/{self._segment}/".encode()

    def payload(self, number: int) -> bytes:
        """Give the key of an attempt's input, output, error and trace."""
        return f"{self._base}payloads/{self._segment}/{number}".encode()

    @property
    def dispatch(self) -> bytes:
        """The step's entry in the dispatch ledger."""
        return f"{self._base}dispatches/{self._segment}".encode()

    def __str__(self) -> str:
        """Name the step in an error's message."""
        return f"step {self.step_key!r} of run {self.run_id!r}"


def _step_keys(base: str, run_id: str, step_key: str) -> StepKeys:
    """Name a step's keys, once its own was checked."""
    try:
        plain = _SHORT_AND_PLAIN(step_key)
    except TypeError:
        plain = None
    name = step_key if plain else segment(text(step_key, "step_key"))
    return StepKeys(run_id, step_key, f"{base}claims/{name}".encode(), f"{base}steps/{name}".encode(), base, name)


class RunKeys:
    """One run's keys."""

    __slots__ = ("_keyspace", "base", "run_id")

    def __init__(self, keyspace: Keyspace, run_id: str, base: str) -> None:
        self.run_id = run_id
        self._keyspace = keyspace
        self.base = base

    def below(self, part: str) -> bytes:
        """Give the prefix of one part of the run: claims, steps, payloads, attempts or dispatches."""
        return f"{self.base}{part}/".encode()

    @property
    def all(self) -> bytes:
        """The prefix of everything in the run."""
        return self.base.encode()

    @property
    def record(self) -> bytes:
        """The run's own record."""
        return f"{self.base}run".encode()

    @property
    def control(self) -> bytes:
        """What was asked of the run: cancellation, time-out."""
        return f"{self.base}control".encode()

    def step(self, step_key: str) -> StepKeys:
        """Name the keys of one of the run's steps."""
        return _step_keys(self.base, self.run_id, step_key)

    def points_at(self, idempotency: bytes) -> bytes:
        """Name the run's own note of an idempotency key that stands for it, so that both can go together."""
        return self.base.encode() + idempotency.removeprefix(f"{self._keyspace.prefix}/".encode())

    def pointing(self, note: bytes) -> bytes:
        """Name the idempotency key that one of the run's notes is about."""
        return f"{self._keyspace.prefix}/".encode() + note.removeprefix(self.base.encode())

    @property
    def active(self) -> bytes:
        """The run's entry in the index of active runs."""
        return f"{self._keyspace.prefix}/active/{segment(self.run_id)}".encode()


class Keyspace:
    """All keys below one prefix."""

    __slots__ = ("prefix",)

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def run(self, run_id: RunId) -> RunKeys:
        """Name a run's keys, once its id was checked."""
        return RunKeys(self, *self._base(run_id))

    def step(self, run_id: RunId, step_key: str) -> StepKeys:
        """Name a step's keys, once its run's id and its key were checked."""
        try:
            name, base = _base_of(self.prefix, run_id)
        except TypeError:
            name, base = self._base(run_id)
        return _step_keys(base, name, step_key)

    def _base(self, run_id: RunId) -> tuple[str, str]:
        try:
            return _base_of(self.prefix, run_id)
        except TypeError:  # what can't be looked up is no id: say what it is
            run_name(run_id)
            raise

    def session(self, session_id: str) -> bytes:
        """Name a session's key."""
        return f"{self.prefix}/sessions/{segment(session_id)}".encode()

    def idempotency(self, flow_id: RunId, trigger_key: str, idempotency_key: str) -> bytes:
        """Name an idempotency key: trigger and key without regard to case and to space around them."""
        parts = [run_name(flow_id, "flow_id")]
        for value, what in ((trigger_key, "trigger_key"), (idempotency_key, "idempotency_key")):
            parts.append(text(text(value, what).strip().casefold(), f"{what} without the space around it"))
        return f"{self.prefix}/idempotency/{'/'.join(map(segment, parts))}".encode()

    @property
    def sessions(self) -> bytes:
        """The prefix of all live sessions."""
        return f"{self.prefix}/sessions/".encode()

    @property
    def runs(self) -> bytes:
        """The prefix of all runs."""
        return f"{self.prefix}/runs/".encode()

    @property
    def active(self) -> bytes:
        """The prefix of the index of active runs."""
        return f"{self.prefix}/active/".encode()
