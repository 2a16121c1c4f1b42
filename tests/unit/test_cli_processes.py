"""The commands that stay: the container's worker and the development server, as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from servers import eventually
from stepclaim import EtcdRunStore, RunStatus, Settings
from stepclaim.cli import truth
from stepclaim.cli.flow import Flow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import EtcdServer

PROGRAM = "import sys; from stepclaim.cli import main; sys.exit(main())"


@contextmanager
def started(*args: str, output: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with output.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *args],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _end(process: subprocess.Popen[bytes], output: Path) -> str:
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0, output.read_text()
    return output.read_text()


def test_workers_share_the_runs_and_end_in_order(etcd: EtcdServer, prefix: str, tmp_path: Path) -> None:
    """Two workers, no broker: each result counts once, SIGTERM ends with 0 and leaves no session behind."""
    environment = {"STEPCLAIM_ENDPOINTS": etcd.endpoint, "STEPCLAIM_PREFIX": prefix, "STEPCLAIM_LEASE_TTL": "10"}
    health, one, two = tmp_path / "health", tmp_path / "one", tmp_path / "two"
    work = ("worker", "--runs", "3", "--step-seconds", "0.01")
    settings = Settings(endpoints=etcd.endpoint, prefix=prefix)
    runs = ["demo-1", "demo-2", "demo-3"]
    with (
        EtcdRunStore.connect(settings, session=False) as store,
        started(*work, output=one, **environment, STEPCLAIM_HEALTH_FILE=str(health)) as stays,
        started(*work, "--until-done", output=two, **environment) as leaves,
    ):
        since = truth.revision(store)
        assert leaves.wait(60) == 0, two.read_text()
        assert health.exists()
        found = truth.read(store, settings, runs, since)
        assert truth.problems(Flow.default().expected(), RunStatus.SUCCEEDED, found) == []
        log = _end(stays, one)
    assert " ended owner=" in log.splitlines()[-1]
    assert not health.exists()
    assert etcd.etcdctl("get", "--prefix", f"{prefix}/sessions/") == ""


def test_a_worker_that_ends_gives_its_claim_back(etcd: EtcdServer, prefix: str, tmp_path: Path) -> None:
    """SIGTERM in a body: the step is finished, nothing is left held."""
    environment = {"STEPCLAIM_ENDPOINTS": etcd.endpoint, "STEPCLAIM_PREFIX": prefix}
    output = tmp_path / "out"
    with (
        EtcdRunStore.connect(etcd.endpoint, prefix=prefix, session=False) as store,
        started("worker", "--runs", "1", "--step-seconds", "1", output=output, **environment) as process,
    ):
        eventually(lambda: store.get_claimed_step_keys("demo-1"), 20)
        _end(process, output)
        assert store.get_claimed_step_keys("demo-1") == frozenset()
        assert set(store.get_step_statuses("demo-1").values()) == {"Succeeded"}


def test_dev_tells_how_to_reach_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started("dev", "--port", "0", "--data-dir", str(tmp_path / "data"), output=output) as process:
        eventually(lambda: "Ctrl-C ends it" in output.read_text(), 20)
        lines = output.read_text().splitlines()
        (exported,) = (line for line in lines if line.startswith("export STEPCLAIM_ENDPOINTS="))
        endpoint = exported.partition("=")[2]
        with EtcdRunStore.connect(endpoint) as store:
            store.start_run("flow", "flow", "run", "manual")
        (line,) = (line for line in lines if "get --prefix" in line)
        assert '"status":"Running"' in subprocess.run(line.split(), capture_output=True, text=True, check=True).stdout
        _end(process, output)
    assert (tmp_path / "data").exists()


def test_dev_ends_when_its_etcd_does(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started("dev", "--port", "0", output=output) as process:
        eventually(lambda: "Ctrl-C ends it" in output.read_text(), 20)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(15) == 1
    assert "etcd ended by itself" in output.read_text()
