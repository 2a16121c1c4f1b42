"""One caller: `try_claim_step` against a bare stub's transaction, call by call: `python -m tests.benchmarks.alone`."""

import argparse
import json
import statistics
import time
import uuid

import grpc
from etcd3 import etcdrpc

from stepclaim import EtcdRunStore
from stepclaim.embedded import EmbeddedEtcd


def measure(endpoint: str, calls: int, warm_up: int) -> dict[str, float]:
    """Time each call of both, taking turns, and give the medians in milliseconds and their ratio."""
    channel = grpc.insecure_channel(endpoint)
    txn = etcdrpc.KVStub(channel).Txn
    lease = etcdrpc.LeaseStub(channel).LeaseGrant(etcdrpc.LeaseGrantRequest(TTL=600)).ID
    value = b'{"v":1,"state":"held","owner":"bench","session":"bench-0000","attempt_id":"' + b"0" * 18 + b'"}'

    def bare(key: bytes) -> bool:
        compare = etcdrpc.Compare(
            result=etcdrpc.Compare.EQUAL, target=etcdrpc.Compare.CREATE, key=key, create_revision=0
        )
        put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=value, lease=lease))
        get = etcdrpc.RequestOp(request_range=etcdrpc.RangeRequest(key=key))
        answer = txn(etcdrpc.TxnRequest(compare=[compare], success=[put], failure=[get]), timeout=10)
        return bool(answer.succeeded)

    run = uuid.uuid4().hex
    ours: list[float] = []
    theirs: list[float] = []
    with EtcdRunStore.connect(endpoint, lease_ttl=600) as store, channel:
        for number in range(warm_up + calls):
            began = time.perf_counter()
            won = store.try_claim_step(run, f"step-{number}")
            middle = time.perf_counter()
            also = bare(f"/bare/runs/{run}/claims/step-{number}".encode())
            ended = time.perf_counter()
            assert won
            assert also
            if number >= warm_up:
                ours.append(middle - began)
                theirs.append(ended - middle)
    mine, bare_stub = statistics.median(ours) * 1000, statistics.median(theirs) * 1000
    return {
        "try_claim_step_ms": round(mine, 3),
        "bare_stub_ms": round(bare_stub, 3),
        "ratio": round(mine / bare_stub, 3),
    }


def main() -> None:
    """Measure on an etcd of our own, with fsync, and print one line of JSON a round and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ratios = []
    with EmbeddedEtcd() as etcd:
        for _ in range(options.rounds):
            figures = measure(etcd.endpoint, options.calls, warm_up=100)
            ratios.append(figures["ratio"])
            print(json.dumps(figures), flush=True)
    print(json.dumps({"median_ratio": statistics.median(ratios), "calls_a_round": options.calls}))


if __name__ == "__main__":
    main()
