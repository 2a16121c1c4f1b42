"""The worker of a Kubernetes indexed Job: each pod has a shard of the items, each item is a step.

    spec: {completionMode: Indexed, completions: 3, parallelism: 3, template: ...}

Kubernetes sets JOB_COMPLETION_INDEX; JOB_NAME and JOB_COMPLETIONS are set in the Job's template. A pod that is
restarted goes on where the one before it stopped: items that are final are left alone, and the one that it died in is
taken over as soon as the dead pod's lease has ended. No item's result is recorded twice, even where two pods have the
same index for a while. The pod that finds every item of the job final completes the run.
"""
# ruff: noqa: INP001, T201

import json
import os
import time

from stepclaim import EtcdRunStore, RunStatus, StepStatus

INDEX = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
COMPLETIONS = int(os.environ.get("JOB_COMPLETIONS", "1"))
RUN = os.environ.get("JOB_NAME", "nightly-import")  # the Job's name: a new Job is a new run
ITEM_SECONDS = float(os.environ.get("ITEM_SECONDS", "0.05"))
LEASE_TTL = 5  # seconds: how long a restarted pod waits, at most, for its dead predecessor

ITEMS = [f"file.{n}" for n in range(12)]


def work(item: str) -> str:
    """Stand for the work on one item."""
    time.sleep(ITEM_SECONDS)
    return json.dumps({"imported": item, "by": INDEX})


def main() -> None:
    """Do this pod's shard."""
    with EtcdRunStore.connect(lease_ttl=LEASE_TTL) as store:
        # The first pod writes the run's record; all others get the one that stands.
        store.start_run("import", "Nightly import", RUN, "kubernetes")
        done = store.get_step_statuses(RUN)
        for item in ITEMS[INDEX::COMPLETIONS]:
            if item in done and done[item].is_final:
                print(f"{item}: done before", flush=True)
                continue
            # A dead pod's claim ends with its lease; `wait` watches for that. Should a second pod of this index
            # finish the item meanwhile, ClaimTimeoutError ends this one, and its restart finds the item done.
            with store.step(RUN, item, wait=LEASE_TTL + 5) as active:
                assert active is not None  # it may be None only without `wait`
                print(f"{item}: attempt {active.attempt}, token {active.fencing_token}", flush=True)
                active.output_json = work(item)
        statuses = store.get_step_statuses(RUN)
        if all(item in statuses and statuses[item].is_final for item in ITEMS):
            ok = all(statuses[item] is StepStatus.SUCCEEDED for item in ITEMS)
            if store.complete_run(RUN, RunStatus.SUCCEEDED if ok else RunStatus.FAILED):
                print(f"{RUN}: all {len(ITEMS)} items are final, and this pod completed the run")
        print(f"shard {INDEX} of {COMPLETIONS}: done")


if __name__ == "__main__":
    main()
