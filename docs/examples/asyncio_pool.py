"""An asyncio worker pool: many steps, a few at a time, and what happens to a body that loses its claim.

Run it in several terminals at once: they share the work. Run it again: there is none left.
"""
# ruff: noqa: INP001, T201

import asyncio

from stepclaim import AsyncEtcdRunStore, ClaimLostError

RUN = "crawl-7"
PAGES = [f"page.{n}" for n in range(20)]
AT_A_TIME = 4


async def work(store: AsyncEtcdRunStore, page: str, attempt: int) -> str:
    """Stand for the work on one page."""
    if page == "page.13" and attempt == 1:
        # What an operator's `stepclaim release crawl-7 page.13` would do, or the end of a lease after a long pause.
        await store.release_step_claim(RUN, page)
        await asyncio.sleep(60)  # not for long: the watch tells of the loss, and the task is cancelled
    await asyncio.sleep(0.02)
    return '{"words": 100}'


async def one(store: AsyncEtcdRunStore, page: str, places: asyncio.Semaphore) -> bool:
    """Do one page, if nobody else has it and it is not done; True if its result is ours."""
    async with places:
        try:
            async with store.step(RUN, page) as active:
                if active is None:
                    return False
                active.output_json = await work(store, page, active.attempt)
        except ClaimLostError as lost:
            print(f"{page}: lost, result dropped: {lost}")
        else:
            return True
    # The step is free again, or another worker's by now: ask like everybody else.
    return await one(store, page, places)


async def main() -> None:
    """Do all pages."""
    async with AsyncEtcdRunStore.connect(lease_ttl=10) as store:
        places = asyncio.Semaphore(AT_A_TIME)
        async with asyncio.TaskGroup() as pool:  # an exception of one body cancels the others: their steps go Pending
            tasks = [pool.create_task(one(store, page, places)) for page in PAGES]
        mine = sum(task.result() for task in tasks)
        succeeded = sum(status == "Succeeded" for status in (await store.get_step_statuses(RUN)).values())
        print(f"{mine} pages done here, {succeeded} of {len(PAGES)} have succeeded")


if __name__ == "__main__":
    asyncio.run(main())
