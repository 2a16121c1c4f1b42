"""Three members, and what becomes of claims while one is killed, stopped in its tracks, or comes back."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self

import pytest

from fix_stores import AnyStore
from servers import EtcdCluster
from stepclaim import AsyncEtcdRunStore, EtcdRunStore, OutcomeUnknownError, SessionState
from stepclaim.embedded import EmbeddedEtcd

ATTEMPT = 1.0
"""The default attempt_timeout: what a silent member may cost."""
ELECTION = 2.0
"""etcd's election timeout is 1 s; a follower waits for one to two of them before it stands."""
SLACK = 1.0
"""Waits between attempts, and a busy machine."""
ENOUGH = 60
"""Claims that must be decided after a fault."""


OpenBoth = Callable[..., AbstractAsyncContextManager[tuple[AnyStore, AnyStore]]]


@pytest.fixture
def open_both(threads: ThreadPoolExecutor, prefix: str) -> OpenBoth:
    """Give a function that opens a store of each face."""

    @asynccontextmanager
    async def open_stores(endpoints: Any) -> AsyncIterator[tuple[AnyStore, AnyStore]]:
        options: Any = {"prefix": prefix, "lease_ttl": 10}
        connect = functools.partial(EtcdRunStore.connect, endpoints, owner="threads", **options)
        one = await asyncio.to_thread(connect)
        try:
            async with AsyncEtcdRunStore.connect(endpoints, owner="asyncio", **options) as two:
                yield AnyStore(one, threads), AnyStore(two, threads)
        finally:
            await asyncio.to_thread(one.close)

    return open_stores


class Race:
    """Two stores that claim the same steps all the time, what each call said and how long it took."""

    def __init__(self, *stores: AnyStore) -> None:
        self.stores = stores
        self.wins: dict[str, list[str]] = {}
        self.doubts: list[tuple[str, str]] = []
        self.slowest = 0.0
        self.lost = False
        self.uncertain = False
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(name)) for name in ("x", "y", "z")]
        self._tasks.append(asyncio.create_task(self._watch()))
        await self.goes_on()
        self.slowest = 0.0
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def goes_on(self, timeout: float = 12.0) -> None:
        """Wait until many more steps were decided."""
        enough = len(self.wins) + ENOUGH
        deadline = time.monotonic() + timeout
        while len(self.wins) < enough:
            assert time.monotonic() < deadline, f"{len(self.wins)} of {enough} steps were decided in {timeout} s"
            await asyncio.sleep(0.02)

    async def _run(self, name: str) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            key = f"{name}{number}"
            answers = await asyncio.gather(*(self._claim(store, key) for store in self.stores))
            self.wins[key] = [owner for owner in answers if owner]

    async def _claim(self, store: AnyStore, key: str) -> str:
        owner: str = store.session.owner
        begun = time.monotonic()
        try:
            return owner if await store.try_claim_step("r", key) else ""
        except OutcomeUnknownError:
            self.doubts.append((key, owner))
            return ""
        finally:
            self.slowest = max(self.slowest, time.monotonic() - begun)

    async def _watch(self) -> None:
        while not self._stop.is_set():
            for store in self.stores:
                state = store.session.state
                self.uncertain |= state is SessionState.UNCERTAIN
                self.lost |= state is SessionState.LOST
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        """Hold what the calls said against what etcd has."""
        stand = {claim.step_key: claim.owner for claim in await self.stores[0].get_claims("r")}
        for key, owners in self.wins.items():
            said_unknown = {owner for step, owner in self.doubts if step == key}
            assert len(owners) <= 1, f"{key} was granted to {owners}"
            if owners:
                assert stand.get(key) == owners[0], f"{key} was granted to {owners}, etcd says {stand.get(key)}"
            else:
                assert said_unknown, f"nobody got {key}"
                assert key not in stand, "a claim that was told as unknown is taken back"
        assert set(stand) <= set(self.wins)


def in_use(cluster: EtcdCluster, store: AnyStore) -> EmbeddedEtcd:
    endpoint = store.raw._client.members.current.endpoint
    return next(member for member in cluster.members if member.endpoint == endpoint)


def told(what: str, race: Race) -> None:
    print(f"{what}: slowest call {race.slowest:.2f} s, {len(race.wins)} steps, {len(race.doubts)} in doubt")


async def test_every_member_serves(open_both: OpenBoth, three_members: Callable[..., EtcdCluster]) -> None:
    cluster = three_members()
    for endpoints in (*cluster.endpoints, cluster.endpoints, ",".join(reversed(cluster.endpoints))):
        async with open_both(endpoints) as (one, two):
            for store, other in ((one, two), (two, one)):
                key = f"{store.session.owner} {endpoints}"
                claim = await store.claim_step("r", key)
                assert await other.claim_step("r", key) is None
                await store.complete_step(claim, "Succeeded")
                assert (await other.get_step_statuses("r"))[key] == "Succeeded"


@pytest.mark.parametrize("role", ["follower", "leader"])
async def test_the_member_in_use_is_killed(
    open_both: OpenBoth, three_members: Callable[..., EtcdCluster], role: str
) -> None:
    cluster = three_members()
    victim = cluster.leader() if role == "leader" else cluster.followers()[0]
    async with open_both(cluster.endpoints) as stores:
        turn_to(victim, *stores)
        sessions = [store.session for store in stores]
        async with Race(*stores) as race:
            await asyncio.to_thread(victim.kill)
            await race.goes_on()
        told(f"{role} killed", race)
        await race.check()
        assert race.slowest < ATTEMPT + SLACK + (ELECTION if role == "leader" else 0.0)
        assert not race.lost
        for store, session in zip(stores, sessions, strict=True):
            assert store.session is session
            assert in_use(cluster, store) is not victim
            claim = await store.claim_step("after", session.owner)
            await store.complete_step(claim, "Succeeded")


@pytest.mark.parametrize("role", ["follower", "leader"])
async def test_the_member_in_use_stops_in_its_tracks(
    open_both: OpenBoth, three_members: Callable[..., EtcdCluster], role: str
) -> None:
    cluster = three_members()
    victim = cluster.leader() if role == "leader" else cluster.followers()[0]
    async with open_both(cluster.endpoints) as stores:
        turn_to(victim, *stores)
        async with Race(*stores) as race:
            victim.pause()
            try:
                await race.goes_on()
            finally:
                victim.resume()
            await race.goes_on()
        told(f"{role} in use paused", race)
        await race.check()
        # a claim without an answer is settled before it is told: by then another member is in use
        assert race.slowest < ATTEMPT + SLACK + (ELECTION if role == "leader" else 0.0)
        assert not race.lost


async def test_a_member_that_comes_back_is_used_again(
    open_both: OpenBoth, three_members: Callable[..., EtcdCluster]
) -> None:
    cluster = three_members()
    first, second, _ = cluster.members
    async with open_both([first.endpoint, second.endpoint]) as stores:
        async with Race(*stores) as race:
            await asyncio.to_thread(first.kill)
            await race.goes_on()
            assert [in_use(cluster, store) for store in stores] == [second, second]
            await asyncio.to_thread(first.restart)
            await race.goes_on()
            await asyncio.to_thread(second.kill)
            await race.goes_on()
            assert [in_use(cluster, store) for store in stores] == [first, first]
        told("two members killed in turn", race)
        await race.check()
        assert race.slowest < ATTEMPT + ELECTION + SLACK
        assert not race.lost


def turn_to(member: EmbeddedEtcd, *stores: AnyStore) -> None:
    """Have calls and renewals ask this member first."""
    for store in stores:
        for client in (store.raw._client, store.raw._keeper._client):
            endpoints = [each.endpoint for each in client.members.all]
            client.members.current = client.members.all[endpoints.index(member.endpoint)]
