"""A worker process of the demo: takes orders from its pipe and has the engine handle them on a store of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from stepclaim.cli.broker import Finished, InBody, Order, Publish, Ready
from stepclaim.cli.engine import Engine
from stepclaim.cli.flow import Flow
from stepclaim.errors import StepClaimError
from stepclaim.sync_store import EtcdRunStore

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from stepclaim.models import StepClaim
    from stepclaim.settings import Settings


class Work:
    """The loop of one worker."""

    def __init__(self, connection: Connection[Any, Any], store: EtcdRunStore, flow: Flow, step_seconds: float) -> None:
        """Tell the broker that this worker is ready."""
        self._connection = connection
        self._step_seconds = step_seconds
        self._order = Order(0, "", "")
        self._rpcs = 0
        self._engine = Engine(store, flow, self._body, self._dispatch)
        self._count_rpcs(store)
        connection.send(Ready(store.session.owner))

    def run(self) -> None:
        """Handle orders until the broker closes the pipe, which ends this by an error."""
        while True:
            order = self._order = self._connection.recv()
            before = self._rpcs
            handled = error = None
            try:
                handled = self._engine.handle(order.run_id, order.step_key)
            except StepClaimError as trouble:  # not handled: the message comes again
                error = f"{type(trouble).__name__}: {trouble}"
            self._connection.send(Finished(order.number, handled, error, self._rpcs - before))

    def _body(self, claim: StepClaim) -> str:
        self._connection.send(InBody(self._order.number, claim.fencing_token))
        if self._order.hold:
            self._connection.recv()
        else:
            time.sleep(self._step_seconds)
        return f'{{"by": {os.getpid()}, "attempt": {claim.attempt}}}'

    def _dispatch(self, run_id: str, step_key: str) -> None:
        self._connection.send(Publish(run_id, step_key))

    def _count_rpcs(self, store: EtcdRunStore) -> None:
        """Count this store's calls, for clusters that show no metrics of their own."""
        client = store._client  # noqa: SLF001 - the count is the demo's, no store needs it
        attempt = client.attempt

        def counted(*args: Any) -> Any:
            self._rpcs += 1
            return attempt(*args)

        client.attempt = counted  # type: ignore[method-assign,assignment]


def main(connection: Connection[Any, Any], settings: Settings, flow_json: str, step_seconds: float) -> None:
    """Run in a process of its own until the broker closes the pipe, or is gone."""
    logging.getLogger("stepclaim").addHandler(logging.NullHandler())  # a lost session is part of the show
    try:
        with EtcdRunStore.connect(settings) as store:
            Work(connection, store, Flow.from_json(flow_json), step_seconds).run()
    except StepClaimError as trouble:
        with contextlib.suppress(OSError):
            connection.send(Finished(0, None, str(trouble)))
    except (EOFError, ConnectionError):  # the pipe is closed: the store was, too, on the way here
        pass
