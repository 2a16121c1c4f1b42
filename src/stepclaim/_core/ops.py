"""The operations that a program can ask for, as values, and what it is told in reply.

A program is a generator: it yields operations and is sent their replies, so that one text serves threads, asyncio and
the store in memory. `yield from operation` gives the reply with its type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from stepclaim.errors import BackendError

R = TypeVar("R")

Program: TypeAlias = "Generator[Op[Any], Any, R]"


class InDoubt(Exception):  # noqa: N818 - a fact that a program handles, not an error that leaves the package
    """A fenced transaction was sent, and whether it was carried out is not known."""


class Answered(Exception):  # noqa: N818 - likewise
    """A fenced transaction was answered with an error though it may have been carried out; it can't be any more."""

    def __init__(self, error: BackendError) -> None:
        super().__init__(error)
        self.error = error


class Abandoned(Exception):  # noqa: N818 - likewise
    """The caller went away (cancelled, interrupted) while an operation was under way."""


class Compacted(Exception):  # noqa: N818 - likewise
    """A revision that was asked for is no longer kept."""


class KeyValue(Struct, frozen=True, gc=False):
    """One key as etcd gives it."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Event(Struct, frozen=True, gc=False):
    """What one transaction did to one key: its new value, or None where it was removed."""

    key: bytes
    kv: KeyValue | None
    revision: int


class Batch(Struct, frozen=True):
    """Events as a watch gives them: whole revisions, in their order."""

    events: list[Event]


class Compare(Struct, frozen=True, gc=False):
    """One condition of a transaction: the target of the key equals the value; with a range's end, of all its keys.

    `below`: the mod revision is smaller than the value instead.
    """

    key: bytes
    target: Literal["create", "mod", "value"]
    expected: int | bytes
    range_end: bytes = b""
    below: bool = False


class Put(Struct, frozen=True, gc=False):
    """Write a key; without a lease this also takes a lease off it."""

    key: bytes
    value: bytes
    lease: int = 0


class PutOnce(Struct, frozen=True, gc=False):
    """Write a key that must not exist yet; where it does, nothing happens and the rest of the transaction stands."""

    key: bytes
    value: bytes


class Delete(Struct, frozen=True, gc=False):
    """Remove one key, or all keys from it up to the range's end."""

    key: bytes
    range_end: bytes = b""


class Get(Struct, frozen=True, gc=False):
    """Read one key inside of a transaction."""

    key: bytes


Action: TypeAlias = Put | PutOnce | Delete | Get


class Op(Struct, Generic[R], frozen=True, gc=False):
    """An operation knows the type of its reply."""

    def __iter__(self) -> Generator[Op[Any], Any, R]:
        """Let `yield from` hand the operation out and give the reply back."""
        reply: R = yield self
        return reply


class SessionView(Struct, frozen=True, gc=False):
    """The session as a program needs it: who claims, under which lease, behind which barrier."""

    session_id: str
    owner: str
    key: bytes
    value: bytes
    lease: int
    claim_lease: int
    create_revision: int
    mod_revision: int


class TxnReply(Struct, gc=False):
    """What a transaction did. `found` are the answers to the branch's Gets, in their order, None for a missing key.

    `in_doubt`: an earlier attempt at the same transaction was sent and may have been carried out.
    """

    succeeded: bool
    revision: int
    found: tuple[KeyValue | None, ...] = ()
    in_doubt: bool = False
    put: tuple[bool, ...] = ()
    """Of each `PutOnce`, whether it wrote."""
    fence_moved: bool = False
    """Nothing was done or read: the fence had moved on. Begin again behind the new one."""
    barrier: tuple[KeyValue | None, ...] = ()
    """The session key as it stands, where a fence did not hold and showed it."""


class RangeReply(Struct):
    """One page of keys, as of one revision; `count` are all from its first on."""

    kvs: list[KeyValue]
    revision: int
    more: bool
    count: int


class Txn(Op[TxnReply], frozen=True, kw_only=True, gc=False):
    """One transaction: all compares hold, then all of `success`, else all of `failure`.

    With a `fence` it also compares the session's barrier, is never sent twice while its outcome is unknown, and
    raises `InDoubt` into the program instead; it only puts, and where it fails it looks at what it compares.
    """

    compares: tuple[Compare, ...]
    success: tuple[Action, ...]
    failure: tuple[Action, ...] = ()
    fence: SessionView | None = None


class Many(Op[list[TxnReply | Exception]], frozen=True, gc=False):
    """Several transactions, each for itself, that may share; an error stands where its reply would."""

    txns: tuple[Txn, ...]


class Begin(Op[Any], frozen=True, gc=False):
    """Have an operation under way without waiting for it; what is given back is for `Finish`."""

    op: Many | Range


class Finish(Op[Any], frozen=True, gc=False):
    """Wait for the reply to an operation that was begun."""

    begun: Any


class Fence(Op[TxnReply], frozen=True, kw_only=True):
    """Rewrite the session key: every transaction sent behind its old barrier can't be carried out any more.

    Reads `gets` in the same transaction; what they show is final for those transactions.
    """

    session: SessionView
    gets: tuple[Get, ...] = ()


class Range(Op[RangeReply], frozen=True, kw_only=True, gc=False):
    """Read a range of keys, linearizable, or as of an earlier revision.

    With `shared` it may go along with other calls' writes; its reply then tells no revision. With `lazy` what the reply
    gives only looks like key-values: good for reading a field or two of each.
    """

    key: bytes
    range_end: bytes
    limit: int = 0
    revision: int = 0
    keys_only: bool = False
    newest_first: bool = False
    shared: bool = False
    lazy: bool = False


class UntilChanged(Op[None], frozen=True, kw_only=True):
    """Wait until a key was changed after a revision. It may also return early: look again, don't believe it."""

    key: bytes
    revision: int


class OpenSession(Op[SessionView], frozen=True):
    """Ask for the live session; waits for a new one where the last was lost."""


OPEN_SESSION = OpenSession()


class Later(Op[None], frozen=True):
    """Hand a program to the background, where it is begun again until it ends."""

    program: Callable[[], Program[Any]]
    undo: bool = False
    """It takes back what nobody knows of: the lease is not renewed before it is done."""


def prefix_end(prefix: bytes) -> bytes:
    """Give the first key behind all keys that begin with the prefix."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def read_key(key: bytes, *, shared: bool = True) -> Program[KeyValue | None]:
    """Read one key; a large value is better read apart from others' writes."""
    page = yield from Range(key=key, range_end=b"", shared=shared)
    return page.kvs[0] if page.kvs else None


FIRST_PAGE = 100
LARGEST_PAGE = 10_000
PAGE_BYTES = 2_000_000
"""What a page should have, by the page before: values may be small or as large as a store allows."""

SMALL_PAGE = 2000
"""Pages get smaller, so that one is there when the one before is read: reading takes half as long as getting it."""


def read_prefix(prefix: bytes, *, keys_only: bool = False, shared: bool = False) -> Program[list[KeyValue]]:
    """Read all keys below a prefix that ends with a slash, page by page, as of one revision."""
    kvs, _ = yield from read_pages(prefix, lambda kvs: kvs, keys_only=keys_only, shared=shared)
    return kvs


def read_snapshot(prefix: bytes, *, keys_only: bool = False, revision: int = 0) -> Program[tuple[list[KeyValue], int]]:
    """Read all keys below a prefix, and tell the revision that they were read at: the given one, while it is kept."""
    return (yield from read_pages(prefix, lambda kvs: kvs, keys_only=keys_only, revision=revision))


def read_pages(
    prefix: bytes,
    each: Callable[[list[KeyValue]], list[R]],
    *,
    keys_only: bool = False,
    revision: int = 0,
    shared: bool = False,
    first: int = FIRST_PAGE,
    lazy: bool = False,
) -> Program[tuple[list[R], int]]:
    """Read as `read_snapshot` does; `each` makes of a page what is wanted of it, while the next one is under way.

    With `shared` what has but one page may go along with others' writes; it then tells no revision. etcd looks at all
    keys that are left to answer for a page, so few large pages cost it less than many.
    """
    end = prefix_end(prefix)

    def read(start: bytes, limit: int, revision: int, shared: bool) -> Range:
        return Range(
            key=start, range_end=end, limit=limit, revision=revision, keys_only=keys_only, shared=shared, lazy=lazy
        )

    wanted = revision
    while True:
        found: list[R] = []
        start, revision, limit = prefix, wanted, first
        begun: Any = None
        try:
            while True:
                page: RangeReply = yield (begun or read(start, limit, revision, shared))
                revision = revision or page.revision
                if page.more:
                    start = page.kvs[-1].key + b"\0"
                    sample = page.kvs[-FIRST_PAGE:]
                    size = sum(len(kv.key) + len(kv.value) for kv in sample) / len(sample)
                    left = page.count - len(page.kvs)
                    most = min(LARGEST_PAGE, PAGE_BYTES / size)
                    limit = int(max(1, min(most, left if left < 1.5 * SMALL_PAGE else max(SMALL_PAGE, left * 0.6))))
                    begun = Finish((yield Begin(read(start, limit, revision, False))))
                found += each(page.kvs)
                if not page.more:
                    return found, revision
        except Compacted:
            wanted = 0
