"""What the keys hold: one-line JSON with a version, read strictly, rewritten without losing unknown fields."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from stepclaim.errors import CorruptRecordError
from stepclaim.models import ClaimState, RunStatus, StepStatus  # noqa: TC001 - msgspec reads the annotations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stepclaim._core.ops import KeyValue

VERSION = 1


class Record(Struct, kw_only=True, omit_defaults=True, frozen=True, gc=False):
    """The root of all records."""

    v: int


class SessionRecord(Record, kw_only=True, frozen=True, gc=False):
    """A live worker."""

    owner: str
    host: str
    pod: str | None = None
    pid: int
    version: str
    started_at: datetime


class ClaimRecord(Record, kw_only=True, frozen=True, gc=False):
    """Who holds a step; once sealed, what came of it."""

    state: ClaimState
    owner: str
    session: str = ""
    attempt_id: str
    attempt: int = 0
    claimed_at: datetime
    status: StepStatus | None = None
    sealed_at: datetime | None = None


class StepRow(Record, kw_only=True, frozen=True, gc=False):
    """A step's current attempt, small enough that all of a run's statuses are one range read.

    `write_id` is new with every write, so that a writer whose reply was lost recognises its own.
    """

    status: StepStatus
    type: str = ""
    attempt: int
    token: int | None = None
    owner: str | None = None
    job: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    reason: str | None = None
    payload: bool = False
    retried: bool = False
    """The attempt has its place among the earlier ones already; the row only waits for the next."""
    attempt_id: str = ""
    """The write that began the attempt; stays through all later ones."""
    write_id: str


class StatusOnly(Record, kw_only=True, frozen=True, gc=False):
    """As much of a step's row as its status needs."""

    status: StepStatus


class Payload(Record, kw_only=True, frozen=True, gc=False):
    """The large texts of one attempt."""

    input: str | None = None
    output: str | None = None
    error: str | None = None
    trace: str | None = None


class RunRow(Record, kw_only=True, frozen=True, gc=False):
    """A run's own record."""

    flow_id: str
    flow_name: str
    status: RunStatus
    trigger_key: str
    trigger_data: str | None = None
    job_id: str | None = None
    source_run_id: str | None = None
    started_at: datetime
    completed_at: datetime | None = None
    completions: int = 0
    """How often the run was completed: a retry does not take that back."""
    write_id: str


class ActiveRow(Record, kw_only=True, frozen=True, gc=False):
    """An entry in the index of active runs."""

    started_at: datetime


class ControlRow(Record, kw_only=True, frozen=True, gc=False):
    """What was asked of a run: its limits, its cancellation, its time-out."""

    flow_id: str | None = None
    trigger_key: str | None = None
    idempotency_key: str | None = None
    timeout_at: datetime | None = None
    cancel_requested: bool = False
    cancel_reason: str | None = None
    cancel_requested_at: datetime | None = None
    timed_out_at: datetime | None = None
    cancel_id: str = ""
    timed_out_id: str = ""


class IdempotencyRow(Record, kw_only=True, frozen=True, gc=False):
    """Which run an idempotency key stands for."""

    run_id: str
    registered_at: datetime
    write_id: str


class DispatchRow(Record, kw_only=True, frozen=True, gc=False):
    """An entry in the dispatch ledger."""

    job: str | None = None
    recorded_at: datetime
    due: datetime | None = None
    """A message that was put off: it is not lost before this time."""
    orphan: int | None = None
    """Made by a recovery: the mod revision of the row that it found without a holder."""
    write_id: str


T = TypeVar("T", bound=Record)


class Stored(Struct, Generic[T], frozen=True):
    """A record with the key-value that it was read from."""

    record: T
    kv: KeyValue


_decoders: dict[type[Record], msgspec.json.Decoder[Any]] = {}
_encoder = msgspec.json.Encoder()
encode_new = _encoder.encode
"""Write a record that replaces nothing."""


def decode(kv: KeyValue, kind: type[T]) -> T:
    """Read a record, or say which key at which revision can't be read."""
    try:
        record: T = _decoder(kind)(kv.value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _corrupt(kv, str(error)) from error
    if record.v != VERSION:
        raise _corrupt(kv, f"it has version {record.v}, this stepclaim reads version {VERSION}: use a newer one")
    return record


def decode_each(kvs: Iterable[KeyValue], kind: type[T]) -> list[T]:
    """Read many records of a kind, as `decode` does."""
    read = _decoder(kind)
    try:
        records: list[T] = [read(kv.value) for kv in kvs]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        records = []
    if {record.v for record in records} != {VERSION}:
        return [decode(kv, kind) for kv in kvs]  # which tells the one that can't be read
    return records


def _decoder(kind: type[T]) -> Callable[[bytes], T]:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    read: Callable[[bytes], T] = decoder.decode
    return read


def stored(kv: KeyValue | None, kind: type[T]) -> Stored[T] | None:
    """Read a record together with its revisions; None for a missing key."""
    return None if kv is None else Stored(decode(kv, kind), kv)


def encode(record: Record, onto: KeyValue | None = None) -> bytes:
    """Write a record; fields of the value that it replaces which this version doesn't know are kept."""
    if onto is not None and onto.value:
        unknown = {
            name: value
            for name, value in msgspec.json.decode(onto.value).items()
            if name not in record.__struct_fields__
        }
        if unknown:
            return _encoder.encode(msgspec.to_builtins(record) | unknown)
    return _encoder.encode(record)


def _corrupt(kv: KeyValue, why: str) -> CorruptRecordError:
    key = kv.key.decode(errors="backslashreplace")
    return CorruptRecordError(
        f"the value of {key} at revision {kv.mod_revision} can't be read: {why}; look at it with etcdctl, then mend "
        "or delete it",
        key=key,
        revision=kv.mod_revision,
    )
