"""The faults' proxy: what it shows was called, and that a fault does what its name says to a real etcd."""

import itertools
from collections.abc import Iterator

import grpc
import pytest
from etcd3.etcdrpc import (
    KVStub,
    LeaseGrantRequest,
    LeaseKeepAliveRequest,
    LeaseStub,
    PutRequest,
    RangeRequest,
    TxnRequest,
    WatchCreateRequest,
    WatchRequest,
    WatchStub,
)

from proxy import EtcdProxy
from servers import EtcdServer, eventually


@pytest.fixture
def proxy(etcd: EtcdServer) -> Iterator[EtcdProxy]:
    """Give a proxy before the shared server."""
    with EtcdProxy(etcd.endpoint) as running:
        yield running


@pytest.fixture
def channel(proxy: EtcdProxy) -> Iterator[grpc.Channel]:
    """Give a channel through the proxy, which dials again quickly."""
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50)]
    with grpc.insecure_channel(proxy.endpoint, [*options, ("grpc.use_local_subchannel_pool", 1)]) as opened:
        yield opened


def value(etcd: EtcdServer, key: str) -> str:
    """Read a key past the proxy."""
    return etcd.etcdctl("get", key, "--print-value-only").strip()


def put(channel: grpc.Channel, key: str, text: str, timeout: float = 5.0) -> None:
    """Put through the proxy."""
    KVStub(channel).Put(PutRequest(key=key.encode(), value=text.encode()), timeout=timeout)


def get(channel: grpc.Channel, key: str, timeout: float = 5.0) -> bytes:
    """Read through the proxy, waiting for a connection if there is none."""
    reply = KVStub(channel).Range(RangeRequest(key=key.encode()), timeout=timeout, wait_for_ready=True)
    return bytes(reply.kvs[0].value)


def test_calls_are_seen_in_order_with_their_requests(proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """Short names; the first message can be parsed."""
    put(channel, prefix, "one")
    get(channel, prefix)
    KVStub(channel).Txn(TxnRequest(), timeout=5)
    assert [call.method for call in proxy.calls] == ["Put", "Range", "Txn"]
    assert PutRequest.FromString(proxy.calls[0].request).value == b"one"
    assert (proxy.count(), proxy.count("Range")) == (3, 1)
    proxy.reset_calls()
    assert proxy.count() == 0


def test_large_messages_pass(proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """Over many frames and past the first flow control window."""
    text = "x" * 1_000_000
    put(channel, prefix, text)
    assert get(channel, prefix) == text.encode()
    assert len(proxy.calls[0].request) > len(text)


def test_long_headers_pass_and_are_read(proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """Over CONTINUATION frames, and again through the rewriting of a held call."""
    long = (("long", "x" * 40_000),)
    request = PutRequest(key=prefix.encode(), value=b"one")
    KVStub(channel).Put(request, timeout=5, metadata=long)
    fault = proxy.hold_request("Put")
    pending = KVStub(channel).Put.future(request, timeout=5, metadata=long)
    assert fault.happened.wait(5)
    proxy.let_go()
    pending.result()
    assert [call.method for call in proxy.calls] == ["Put", "Put"]


def test_a_cut_reply_was_committed(etcd: EtcdServer, proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """The client sees its connection break; etcd has done it; the next call is well."""
    put(channel, prefix, "one")
    fault = proxy.drop_reply("Put", nth=2)
    put(channel, prefix, "two")
    with pytest.raises(grpc.RpcError) as caught:
        put(channel, prefix, "three")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert fault.happened.is_set()
    assert value(etcd, prefix) == "three"
    assert get(channel, prefix) == b"three"


def test_a_silenced_reply_was_committed_and_others_go_on(
    etcd: EtcdServer, proxy: EtcdProxy, channel: grpc.Channel, prefix: str
) -> None:
    """The client waits for its deadline, and meanwhile and afterwards its connection works."""
    fault = proxy.drop_reply("Put", how="silence")
    silenced = KVStub(channel).Put.future(PutRequest(key=prefix.encode(), value=b"one"), timeout=1)
    assert fault.happened.wait(5)
    assert value(etcd, prefix) == "one"
    assert get(channel, prefix) == b"one"
    assert not silenced.done()
    assert silenced.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for number in range(50):
        put(channel, f"{prefix}/{number}", "more")
    assert get(channel, f"{prefix}/49") == b"more"


def test_large_silenced_replies_do_not_use_up_the_window(proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """The client never sees those bytes, so the proxy gives them back."""
    text = "x" * 1_000_000
    put(channel, prefix, text)
    for _ in range(3):
        fault = proxy.drop_reply("Range", how="silence")
        pending = KVStub(channel).Range.future(RangeRequest(key=prefix.encode()), timeout=5)
        assert fault.happened.wait(5)
        pending.cancel()
    assert get(channel, prefix) == text.encode()


def test_a_held_request_commits_late(etcd: EtcdServer, proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """After its client gave up, and after later calls on the same connection."""
    put(channel, prefix, "before")
    fault = proxy.hold_request("Put")
    with pytest.raises(grpc.RpcError) as caught:
        put(channel, prefix, "late", timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert fault.happened.is_set()
    put(channel, f"{prefix}/other", "meanwhile")
    assert value(etcd, prefix) == "before"
    proxy.let_go()
    assert value(etcd, prefix) == "late"
    assert fault.call is not None
    assert fault.call.answered.is_set()
    assert get(channel, prefix) == b"late"


@pytest.mark.parametrize("how", ["closed", "cut"])
def test_a_held_request_outlives_its_connection(etcd: EtcdServer, proxy: EtcdProxy, prefix: str, how: str) -> None:
    """Its client is gone altogether, by its own will or by ours."""
    etcd.etcdctl("put", prefix, "before")
    fault = proxy.hold_request("Put")
    with grpc.insecure_channel(proxy.endpoint) as channel:
        pending = KVStub(channel).Put.future(PutRequest(key=prefix.encode(), value=b"late"), timeout=5)
        assert fault.happened.wait(5)
        if how == "cut":
            proxy.cut_all()
            assert pending.exception() is not None
    assert pending.done()
    assert value(etcd, prefix) == "before"
    proxy.let_go()
    assert value(etcd, prefix) == "late"


def test_a_stream_can_be_silenced(proxy: EtcdProxy, channel: grpc.Channel) -> None:
    """A renewal reaches etcd, and its answer nobody."""
    lease = LeaseStub(channel).LeaseGrant(LeaseGrantRequest(TTL=60), timeout=5).ID
    fault = proxy.drop_reply("LeaseKeepAlive", how="silence")
    silenced = LeaseStub(channel).LeaseKeepAlive(iter([LeaseKeepAliveRequest(ID=lease)]), timeout=0.5)
    with pytest.raises(grpc.RpcError) as caught:
        next(silenced)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert fault.happened.is_set()
    renewals = LeaseStub(channel).LeaseKeepAlive(itertools.repeat(LeaseKeepAliveRequest(ID=lease), 2), timeout=5)
    assert [reply.TTL for reply in renewals] == [60, 60]
    assert [len(call.requests) for call in proxy.calls if call.method == "LeaseKeepAlive"] == [1, 2]


def test_cut_all_breaks_calls_and_streams(proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """And new connections are welcome at once."""
    put(channel, prefix, "one")
    request = WatchRequest(create_request=WatchCreateRequest(key=prefix.encode()))
    events = WatchStub(channel).Watch(iter([request]), timeout=10)
    next(events)
    proxy.cut_all()
    with pytest.raises(grpc.RpcError) as caught:
        next(events)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert get(channel, prefix) == b"one"


def test_a_black_hole_swallows_and_gives_back(
    etcd: EtcdServer, proxy: EtcdProxy, channel: grpc.Channel, prefix: str
) -> None:
    """Nothing is refused and nothing answered; afterwards what waited arrives."""
    put(channel, prefix, "before")
    proxy.blackhole(True)
    pending = KVStub(channel).Put.future(PutRequest(key=prefix.encode(), value=b"after"), timeout=10)
    with pytest.raises(grpc.RpcError) as caught:
        get(channel, prefix, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert value(etcd, prefix) == "before"
    proxy.blackhole(False)
    pending.result()
    assert value(etcd, prefix) == "after"


def test_refusing_is_for_new_connections(proxy: EtcdProxy, channel: grpc.Channel, prefix: str) -> None:
    """Those that stand go on."""
    put(channel, prefix, "one")
    proxy.refuse(True)
    assert get(channel, prefix) == b"one"
    with grpc.insecure_channel(proxy.endpoint) as other, pytest.raises(grpc.RpcError) as caught:
        put(other, prefix, "two")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    proxy.refuse(False)
    with grpc.insecure_channel(proxy.endpoint) as other:
        put(other, prefix, "three")
    assert get(channel, prefix) == b"three"


def test_a_proxy_before_nothing_closes_connections() -> None:
    """As a load balancer without a server behind it."""
    with EtcdProxy("127.0.0.1:1") as proxy, grpc.insecure_channel(proxy.endpoint) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            put(channel, "/a", "b", timeout=1)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert eventually(lambda: proxy.count() == 0)
