"""`claim.guard()`: the claim's compare in a transaction of the user's own."""

import pickle
from collections.abc import Iterator
from typing import Any

import etcd3
import grpc
import pytest
from etcd3 import etcdrpc

from servers import EtcdServer
from stepclaim import EtcdRunStore


@pytest.fixture
def store(etcd: EtcdServer, prefix: str) -> Iterator[EtcdRunStore]:
    with EtcdRunStore.connect(etcd.endpoint, prefix=prefix) as opened:
        yield opened


@pytest.fixture
def client(etcd: EtcdServer) -> Iterator[Any]:
    host, port = etcd.endpoint.split(":")
    with etcd3.client(host=host, port=int(port)) as opened:
        yield opened


def test_it_holds_while_the_claim_is_held(store: EtcdRunStore, client: Any, prefix: str) -> None:
    claim = store.claim_step("r", "a/b")
    assert claim is not None
    claim = pickle.loads(pickle.dumps(claim))  # noqa: S301 - our own bytes

    def write(value: str) -> bool:
        put = client.transactions.put(f"{prefix}/mine", value)
        written, _ = client.transaction(compare=[claim.guard()], success=[put], failure=[])
        return bool(written)

    assert write("1") is True
    store.complete_step(claim, "Succeeded")
    assert write("2") is False
    store.release_step_claim("r", "a/b")
    assert write("3") is False
    again = store.claim_step("r", "a/b")
    assert again is not None
    assert write("4") is False
    assert client.get(f"{prefix}/mine")[0] == b"1"


def test_it_serves_etcds_own_messages(store: EtcdRunStore, etcd: EtcdServer, prefix: str) -> None:
    claim = store.claim_step("r", "a")
    assert claim is not None
    request = etcdrpc.TxnRequest(compare=[claim.guard().build_message()])
    with grpc.insecure_channel(etcd.endpoint) as channel:
        assert etcdrpc.KVStub(channel).Txn(request, timeout=5).succeeded is True
        store.release_claim(claim)
        assert etcdrpc.KVStub(channel).Txn(request, timeout=5).succeeded is False
    assert prefix == claim.prefix
