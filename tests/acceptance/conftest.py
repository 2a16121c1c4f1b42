"""Stores and workers for the engine's cases: on etcd and in memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from acceptance.crew import Crew
from stepclaim import EtcdRunStore
from stepclaim.testing import InMemoryBackend, InMemoryRunStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from acceptance.crew import Hire, Open
    from servers import EtcdServer
    from stepclaim.cli.engine import Body
    from stepclaim.cli.flow import Flow
    from stepclaim.run_store import RunStore


@pytest.fixture(params=["etcd", "memory"])
def open_one(request: pytest.FixtureRequest, etcd: EtcdServer, prefix: str) -> Iterator[Open]:
    """Give a function that opens one more store on the same keys, as one more worker has it."""
    backend = InMemoryBackend()
    with ExitStack() as stack:

        def connect() -> RunStore:
            if request.param == "memory":
                return stack.enter_context(InMemoryRunStore(backend, prefix=prefix))
            return stack.enter_context(EtcdRunStore.connect(etcd.endpoint, prefix=prefix, lease_ttl=20))

        yield connect


@pytest.fixture
def hire(open_one: Open) -> Iterator[Hire]:
    """Give a function that sets three workers to work."""
    with ExitStack() as stack:

        def start(flow: Flow, body: Body | None = None, workers: int = 3, copies: int = 2) -> Crew:
            return stack.enter_context(Crew([open_one() for _ in range(workers)], flow, body, copies))

        yield start
