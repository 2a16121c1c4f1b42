"""The session: renewed while it can be, uncertain when it can't, lost in time, and followed by another."""

import asyncio
import threading
import time
from typing import Any

import pytest

from proxy import EtcdProxy
from servers import EtcdServer, eventually
from stepclaim import AsyncEtcdRunStore, ClaimLostError, EtcdRunStore, SessionLostError, SessionState
from stepclaim.session import Session


def session_keys(etcd: EtcdServer, prefix: str) -> list[str]:
    return etcd.etcdctl("get", "--prefix", f"{prefix}/sessions/", "--keys-only").split()


def revoke(etcd: EtcdServer, session: Session) -> None:
    etcd.etcdctl("lease", "revoke", f"{session.lease_id:x}")


def test_a_session_is_leased_and_registered_in_both_modes(etcd: EtcdServer, prefix: str) -> None:
    for ttl in (5, None):
        with EtcdRunStore.connect(etcd.endpoint, prefix=prefix, owner="w", lease_ttl=ttl) as store:
            session = store.session
            assert (session.owner, session.state) == ("w", SessionState.ACTIVE)
            assert session_keys(etcd, prefix) == [f"{prefix}/sessions/{session.session_id}"]
            assert 0 < session.expires_in() <= (ttl or 30)
        assert session_keys(etcd, prefix) == []
        assert session.state is SessionState.ACTIVE or session.expires_in() >= 0


def test_renewal_keeps_it_past_its_ttl(etcd: EtcdServer, prefix: str) -> None:
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=2) as store:
        claim = store.claim_step("r", "a")
        assert claim is not None
        ends = time.monotonic() + 5
        eventually(lambda: time.monotonic() > ends, 6)
        assert store.session.state is SessionState.ACTIVE
        assert store.holds(claim)


async def test_a_busy_event_loop_does_not_starve_the_renewal(etcd: EtcdServer, prefix: str) -> None:
    async with AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=2) as store:
        claim = await store.claim_step("r", "a")
        assert claim is not None
        ends = time.monotonic() + 4
        while time.monotonic() < ends:
            sum(range(1000))  # the loop gets no turn
        assert store.session.state is SessionState.ACTIVE
        assert await store.holds(claim)


def test_cut_off_it_is_uncertain_then_lost_then_replaced(etcd: EtcdServer, prefix: str, proxy: EtcdProxy) -> None:
    lost: list[Session] = []
    with EtcdRunStore.connect(proxy.endpoint, prefix=prefix, lease_ttl=3, timeout=2) as store:
        first = store.session
        first.on_lost(lost.append)
        claim = store.claim_step("r", "a")
        assert claim is not None
        proxy.blackhole(True)
        proxy.cut_all()
        eventually(lambda: first.state is SessionState.UNCERTAIN, 4)
        assert not first.lost.is_set()
        eventually(first.lost.is_set, 5)
        assert first.state is SessionState.LOST
        assert first.expires_in() == 0
        # etcd did not end it before this worker knew
        with pytest.raises(SessionLostError):
            store.claim_step("r", "b")
        proxy.blackhole(False)
        proxy.cut_all()
        healed = time.monotonic()
        again = eventually(lambda: store.claim_step("r", "b"), 10)
        print(f"works again {time.monotonic() - healed:.2f} s after the way was free")
        assert again is not None
        assert store.session is not first
        assert store.session.state is SessionState.ACTIVE
        assert lost == [first]
        eventually(lambda: store.get_claim("r", "a") is None, 5)
        with pytest.raises(ClaimLostError):
            store.complete_step(claim, "Succeeded")
        revoke(etcd, store.session)
        eventually(lambda: len(lost) == 2, 5)


@pytest.mark.parametrize("ttl", [20, None])
def test_a_revoked_lease_is_noticed_by_the_next_claim(etcd: EtcdServer, prefix: str, ttl: int | None) -> None:
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=ttl) as store:
        first = store.session
        held = store.claim_step("r", "held")
        assert held is not None
        revoke(etcd, first)
        claim = store.claim_step("r", "a")
        assert claim is not None
        assert first.lost.is_set()
        assert store.session is not first
        assert store.holds(claim)
        assert store.holds(held) is (ttl is None)


async def test_asyncio_hears_of_the_loss_in_its_loop(etcd: EtcdServer, prefix: str) -> None:
    async with AsyncEtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=2) as store:
        session = store.session
        heard: list[Any] = []
        session.on_lost(lambda which: heard.append((which, threading.current_thread())))
        session.on_lost(lambda _: 1 / 0)  # what a callback raises harms nobody
        revoke(etcd, session)
        await asyncio.wait_for(session.lost.wait(), 5)
        await asyncio.sleep(0)
        assert heard == [(session, threading.main_thread())]
        assert (await store.claim_step("r", "a")) is not None


def test_an_own_session_id_even_for_the_same_owner(etcd: EtcdServer, prefix: str) -> None:
    with (
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix, owner="pod-0") as one,
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix, owner="pod-0") as two,
    ):
        assert one.session.session_id != two.session.session_id
        assert one.try_claim_step("r", "a") is True
        assert two.try_claim_step("r", "a") is False
