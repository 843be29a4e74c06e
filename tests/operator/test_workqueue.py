"""The queue of keys: once each, alone, new ones first."""

import asyncio

import pytest

from kubetune_operator.workqueue import FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, WorkQueue

DEADLINE = 5.0


@pytest.fixture
async def queue() -> WorkQueue:
    """A queue that does not debounce."""
    return WorkQueue(debounce_seconds=0.0)


@pytest.fixture
async def calm() -> WorkQueue:
    """A queue that debounces for longer than a test takes to look, but not to wait."""
    return WorkQueue(debounce_seconds=0.5)


async def take(queue: WorkQueue) -> str:
    return await asyncio.wait_for(queue.get(), DEADLINE)


async def is_empty(queue: WorkQueue) -> bool:
    """Whether nothing can be had at once."""
    try:
        async with asyncio.timeout(0.02):
            key = await queue.get()
    except TimeoutError:
        return True
    raise AssertionError(f"{key} was given out")


async def test_keys_come_in_the_order_in_which_they_were_asked_for(queue):
    for key in ("a", "b", "c"):
        queue.add(key)
    assert [await take(queue) for _ in range(3)] == ["a", "b", "c"]


async def test_a_key_waits_only_once(queue):
    for _ in range(5):
        queue.add("a")
    assert len(queue) == 1
    assert await take(queue) == "a"
    queue.done("a")
    assert await is_empty(queue)


async def test_an_urgent_key_goes_first(queue):
    queue.add("a")
    queue.add("b", urgent=True)
    assert [await take(queue), await take(queue)] == ["b", "a"]


async def test_a_waiting_key_that_becomes_urgent_goes_first(queue):
    for key in ("a", "b"):
        queue.add(key)
    queue.add("b", urgent=True)
    assert [await take(queue), await take(queue)] == ["b", "a"]
    assert await is_empty(queue)


async def test_an_urgent_key_asked_for_twice_is_urgent_once(queue):
    queue.add("a", urgent=True)
    queue.add("a", urgent=True)
    await take(queue)
    queue.done("a")
    assert await is_empty(queue)


async def test_a_key_that_a_worker_has_is_not_given_to_another(queue):
    queue.add("a")
    await take(queue)
    queue.add("a")
    assert await is_empty(queue)


async def test_a_key_that_changed_while_a_worker_had_it_is_given_out_again(queue):
    queue.add("a")
    await take(queue)
    queue.add("a")
    queue.done("a")
    assert await take(queue) == "a"
    queue.done("a")
    assert await is_empty(queue)


async def test_other_keys_do_not_wait_for_a_busy_one(queue):
    queue.add("a")
    await take(queue)
    queue.add("b")
    assert await take(queue) == "b"


async def test_get_waits_for_a_key(queue):
    waiter = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(waiter, DEADLINE) == "a"


# ---------------------------------------------------------------- debounce


async def test_a_first_change_does_not_wait(calm):
    calm.add("a")
    assert await asyncio.wait_for(calm.get(), 0.4) == "a"


async def test_changes_right_after_the_work_are_gathered(calm):
    loop = asyncio.get_running_loop()
    calm.add("a")
    await take(calm)
    calm.done("a")
    start = loop.time()
    for _ in range(5):
        calm.add("a")
    assert await is_empty(calm)
    assert await take(calm) == "a"
    assert loop.time() - start >= 0.49
    calm.done("a")
    assert await is_empty(calm)


async def test_a_change_during_the_work_is_gathered_too(calm):
    calm.add("a")
    await take(calm)
    calm.add("a")
    calm.done("a")
    assert await is_empty(calm)
    assert await take(calm) == "a"


async def test_an_urgent_change_does_not_wait(calm):
    calm.add("a")
    await take(calm)
    calm.done("a")
    calm.add("a", urgent=True)
    assert await asyncio.wait_for(calm.get(), 0.4) == "a"


async def test_an_urgent_change_during_the_work_does_not_wait(calm):
    calm.add("a")
    await take(calm)
    calm.add("a", urgent=True)
    calm.add("a")
    calm.done("a")
    assert await asyncio.wait_for(calm.get(), 0.4) == "a"


async def test_a_gathered_change_that_becomes_urgent_is_worked_on_once(calm):
    calm.add("a")
    await take(calm)
    calm.done("a")
    calm.add("a")
    calm.add("a", urgent=True)
    await take(calm)
    calm.done("a")
    assert await is_empty(calm)


# ---------------------------------------------------------------- later


async def test_a_key_comes_up_again_after_its_time(queue):
    queue.add("a")
    await take(queue)
    queue.done("a", again_after=0.05)
    assert await is_empty(queue)
    assert await take(queue) == "a"


async def test_the_earlier_of_two_times_holds(queue):
    loop = asyncio.get_running_loop()
    start = loop.time()
    queue.add_later("a", 60)
    queue.add_later("a", 0.05)
    queue.add_later("a", 30)
    assert await take(queue) == "a"
    assert loop.time() - start < 1


async def test_a_change_replaces_a_planned_time(queue):
    """The plan that follows the change sets its own."""
    queue.add_later("a", 0.05)
    queue.add("a")
    await take(queue)
    queue.done("a")
    await asyncio.sleep(0.06)
    assert await is_empty(queue)


async def test_a_time_that_comes_while_a_worker_has_the_key_is_kept(queue):
    queue.add("a")
    await take(queue)
    queue.add_later("a", 0.01)
    await asyncio.sleep(0.02)
    queue.done("a")
    assert await take(queue) == "a"


async def test_a_waiting_key_needs_no_time(queue):
    queue.add("a")
    queue.add_later("a", 0.01)
    await take(queue)
    queue.done("a")
    assert await is_empty(queue)


# ---------------------------------------------------------------- failures


async def test_a_failed_key_comes_up_again(queue):
    queue.add("a")
    await take(queue)
    wait = queue.failed("a")
    assert FIRST_RETRY_SECONDS / 2 <= wait <= FIRST_RETRY_SECONDS
    assert await take(queue) == "a"


async def test_waits_grow_with_jitter_and_stop_growing(queue):
    waits = []
    for _ in range(12):
        queue.add("a", urgent=True)
        await take(queue)
        waits.append(queue.failed("a"))
    for number, wait in enumerate(waits):
        longest = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**number)
        assert longest / 2 <= wait <= longest
    queue.forget("a")


async def test_success_starts_the_waits_anew(queue):
    for _ in range(6):
        queue.add("a", urgent=True)
        await take(queue)
        queue.failed("a")
    queue.add("a", urgent=True)
    await take(queue)
    queue.done("a")
    queue.add("a", urgent=True)
    await take(queue)
    assert queue.failed("a") <= FIRST_RETRY_SECONDS
    queue.forget("a")


async def test_a_change_during_a_failed_work_does_not_shorten_the_wait(queue):
    """Else an object that always fails and always changes would keep a worker busy."""
    queue.add("a")
    await take(queue)
    queue.add("a")
    queue.failed("a")
    assert await is_empty(queue)
    assert await take(queue) == "a"


async def test_a_forgotten_key_does_not_come_up_by_itself(queue):
    queue.add_later("a", 0.01)
    queue.forget("a")
    await asyncio.sleep(0.02)
    assert await is_empty(queue)


async def test_many_workers_never_have_the_same_key(queue):
    """Ten workers, five keys, changes all the time."""
    active: set[str] = set()
    worked = 0

    async def worker() -> None:
        nonlocal worked
        while True:
            key = await queue.get()
            assert key not in active
            active.add(key)
            await asyncio.sleep(0.001)
            active.discard(key)
            worked += 1
            queue.done(key)

    async with asyncio.timeout(DEADLINE):
        workers = [asyncio.create_task(worker()) for _ in range(10)]
        for number in range(200):
            queue.add(f"key-{number % 5}", urgent=number % 7 == 0)
            await asyncio.sleep(0.0005)
        for task in workers:
            task.cancel()
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert worked >= 5


async def test_a_standby_remembers_no_keys(queue):
    queue.accepting = False
    queue.add("a")
    queue.add_later("b", 0.0)
    assert len(queue) == 0
    queue.accepting = True
    queue.add("a")
    assert await take(queue) == "a"


async def test_a_closed_queue_gives_nothing_out_and_lets_workers_finish(queue):
    for key in "abc":
        queue.add(key)
    assert await take(queue) == "a"
    waiting = asyncio.create_task(queue.get())
    assert await waiting == "b"
    queue.add_later("d", 0.0)
    queue.close()
    assert queue.busy == 2
    assert await is_empty(queue)
    queue.done("a", again_after=0.0)
    queue.failed("b")
    assert (queue.busy, len(queue)) == (0, 0)
    assert await is_empty(queue)


async def test_how_long_keys_wait_and_work_takes_is_known(queue):
    assert (queue.waiting, queue.working) == (0, 0)
    queue.add("a")
    await asyncio.sleep(0.02)
    assert queue.waiting >= 0.02
    await take(queue)
    await asyncio.sleep(0.02)
    assert queue.working >= 0.02
    queue.done("a")
    assert (queue.waiting, queue.working) == (0, 0)
