"""The demo as a user runs it: its exit status and its report, with a worker killed and another one stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from servers import AuthEtcd, EtcdServer, TlsEtcd

PROGRAM = "import sys; from stepclaim.cli import main; sys.exit(main())"


def _run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STEPCLAIM_")}
    command = [sys.executable, "-c", PROGRAM, "demo", *args]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120, check=False)


def _report(*args: str, **environment: str) -> Any:
    done = _run(*args, "--json", **environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_demo_with_its_kill_on_the_embedded_etcd() -> None:
    report = _report()
    assert report["ok"] is True
    assert report["problems"] == report["notes"] == []
    assert report["run_statuses"] == {"Succeeded": 20}
    assert len(report["runs"]) == 20
    assert report["steps_expected"] == report["steps_committed"] == 200
    # one body began in the worker that was killed and one in the stopped one: those two steps were begun twice
    assert report["attempts"] == 200 + len(report["takeovers"])
    assert 202 <= report["bodies"] <= report["attempts"]
    kill, stop = report["victims"]
    assert (kill["how"], stop["how"]) == ("kill", "stop")
    assert kill["worker"] != stop["worker"]
    taken = {each["after"]: each for each in report["takeovers"]}
    assert {"kill", "stop"} <= set(taken)  # on a machine that stands still for a while a lease may end by itself, too
    for victim in (kill, stop):
        takeover = taken[victim["how"]]
        assert (takeover["run_id"], takeover["step_key"]) == (victim["run_id"], victim["step_key"])
        assert takeover["from_token"] == victim["token"] < takeover["to_token"]
        assert takeover["from_owner"] == victim["worker"] != takeover["to_owner"]
        assert takeover["seconds"] < report["lease_ttl"] + 5
    assert report["stale_results_refused"] >= 1
    assert stop["refused"] is True
    delivered = report["delivered"]
    assert delivered["messages"] == 200
    assert report["duplicates_refused"] == delivered["duplicates_refused_final"] + delivered["duplicates_refused_held"]
    assert 150 <= report["duplicates_refused"] <= 200
    assert report["rpcs_counted_by"] == "etcd"
    assert 2 < report["rpcs_per_step"] < 20
    assert report["etcdctl"].endswith(" get --prefix /stepclaim/")


def test_demo_of_another_flow_on_a_running_etcd(etcd: EtcdServer, tmp_path: Path) -> None:
    """With a branch that is skipped, without a kill; the keys stay under a prefix of their own."""
    flow = tmp_path / "flow.json"
    steps = {"a": [], "x.1": ["a"], "x.10": ["a"], "mend": {"after": {"a": ["Failed"]}}, "end": ["x.1", "x.10"]}
    flow.write_text(json.dumps({"name": "branches", "steps": steps}), encoding="utf-8")
    report = _report(
        str(flow), "--no-kill", "--workers", "2", "--runs", "3", "--lease-ttl", "20", STEPCLAIM_ENDPOINTS=etcd.endpoint
    )
    assert report["flow"] == "branches"
    assert (report["bodies"], report["attempts"], report["steps_committed"]) == (12, 12, 15)
    assert report["runs"][0]["steps"]["mend"] == "Skipped"
    assert report["prefix"].startswith("/stepclaim-demo-")
    assert report["takeovers"] == report["victims"] == []
    assert etcd.etcdctl("get", "--prefix", "--keys-only", f"{report['prefix']}/runs/").count("/steps/mend") == 3


def test_table_fits_80_columns(etcd: EtcdServer) -> None:
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}
    done = _run("--no-kill", "--workers", "2", "--runs", "1", STEPCLAIM_ENDPOINTS=etcd.endpoint, **terminal)
    assert done.returncode == 0, done.stderr
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    table = output.partition("the keys")[0]
    assert max(map(len, table.splitlines())) <= 80
    for row in ("runs", "steps", "bodies that ran", "duplicate deliveries refused", "takeovers after the kill",
                "stale results refused", "RPCs a step", "elapsed"):  # fmt: skip
        assert row in table
    assert "10 of 10 results committed exactly once" in table
    assert output.rstrip().splitlines()[-1].startswith("etcdctl --endpoints=")


def test_a_run_that_did_not_succeed_is_exit_status_1(etcd: EtcdServer, tmp_path: Path) -> None:
    """A flow of which nothing is left but skipped leaves: the run is Skipped, and the demo says so."""
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps({"steps": {"a": [], "b": {"after": {"a": ["Failed"]}}}}), encoding="utf-8")
    done = _run(str(flow), "--no-kill", "--workers", "2", "--runs", "1", STEPCLAIM_ENDPOINTS=etcd.endpoint)
    assert done.returncode == 1
    assert "is Skipped, not Succeeded" in done.stdout


def test_demo_with_tls(tls_etcd: TlsEtcd) -> None:
    """Where etcd's metrics can't be asked for without its certificates, the workers count their own calls."""
    files = tls_etcd.files
    environment = {
        "STEPCLAIM_ENDPOINTS": tls_etcd.endpoint,
        "STEPCLAIM_CA_FILE": str(files.ca),
        "STEPCLAIM_CERT_FILE": str(files.client_cert),
        "STEPCLAIM_KEY_FILE": str(files.client_key),
    }
    report = _report("--no-kill", "--workers", "2", "--runs", "1", **environment)
    assert report["rpcs_counted_by"] == "workers"
    assert report["rpcs_per_step"] > 2


def test_demo_as_a_user_of_etcd(auth_etcd: AuthEtcd) -> None:
    report = _report(
        "--no-kill", "--workers", "2", "--runs", "1", f"--prefix={auth_etcd.prefix}demo",
        STEPCLAIM_ENDPOINTS=auth_etcd.endpoint, STEPCLAIM_USER=auth_etcd.user, STEPCLAIM_PASSWORD=auth_etcd.password,
    )  # fmt: skip
    assert report["steps_committed"] == 10
    refused = _run(
        "--no-kill", "--prefix=/elsewhere", STEPCLAIM_ENDPOINTS=auth_etcd.endpoint, STEPCLAIM_USER=auth_etcd.user,
        STEPCLAIM_PASSWORD=auth_etcd.password,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "/elsewhere" not in refused.stdout
    assert refused.stderr.count("\n") == 1
