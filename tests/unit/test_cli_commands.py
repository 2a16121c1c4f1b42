"""The commands that look: their tables, their JSON, and how they tell what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from stepclaim import EtcdRunStore, RunStatus, Settings, StepStatus
from stepclaim._core.ops import prefix_end
from stepclaim._etcd.client import Client
from stepclaim._etcd.watch import stream
from stepclaim.cli import looking
from stepclaim.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typer.testing import Result

    from servers import EtcdServer


class Cluster:
    """A prefix with two runs, and the command line pointed at it by the environment."""

    def __init__(self, etcd: EtcdServer, prefix: str) -> None:
        self.prefix = prefix
        self.etcd = etcd
        self.store = EtcdRunStore.connect(etcd.endpoint, prefix=prefix, owner="worker-7", lease_ttl=20)
        self.store.start_run("flow", "first [red]flow", "old", "manual")
        claim = self.store.claim_step("old", "a")
        assert claim
        self.store.complete_step(claim, StepStatus.FAILED, error="Traceback:\n  no luck")
        self.store.complete_run("old", RunStatus.FAILED)
        self.store.start_run("flow", "second", "new", "webhook")
        assert self.store.claim_step("new", "s/1")

    def call(self, *args: str, code: int = 0, **environment: str) -> Result:
        shown = {"STEPCLAIM_ENDPOINTS": self.etcd.endpoint, "STEPCLAIM_PREFIX": self.prefix, "COLUMNS": "80"}
        result = CliRunner().invoke(app, list(args), env=shown | environment, catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    def json(self, *args: str) -> Any:
        return json.loads(self.call(*args, "--json").stdout)


@pytest.fixture
def cluster(etcd: EtcdServer, prefix: str) -> Iterator[Cluster]:
    made = Cluster(etcd, prefix)
    yield made
    made.store.close()


def test_runs(cluster: Cluster) -> None:
    lines = cluster.call("runs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "new", "old"]
    assert "first [red]flow" in lines[2]
    assert [line.split()[0] for line in cluster.call("runs", "--active").stdout.splitlines()] == ["run", "new"]
    limited = cluster.call("runs", "--limit", "1")
    assert "1 more" in limited.stderr


def test_runs_as_json(cluster: Cluster) -> None:
    found = cluster.json("runs")
    assert found["total"] == 2
    newest = found["runs"][0]
    assert set(newest) == {
        "run_id", "flow_id", "flow_name", "status", "trigger_key", "trigger_data_json", "job_id", "source_run_id",
        "started_at", "completed_at",
    }  # fmt: skip
    assert (newest["run_id"], newest["status"], newest["completed_at"]) == ("new", "Running", None)
    assert datetime.fromisoformat(newest["started_at"]).tzinfo is not None


def test_show(cluster: Cluster) -> None:
    output = cluster.call("show", "old").stdout
    assert "Failed" in output
    assert "no luck" in output
    assert "Traceback" not in output
    found = cluster.json("show", "old")
    assert found["run"]["steps"][0]["attempts"][0]["error"] == "Traceback:\n  no luck"
    assert (found["claims"][0]["state"], found["claims"][0]["status"]) == ("sealed", "Failed")


def test_show_tells_of_a_step_that_nobody_holds(cluster: Cluster) -> None:
    assert "nobody holds it" not in cluster.call("show", "new").stdout
    cluster.store.release_step_claim("new", "s/1")
    assert "nobody holds it" in cluster.call("show", "new").stdout


def test_claims(cluster: Cluster) -> None:
    found = cluster.json("claims")["claims"]
    assert [(claim["run_id"], claim["step_key"], claim["state"]) for claim in found] == [
        ("new", "s/1", "held"),
        ("old", "a", "sealed"),
    ]
    assert found[0]["lease_id"] == f"{cluster.store.session.lease_id:x}"
    (held,) = cluster.json("claims", "--held")["claims"]
    assert held["owner"] == "worker-7"
    assert cluster.json("claims", "old", "--held") == {"claims": []}
    table = cluster.call("claims", "new").stdout.splitlines()
    assert table[1].split()[:3] == ["s/1", "held", "worker-7"]


def test_release(cluster: Cluster) -> None:
    assert "held by worker-7" in cluster.call("release", "new", "s/1").stdout
    assert cluster.store.get_claim("new", "s/1") is None
    assert "no claim" in cluster.call("release", "new", "s/1").stdout
    assert "sealed as Failed" in cluster.call("release", "old", "a", "--yes").stdout
    assert cluster.json("release", "new", "s/1") == {
        "run_id": "new", "step_key": "s/1", "released": False, "claim": None,
    }  # fmt: skip


def test_release_asks_on_a_terminal(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "_is_terminal", lambda: True)
    environment = {"STEPCLAIM_ENDPOINTS": cluster.etcd.endpoint, "STEPCLAIM_PREFIX": cluster.prefix}
    arguments = ["release", "new", "s/1"]
    refused = CliRunner().invoke(app, arguments, env=environment, input="n\n")
    assert refused.exit_code == 1
    assert "held by worker-7" in refused.stderr
    assert cluster.store.get_claim("new", "s/1")
    assert CliRunner().invoke(app, arguments, env=environment, input="y\n").exit_code == 0
    assert cluster.store.get_claim("new", "s/1") is None


def test_looking_writes_nothing(cluster: Cluster) -> None:
    def put(name: str) -> bytes:
        key = f"{cluster.prefix}/{name}"
        cluster.etcd.etcdctl("put", key, "x")
        return key.encode()

    before, began = put("before"), time.monotonic()
    for command in (["runs"], ["show", "old"], ["claims"], ["claims", "old"]):
        cluster.call(*command)
    after = put("after")
    # what etcd itself recorded below the prefix between the two: others use the server, too
    client = Client(Settings.resolve(cluster.etcd.endpoint, {}))
    prefix = f"{cluster.prefix}/".encode()
    written: list[bytes] = []
    for batch in stream(client, prefix, prefix_end(prefix), 1, began + 60):
        written += [event.key for event in batch.events]
        if after in written:
            break
    client.close()
    assert written[written.index(before) :] == [before, after]


@pytest.mark.parametrize("command", [["show", "nope"], ["claims", "nope"], ["release", "nope", "a"]])
def test_an_unknown_run_is_one_sentence(cluster: Cluster, command: list[str]) -> None:
    result = cluster.call(*command, code=1)
    assert result.stderr == f"stepclaim: there is no run 'nope' under {cluster.prefix}\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["runs", "--endpoints", "127.0.0.1:1", "--timeout", "1"], 1, "127.0.0.1:1"),
        (["runs", "--endpoints", "nonsense:x"], 2, "nonsense:x"),
        (["runs", "--timeout", "soon"], 2, "timeout"),
        (["runs", "--user", "somebody"], 2, "user and password"),
        (["release", "old", "x" * 1001], 2, "1001 bytes"),
        (["demo", "--workers", "2"], 2, "--workers"),
        (["demo", "--lease-ttl", "none"], 2, "--lease-ttl"),
        (["demo", "/no/such/flow.json"], 2, "/no/such/flow.json"),
    ],
)
def test_what_is_wrong_is_one_sentence(cluster: Cluster, command: list[str], code: int, said: str) -> None:
    result = cluster.call(*command, code=code)
    assert result.stderr.startswith("stepclaim: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_a_corrupt_record_is_named(cluster: Cluster) -> None:
    cluster.etcd.etcdctl("put", f"{cluster.prefix}/runs/old/run", "{")
    assert "runs/old/run" in cluster.call("runs", code=1).stderr


def test_every_option_has_a_twin_in_the_environment() -> None:
    for command in ("demo", "dev", "worker", "healthy", "runs", "show", "claims", "release"):
        output = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).stdout
        options = re.findall(r"^\W*(--(?!help)[a-z-]+.*)$", output, re.MULTILINE)
        assert options, command
        assert [line for line in options if "STEPCLAIM_" not in line] == [], command


def test_settings_in_the_help_are_those_of_the_store() -> None:
    output = CliRunner().invoke(app, ["worker", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).stdout
    assert [name for name in Settings.model_fields if f"STEPCLAIM_{name.upper()}" not in output] == []


def test_healthy(tmp_path: Path) -> None:
    file = tmp_path / "health"

    def ask(max_age: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["healthy", "--file", str(file), "--max-age", max_age])
        return result.exit_code, result.output

    assert ask("15") == (1, f"stepclaim: not healthy: {file} can't be read: No such file or directory\n")
    file.touch()
    assert ask("15")[0] == 0
    os.utime(file, (0, time.time() - 60))
    code, said = ask("15")
    assert (code, "60 s ago" in said) == (1, True)
    assert ask("90")[0] == 0


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from stepclaim.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"stepclaim's commands need {missing}: pip install 'stepclaim[cli]'\n"
