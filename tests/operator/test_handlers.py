"""From events to keys: what is known of FineTuneJobs, what is looked at when, and the workers that look."""

import asyncio
from typing import Any

import pytest

from kubetune_operator.errors import ApiError, Unreachable
from kubetune_operator.handlers import kopf_settings, registry_for, resync, take_event, take_list, work
from kubetune_operator.metrics import Metrics
from kubetune_operator.reconciler import keys_of_child
from kubetune_operator.store import Store, key_of
from kubetune_operator.workqueue import WorkQueue

Object = dict[str, Any]
DEADLINE = 5.0


# ---------------------------------------------------------------- the store


@pytest.fixture
def store() -> Store:
    return Store()


def versioned(body: Object, version: int) -> Object:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": str(version)}}


def test_a_newer_body_is_taken_and_an_older_one_is_not(store, body):
    """An answer to an own write may come before the event of the write before it."""
    assert store.offer(versioned(body(), 7))
    assert store.offer(versioned(body(), 9))
    assert not store.offer(versioned(body(), 8))
    assert not store.offer(versioned(body(), 9))
    assert store.get("team/bot")["metadata"]["resourceVersion"] == "9"


def test_who_wrote_what_is_not_kept(store, body):
    given = body(metadata={"managedFields": ["much"]})
    store.offer(given)
    kept = store.get(key_of(given))
    assert "managedFields" not in kept["metadata"]
    assert kept["spec"] == given["spec"]
    assert given["metadata"]["managedFields"] == ["much"]


def test_versions_are_compared_as_numbers(store, body):
    store.offer(versioned(body(), 9))
    assert store.offer(versioned(body(), 10))


def test_a_removed_job_is_gone(store, body):
    store.offer(body())
    assert store.remove("team/bot", body()["metadata"]["uid"])
    assert store.get("team/bot") is None
    assert (len(store), list(store)) == (0, [])


def test_the_late_deletion_of_a_namesake_removes_nothing(store, body):
    store.offer(body())
    assert not store.remove("team/bot", "an earlier uid")
    assert not store.remove("team/unknown")
    assert len(store) == 1


HANDLED = [
    ("a job without the label, by the default operator", "kubetune", {}, True),
    ("a job that names the default operator", "kubetune", {"kubetune.io/operator": "kubetune"}, True),
    ("a job of another operator", "kubetune", {"kubetune.io/operator": "canary"}, False),
    ("a job of its own, by another operator", "canary", {"kubetune.io/operator": "canary"}, True),
    ("a job without the label, by another operator", "canary", {}, False),
]


@pytest.mark.parametrize(("operator", "labels", "taken"), [case[1:] for case in HANDLED], ids=[c[0] for c in HANDLED])
def test_an_operator_handles_only_its_own_jobs(body, operator, labels, taken):
    assert Store(operator).offer(body(metadata={"labels": labels})) is taken


def test_a_job_given_to_another_operator_is_let_go(store, body):
    store.offer(body())
    assert store.offer(versioned(body(metadata={"labels": {"kubetune.io/operator": "canary"}}), 9))
    assert len(store) == 0


def test_statuses_and_running_trainings_are_known(store, body):
    store.offer(body("a"))
    store.offer(body("b", status={"state": "Running"}))
    store.offer(body("c", status={"state": "Succeeded"}))
    assert store.statuses() == [{}, {"state": "Running"}, {"state": "Succeeded"}]
    assert store.trainings() == {"team/b"}


NEEDS = [
    ("a new one", {}, {}, True),
    ("one that stages", {"status": {"conditions": [{"type": "Staged", "status": "False"}]}}, {}, True),
    ("one that is staged", {"status": {"conditions": [{"type": "Staged", "status": "True"}]}}, {}, False),
    ("one that has failed", {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}, {}, False),
    ("one that is suspended", {"suspend": True}, {}, False),
    ("one that was replaced by its namesake", {}, {"uid": "earlier"}, False),
    ("one that is not known", {}, {"name": "unknown"}, False),
]


@pytest.mark.parametrize(("changes", "owner", "needs"), [case[1:] for case in NEEDS], ids=[case[0] for case in NEEDS])
def test_who_still_needs_a_staging_job(store, body, changes, owner, needs):
    known = body(**changes)
    store.offer(known)
    reference = {"name": "bot", "uid": known["metadata"]["uid"], **owner}
    assert store.needs_staging("team", reference) is needs


# ---------------------------------------------------------------- events


@pytest.fixture
async def queue() -> WorkQueue:
    return WorkQueue(debounce_seconds=0.0)


async def taken(queue: WorkQueue) -> list[str]:
    keys = []
    while len(queue):
        keys.append(await queue.get())
        queue.done(keys[-1])
    return keys


async def test_a_new_object_goes_before_a_status_that_changed(store, queue, body):
    take_event({"type": "MODIFIED", "object": body("old", status={"observedGeneration": 1})}, store, queue)
    take_event({"type": "ADDED", "object": body("new")}, store, queue)
    assert await taken(queue) == ["team/new", "team/old"]


async def test_a_changed_spec_goes_first_too(store, queue, body):
    take_event({"type": None, "object": body("old", status={"observedGeneration": 1})}, store, queue)
    suspended = body("hurry", status={"observedGeneration": 1}, metadata={"generation": 2})
    take_event({"type": "MODIFIED", "object": suspended}, store, queue)
    assert await taken(queue) == ["team/hurry", "team/old"]


async def test_the_event_of_an_own_write_is_no_news(store, queue, body):
    store.offer(versioned(body(), 9))
    take_event({"type": "MODIFIED", "object": versioned(body(), 9)}, store, queue)
    assert await taken(queue) == []


async def test_a_deleted_object_is_forgotten_and_looked_at_once_more(store, queue, body):
    store.offer(body())
    take_event({"type": "DELETED", "object": versioned(body(), 12)}, store, queue)
    assert store.get("team/bot") is None
    assert await taken(queue) == ["team/bot"]


async def test_a_full_list_finds_what_no_event_told(store, queue, body):
    """A deletion during an outage is told by no event."""
    store.offer(body("ghost"))
    store.offer(body("known"))
    take_list([versioned(body("known"), 9), body("new")], 9, store, queue)
    assert sorted(store) == ["team/known", "team/new"]
    assert sorted(await taken(queue)) == ["team/ghost", "team/known", "team/new"]


async def test_a_job_that_came_after_the_list_was_made_is_not_taken_for_gone(store, queue, body):
    """Its event was faster than the answer, and comes only once."""
    take_event({"type": "ADDED", "object": versioned(body("new"), 12)}, store, queue)
    take_list([versioned(body("known"), 9)], 10, store, queue)
    assert sorted(store) == ["team/known", "team/new"]


async def test_a_job_that_went_after_the_list_was_made_does_not_come_back(store, queue, body):
    take_event({"type": "DELETED", "object": versioned(body(), 12)}, store, queue)
    take_list([versioned(body(), 9)], 10, store, queue)
    assert list(store) == []


async def test_a_namesake_of_a_deleted_job_is_another_one(store, queue, body):
    take_event({"type": "DELETED", "object": versioned(body(), 12)}, store, queue)
    take_event({"type": "ADDED", "object": versioned(body(metadata={"uid": "another"}), 13)}, store, queue)
    assert store.get("team/bot")["metadata"]["uid"] == "another"


def test_the_memory_of_deleted_jobs_is_bounded(store, body, monkeypatch):
    monkeypatch.setattr("kubetune_operator.store.BURIED", 2)
    for number in range(9):
        store.bury(body(metadata={"uid": str(number)}))
    assert list(store._buried) == ["7", "8"]


async def test_kopf_is_told_to_leave_nothing_behind(store, queue):
    settings = kopf_settings()
    assert settings.posting.enabled is False
    assert settings.peering.standalone is True
    assert settings.scanning.disabled is True
    assert max(settings.networking.error_backoffs) <= 1
    registry = registry_for(store, queue)
    handlers = list(registry._watching.get_all_handlers())
    assert [handler.selector.any_name for handler in handlers] == ["finetunejobs"]
    assert not list(registry._changing.get_all_handlers()), "those would leave annotations and finalizers"


async def test_kopfs_handler_feeds_store_and_queue(store, queue, body):
    handler = next(iter(registry_for(store, queue)._watching.get_all_handlers()))
    await handler.fn(event={"type": "ADDED", "object": body()}, logger=None)
    assert await taken(queue) == ["team/bot"]


class Listing:
    """Stands where the cluster stands: answers lists as the test says, then waits for ever."""

    def __init__(self, *answers: list[Object] | Exception) -> None:
        self.answers = list(answers)

    async def list_finetunejobs(self) -> tuple[list[Object], int]:
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer, 100


async def test_all_jobs_are_looked_at_at_the_start_and_again(store, queue, body):
    listing = Listing([body("a")], [body("a"), body("b")], [])
    task = asyncio.create_task(resync(listing, store, queue, seconds=0.01))
    await until(lambda: not listing.answers and list(store) == [])
    task.cancel()
    assert sorted(await taken(queue)) == ["team/a", "team/b"]


async def test_a_list_that_fails_is_tried_again(store, queue, body, caplog):
    listing = Listing(Unreachable("down"), ApiError(403, "no"), [body()])
    task = asyncio.create_task(resync(listing, store, queue, seconds=0.01))
    await until(lambda: len(store) == 1)
    task.cancel()
    assert "cannot list FineTuneJobs: down" in caplog.text


async def test_without_the_crd_the_operator_ends(store, queue, caplog):
    """kopf looks for resources once: an operator that waited would be deaf when the CRD comes."""
    with pytest.raises(ApiError):
        await resync(Listing(ApiError(404, "not found")), store, queue, seconds=60)
    assert "install the CRD" in caplog.text


# ---------------------------------------------------------------- whose child is it


def test_a_worker_job_and_its_pods_are_about_one_finetunejob(job, attempt_job, pod):
    owner = attempt_job(job(), 2)
    assert keys_of_child(owner, lambda *_: None) == ["team/bot"]
    assert keys_of_child(pod(owner), lambda *_: None) == ["team/bot"]


def test_a_staging_job_is_about_all_its_owners(job, stage_job):
    owner = {"kind": "FineTuneJob", "name": "other", "uid": "u"}
    staging = stage_job(job())
    staging["metadata"]["ownerReferences"].append(owner)
    assert keys_of_child(staging, lambda *_: None) == ["team/bot", "team/other"]


def test_a_staging_pod_is_about_the_owners_of_its_job(job, stage_job, pod):
    staging = stage_job(job())
    child = pod(staging)
    assert keys_of_child(child, lambda namespace, name: staging) == ["team/bot"]
    assert keys_of_child(child, lambda namespace, name: None) == []


def test_items_of_a_list_have_no_kind(job, stage_job, attempt_job):
    """Lists of the API leave kind out of their items."""
    staging = stage_job(job())
    del staging["kind"]
    assert keys_of_child(staging, lambda *_: None) == ["team/bot"]


# ---------------------------------------------------------------- workers


class Scripted:
    """Stands where the reconciler stands: does what the test says."""

    def __init__(self, *results: float | Exception | None) -> None:
        self.results = list(results)
        self.keys: list[str] = []

    async def reconcile(self, key: str) -> float | None:
        self.keys.append(key)
        result = self.results.pop(0) if self.results else None
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
async def working(queue):
    """working(results): a worker on the queue that gets these results."""
    tasks = []

    async def make(*results: float | Exception | None) -> Scripted:
        scripted = Scripted(*results)
        scripted.metrics = Metrics()
        tasks.append(asyncio.create_task(work(queue, scripted, scripted.metrics)))
        return scripted

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Any) -> None:
    async with asyncio.timeout(DEADLINE):
        while not holds():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("error", [Unreachable("down"), KeyError("a bug")], ids=["an outage", "an error of our own"])
async def test_an_error_is_counted_told_and_tried_again(queue, working, caplog, error):
    scripted = await working(error, None)
    queue.add("team/bot")
    await until(lambda: len(scripted.keys) == 2)
    assert scripted.metrics.registry.get_sample_value("kubetune_reconcile_errors_total") == 1
    assert "team/bot: trying again in" in caplog.text


async def test_a_server_that_asks_for_patience_gets_it(queue, working, caplog):
    """429 and Retry-After: its own pace, on top of ours."""
    scripted = await working(ApiError(429, "too many requests", retry_after=7.0))
    queue.add("team/bot")
    await until(lambda: "trying again in" in caplog.text)
    assert "trying again in 7." in caplog.text
    assert scripted.keys == ["team/bot"]


async def test_an_error_of_one_job_does_not_stop_the_others(queue, working):
    scripted = await working(KeyError("a bug"))
    queue.add("team/bad")
    queue.add("team/good")
    await until(lambda: "team/good" in scripted.keys)


async def test_a_planned_look_happens(queue, working):
    scripted = await working(0.01, None)
    queue.add("team/bot")
    await until(lambda: scripted.keys == ["team/bot", "team/bot"])


async def test_every_reconcile_is_measured(queue, working):
    scripted = await working(None)
    queue.add("team/bot")
    await until(lambda: scripted.metrics.registry.get_sample_value("kubetune_reconcile_duration_seconds_count") == 1)


def test_keys_are_namespace_and_name(body):
    assert key_of(body()) == "team/bot"
