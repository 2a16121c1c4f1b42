"""Fixtures that give tests an etcd: the session's shared one, and those with TLS, with users, with three members."""

import functools
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from servers import (
    AuthEtcd,
    ContainerEtcd,
    EtcdCluster,
    EtcdServer,
    NoContainerEngineError,
    TlsEtcd,
    container_engine_answers,
    run_auth_etcd,
    run_tls_etcd,
)
from stepclaim.embedded import EmbeddedEtcd

_KINDS = {"auto": [], "embedded": ["embedded"], "container": ["container"], "both": ["embedded", "container"]}


@functools.cache
def _found() -> str:
    return "container" if container_engine_answers() else "embedded"


def pytest_report_header(config: pytest.Config) -> str:
    """Say where the shared etcd runs."""
    kinds = _KINDS.get(config.getoption("--etcd")) or [_found()]
    return f"etcd: {' and '.join(kinds)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --etcd, which chooses where the shared server runs."""
    parser.addoption(
        "--etcd",
        choices=sorted(_KINDS),
        default=os.environ.get("STEPCLAIM_TEST_SERVER", "auto"),
        help="where the tests' shared etcd runs; auto: in a container where a Docker engine answers, else embedded "
        "[env: STEPCLAIM_TEST_SERVER; default: auto]",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that uses `etcd` once per chosen kind of server."""
    if "etcd" in metafunc.fixturenames:
        kinds = _KINDS.get(metafunc.config.getoption("--etcd"))
        if kinds is None:
            raise pytest.UsageError(f"STEPCLAIM_TEST_SERVER must be one of {', '.join(sorted(_KINDS))}")
        kinds = kinds or [_found()]
        metafunc.parametrize("etcd", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdServer]:
    """One server for the whole session; keep to keys under `prefix`."""
    if request.param == "embedded":
        with EmbeddedEtcd() as server:
            yield server
        return
    try:
        container = ContainerEtcd()
    except NoContainerEngineError as error:
        pytest.skip(str(error))
    yield container
    container.close()


@pytest.fixture
def prefix() -> str:
    """Return a key prefix that no other test has."""
    return f"/t-{uuid.uuid4().hex[:16]}"


@pytest.fixture(scope="session")
def tls_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsEtcd]:
    """Give a server that speaks TLS only and asks for a client's certificate."""
    with run_tls_etcd(tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture(scope="session")
def auth_etcd() -> Iterator[AuthEtcd]:
    """Give a server with users and short-lived tokens."""
    with run_auth_etcd() as server:
        yield server


@pytest.fixture
def three_members() -> Iterator[Callable[..., EtcdCluster]]:
    """Give a function that starts a cluster of three, which ends with the test; arguments as `EtcdCluster`'s."""
    with ExitStack() as clusters:
        yield lambda **options: clusters.enter_context(EtcdCluster(**options))
