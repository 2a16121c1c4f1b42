"""A guard around a consumer whose messages come at least once, as a Celery task with late acknowledgement would use it.

    @app.task(bind=True, acks_late=True, reject_on_worker_lost=True, max_retries=None)
    def send_mail(self, order):
        try:
            once(store, order, "send-mail", lambda: send(order))
        except Busy as busy:  # not done, and not ours: let the message come again, later than a dead worker's lease
            raise self.retry(exc=busy, countdown=LEASE_TTL)

Below, a queue stands in for Celery's broker. One message comes twice; one worker dies in the middle of another.
Run it a second time: everything was done before, and nothing is done again.
"""
# ruff: noqa: INP001, T201

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from stepclaim import EtcdRunStore
from stepclaim.models import ClaimState

LEASE_TTL = 2  # seconds that a dead worker's claim lives on; 30 is a good value where nobody watches


class Busy(Exception):  # noqa: N818 - no error: the message only came too early
    """Somebody else has the step, dead or alive: don't acknowledge the message, let it come again."""


def once(store: EtcdRunStore, run_id: str, step_key: str, work: Callable[[], object]) -> bool:
    """Do the work and record its result, once for all messages; False if it was done before."""
    with store.step(run_id, step_key) as active:
        if active is not None:
            # an exception fails the step for good, until somebody calls `store.retry_step`
            active.output_json = json.dumps(work())
            return True
    claim = store.get_claim(run_id, step_key)
    if claim is None or claim.state is ClaimState.HELD:
        # Acknowledged now, the message would be gone: should the holder die, nobody would ever do the step.
        raise Busy(f"{step_key} of {run_id} is held by {'nobody any more' if claim is None else claim.owner}")
    return False  # sealed: it is final, and so is the message


def send_mail(order: str) -> str:
    """Stand for the effect outside."""
    print(f"{order}: sending the mail", flush=True)
    if "dies" in sys.argv:
        os._exit(9)  # as SIGKILL or a lost node would end it: nothing is released, nothing acknowledged
    return f"mail for {order} sent"


def main() -> None:
    """Deliver messages until all are acknowledged."""
    with EtcdRunStore.connect(lease_ttl=LEASE_TTL) as store:
        if "dies" in sys.argv:
            once(store, "order-2", "send-mail", partial(send_mail, "order-2"))
            return
        dying = subprocess.run([sys.executable, __file__, "dies"], check=False)  # noqa: S603 - this very program
        print(f"order-2: its first worker ended with status {dying.returncode}; the broker delivers the message again")
        queue = deque(["order-1", "order-1", "order-2"])  # order-1 comes twice
        while queue:
            order = queue.popleft()
            try:
                done = once(store, order, "send-mail", partial(send_mail, order))
            except Busy as busy:
                print(f"{order}: later: {busy}")
                queue.append(order)  # what self.retry(countdown=...) does
                time.sleep(0.5)
            else:
                print(f"{order}: acknowledged, {'done' if done else 'was done before'}")


if __name__ == "__main__":
    main()
