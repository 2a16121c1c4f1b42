"""A client's certificate that ends while its store is open: told clearly, and cured by a store opened anew."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING, Any

import pytest

from faults.cluster import NAMES, Cluster, Options
from faults.nemesis_access import signed
from fix_stores import AnyStore
from servers import eventually
from stepclaim import AsyncEtcdRunStore, AuthenticationError, EtcdRunStore, SessionLostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import ThreadPoolExecutor

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]

LASTS = 4.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Give a cluster that asks for certificates."""
    with Cluster(Options(tls=True)) as cluster:
        yield cluster


class Client:
    """Opens stores of one face with a certificate of its own."""

    def __init__(self, face: Any, cluster: Cluster, threads: ThreadPoolExecutor) -> None:
        self.face, self.cluster, self.threads = face, cluster, threads
        self.files = cluster.folder / f"{face.__name__}.pem", cluster.folder / f"{face.__name__}.key"

    def renew(self, seconds: float) -> dt.datetime:
        """Write a certificate that lasts for so long, and say when it ends."""
        until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
        for path, content in zip(self.files, signed(self.cluster.folder, until), strict=True):
            path.write_bytes(content)
        return until

    async def open(self, owner: str) -> AnyStore:
        """Open a store with the certificate that is there."""
        files = dict(zip(("cert_file", "key_file"), map(str, self.files), strict=True))
        options = self.cluster.connection("A") | files | {"owner": owner, "lease_ttl": 3.0, "timeout": 2.0}
        opening = self.face.connect(**options) if self.face is AsyncEtcdRunStore else None
        store = await opening if opening is not None else await asyncio.to_thread(lambda: self.face.connect(**options))
        return AnyStore(store, self.threads)


@pytest.mark.parametrize("face", [EtcdRunStore, AsyncEtcdRunStore], ids=["threads", "asyncio"])
async def test_a_certificate_that_ends_while_the_store_is_open(
    face: Any, cluster: Cluster, threads: ThreadPoolExecutor
) -> None:
    client, run = Client(face, cluster, threads), face.__name__
    until = client.renew(LASTS)
    store = await client.open("before")
    claim = await store.claim_step(run, "s")
    assert claim is not None
    await asyncio.to_thread(eventually, lambda: dt.datetime.now(dt.UTC) > until, LASTS + 5)
    assert await store.holds(claim), "what is connected stays connected"

    for name in NAMES:
        cluster.links.reset("A", name)
    with pytest.raises(AuthenticationError, match="etcd refuses the client's certificate"):
        await store.holds(claim)
    with pytest.raises(AuthenticationError, match="etcd refuses the client's certificate"):
        await client.open("with the same")
    client.renew(600)
    with pytest.raises(AuthenticationError):
        await store.holds(claim)  # the files were read when it was opened

    after = await client.open("after")
    again = await after.wait_for_step(run, "s", timeout=10)
    assert again.fencing_token > claim.fencing_token, "the lease of the claim before ended"
    await asyncio.to_thread(eventually, store.session.lost.is_set, 5)
    with pytest.raises(SessionLostError):
        await store.claim_step(run, "t")
    await after.close()
    await store.close()
