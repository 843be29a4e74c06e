"""A cache that lists and watches: what it holds, what it tells, and how it recovers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kubetune_operator import watch
from kubetune_operator.errors import Expired, Unreachable
from kubetune_operator.watch import ObjectCache

Object = dict[str, Any]
DEADLINE = 5.0


def thing(name: str, version: int, uid: str | None = None, group: str = "g", namespace: str = "team") -> Object:
    metadata = {"namespace": namespace, "name": name, "uid": uid or f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": {**metadata, "labels": {"group": group}, "managedFields": ["much"]}}


class Server:
    """An API server of one kind, by hand: lists are given in advance, events are put in as the test goes on."""

    def __init__(self, *lists: Object | Exception) -> None:
        self.lists = list(lists)
        self.events: asyncio.Queue[Object | Exception | None] = asyncio.Queue()
        self.listed = 0
        self.watched_from: list[str] = []

    async def list(self) -> Object:
        self.listed += 1
        answer = self.lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def watch(self, resource_version: str) -> AsyncIterator[Object]:
        self.watched_from.append(resource_version)
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def tell(self, kind: str, manifest: Object) -> None:
        self.events.put_nowait({"type": kind, "object": manifest})


def listing(version: int, *items: Object) -> Object:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(items)}


class Watched:
    """A cache at work, with what it told."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.told: list[str] = []
        self._news = asyncio.Event()
        self.cache = ObjectCache(server, lambda item: item["metadata"]["labels"]["group"], self._changed)

    def _changed(self, manifest: Object) -> None:
        self.told.append(f"{manifest['metadata']['name']}@{manifest['metadata']['resourceVersion']}")
        self._news.set()

    async def until(self, holds: Any) -> None:
        """Wait until it holds."""
        async with asyncio.timeout(DEADLINE):
            while not holds():
                await asyncio.sleep(0.001)


@pytest.fixture
async def start(monkeypatch):
    """start(server): a cache that runs until the test ends, with short waits."""
    monkeypatch.setattr(watch, "RETRY_SECONDS", (0.01,))
    tasks = []

    async def make(server: Server) -> Watched:
        watched = Watched(server)
        tasks.append(asyncio.create_task(watched.cache.run()))
        return watched

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_it_is_synced_when_the_first_list_is_complete(start):
    watched = await start(Server(Unreachable("down"), listing(5, thing("a", 3))))
    assert not watched.cache.synced.is_set()
    await asyncio.wait_for(watched.cache.synced.wait(), DEADLINE)
    assert watched.told == ["a@3"]
    assert watched.cache.get("team", "a")["metadata"]["uid"] == "uid-a"


async def test_an_empty_list_is_complete_too(start):
    watched = await start(Server(listing(5)))
    await asyncio.wait_for(watched.cache.synced.wait(), DEADLINE)
    assert watched.cache.group("g") == []


async def test_it_watches_from_where_the_list_ended(start):
    watched = await start(Server(listing(5)))
    await watched.until(lambda: watched.server.watched_from == ["5"])


async def test_events_change_what_it_holds(start):
    watched = await start(Server(listing(5, thing("a", 3))))
    watched.server.tell("MODIFIED", thing("a", 6))
    watched.server.tell("ADDED", thing("b", 7))
    watched.server.tell("DELETED", thing("a", 8))
    await watched.until(lambda: len(watched.told) == 4)
    assert watched.told == ["a@3", "a@6", "b@7", "a@8"]
    assert watched.cache.get("team", "a") is None
    assert [item["metadata"]["name"] for item in watched.cache.group("g")] == ["b"]


async def test_groups_are_sorted_and_apart(start):
    items = (thing("b", 1), thing("a", 2), thing("c", 3, group="other"), thing("a", 4, namespace="else"))
    watched = await start(Server(listing(5, *items)))
    await watched.cache.synced.wait()
    names = [(item["metadata"]["namespace"], item["metadata"]["name"]) for item in watched.cache.group("g")]
    assert names == [("else", "a"), ("team", "a"), ("team", "b")]
    assert len(watched.cache.group("other")) == 1
    assert watched.cache.group("none") == []


async def test_managed_fields_are_not_kept(start):
    """They are half of an object's size."""
    watched = await start(Server(listing(5, thing("a", 3))))
    await watched.cache.synced.wait()
    assert "managedFields" not in watched.cache.get("team", "a")["metadata"]


async def test_a_watch_that_the_server_ends_goes_on_from_its_last_event(start):
    watched = await start(Server(listing(5)))
    watched.server.tell("ADDED", thing("a", 6))
    watched.server.events.put_nowait(None)
    await watched.until(lambda: watched.server.watched_from == ["5", "6"])
    assert watched.server.listed == 1


async def test_a_bookmark_moves_the_watch_on_without_telling_anybody(start):
    watched = await start(Server(listing(5)))
    watched.server.events.put_nowait({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "99"}}})
    watched.server.events.put_nowait(None)
    await watched.until(lambda: watched.server.watched_from == ["5", "99"])
    assert watched.told == []


async def test_a_broken_watch_goes_on_from_its_last_event(start):
    watched = await start(Server(listing(5)))
    watched.server.tell("ADDED", thing("a", 6))
    watched.server.events.put_nowait(Unreachable("connection reset"))
    await watched.until(lambda: watched.server.watched_from == ["5", "6"])
    assert watched.server.listed == 1


async def test_an_expired_watch_lists_again_and_tells_every_difference(start):
    """What kopf loses: a deletion that happened while nobody watched."""
    before = (thing("same", 1), thing("changed", 2), thing("deleted", 3))
    after = (thing("same", 1), thing("changed", 8), thing("new", 9))
    watched = await start(Server(listing(5, *before), listing(20, *after)))
    await watched.cache.synced.wait()
    watched.told.clear()
    watched.server.events.put_nowait(Expired("410: too old resource version"))
    await watched.until(lambda: watched.server.watched_from == ["5", "20"])
    assert sorted(watched.told) == ["changed@8", "deleted@3", "new@9"]
    assert [item["metadata"]["name"] for item in watched.cache.group("g")] == ["changed", "new", "same"]


async def test_an_object_replaced_by_its_namesake_is_a_deletion_and_an_addition(start):
    watched = await start(Server(listing(5, thing("a", 3, uid="old")), listing(20, thing("a", 9, uid="new"))))
    await watched.cache.synced.wait()
    watched.server.events.put_nowait(Expired("410"))
    await watched.until(lambda: watched.told == ["a@3", "a@3", "a@9"])
    assert [item["metadata"]["uid"] for item in watched.cache.gone("g")] == ["old"]


async def test_a_list_that_fails_is_tried_again(start):
    watched = await start(Server(Unreachable("refused"), Unreachable("refused"), listing(5)))
    await asyncio.wait_for(watched.cache.synced.wait(), DEADLINE)
    assert watched.server.listed == 3


async def test_an_old_event_does_not_replace_a_newer_object(start):
    watched = await start(Server(listing(5, thing("a", 9))))
    watched.server.tell("MODIFIED", thing("a", 7))
    watched.server.tell("ADDED", thing("b", 10))
    await watched.until(lambda: len(watched.told) == 2)
    assert watched.told == ["a@9", "b@10"]


async def test_a_late_deletion_does_not_remove_the_namesake(start):
    watched = await start(Server(listing(5, thing("a", 4, uid="new"))))
    watched.server.tell("DELETED", thing("a", 6, uid="old"))
    await watched.until(lambda: len(watched.told) == 2)
    assert watched.cache.get("team", "a")["metadata"]["uid"] == "new"


# ---------------------------------------------------------------- graves


async def test_the_last_sight_of_a_deleted_object_is_kept_for_a_while(start, monkeypatch):
    watched = await start(Server(listing(5, thing("a", 3), thing("b", 4, group="other"))))
    watched.server.tell("DELETED", thing("a", 6))
    await watched.until(lambda: "a@6" in watched.told)
    assert [item["metadata"]["resourceVersion"] for item in watched.cache.gone("g")] == ["6"]
    assert watched.cache.gone("other") == []
    monkeypatch.setattr(watch, "GRAVE_SECONDS", 0.0)
    await watched.until(lambda: watched.cache.gone("g") == [])


# ---------------------------------------------------------------- own writes


async def test_the_answer_to_an_own_write_is_known_at_once(start):
    watched = await start(Server(listing(5)))
    await watched.cache.synced.wait()
    watched.cache.saw(thing("a", 6))
    assert watched.cache.get("team", "a") is not None
    watched.server.tell("ADDED", thing("a", 6))
    watched.server.tell("ADDED", thing("b", 7))
    await watched.until(lambda: "b@7" in watched.told)
    assert watched.told == ["a@6", "b@7"], "its event tells nothing new"


async def test_an_answer_that_the_watch_has_passed_is_not_taken(start):
    """The object may have been deleted since: it would be a ghost."""
    watched = await start(Server(listing(5)))
    watched.server.tell("ADDED", thing("a", 6))
    watched.server.tell("DELETED", thing("a", 7))
    await watched.until(lambda: len(watched.told) == 2)
    watched.cache.saw(thing("a", 6))
    assert watched.cache.get("team", "a") is None


async def test_why_a_watch_begins_anew_is_told_and_when_it_heard_something(monkeypatch):
    monkeypatch.setattr(watch, "RETRY_SECONDS", (0.0,))
    server = Server(listing(1), listing(2))
    cache = ObjectCache(server, lambda item: item["metadata"]["labels"]["group"], lambda _: None)
    causes: list[str] = []
    cache.restarted = causes.append
    task = asyncio.create_task(cache.run())
    for event in (None, Unreachable("reset"), Expired("410: too old resource version")):
        server.events.put_nowait(event)
    async with asyncio.timeout(DEADLINE):
        while len(causes) < 3:
            await asyncio.sleep(0.005)
    assert causes == ["ended", "error", "expired"]
    before = cache.heard
    server.tell("BOOKMARK", thing("", 9))
    async with asyncio.timeout(DEADLINE):
        while cache.heard == before:
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ---------------------------------------------------------------- what is kept, and what is no news


def owned(version: int, *owners: str, **status: Any) -> Object:
    found = thing("shared", version)
    found["metadata"]["ownerReferences"] = [{"uid": owner} for owner in owners]
    return {**found, "status": status}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (owned(1, "a"), owned(2, "a", "b"), False),
        (owned(1, "a", "b"), owned(2, "b"), True),
        (owned(1, "a"), owned(2, "a", "b", active=1), True),
        (owned(1, "a"), owned(2, "a", active=1), True),
        (owned(1, "a"), owned(2, "b"), True),
    ],
    ids=["an owner more", "an owner less", "an owner more and a pod", "a pod", "another owner"],
)
async def test_an_owner_more_is_no_news_and_everything_else_is(start, before, after, told):
    watched = await start(Server(listing(1, before)))
    watched.server.tell("MODIFIED", after)
    watched.server.tell("ADDED", thing("later", 3))
    await watched.until(lambda: "later@3" in watched.told)
    assert ("shared@2" in watched.told) is told
    assert watched.cache.get("team", "shared")["metadata"]["resourceVersion"] == "2"


async def test_what_a_job_or_pod_was_made_of_is_not_kept(start):
    container = {"name": "main", "resources": {"limits": {"memory": "1Gi"}}}
    spec = {"suspend": False, "containers": [{**container, "env": ["much"], "command": ["tune"]}], "template": ["much"]}
    given = {**thing("pod", 1), "spec": spec}
    watched = await start(Server(listing(1, given)))
    await watched.until(lambda: watched.told)
    assert watched.cache.get("team", "pod")["spec"] == {"suspend": False, "containers": [container]}
    assert given["spec"]["template"] == ["much"], "what was given is the giver's"
