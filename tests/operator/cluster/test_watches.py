"""FineTuneJobs are read and their status written; children are listed and watched."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from kubetune_operator import names
from kubetune_operator.cluster import worker_group
from kubetune_operator.errors import ApiError, Unreachable

Object = dict[str, Any]
DEADLINE = 5.0
JOBS = "/apis/batch/v1/namespaces/team/jobs"
STATUS = "/apis/kubetune.io/v1alpha1/namespaces/team/finetunejobs/bot/status"


def refused(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message}, status=status)


async def until(holds: Any) -> None:
    async with asyncio.timeout(DEADLINE):
        while not holds():
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------- FineTuneJobs


async def test_the_status_is_applied_to_the_very_version_that_was_read(cluster, server, body):
    known = server.put(STATUS.removesuffix("/status"), body())
    answer = await cluster.write_status(known, {"state": "Running"})
    assert server.requests == [("PATCH", STATUS)]
    assert server.queries == [{"fieldManager": "kubetune", "force": "true"}]
    assert server.bodies[0]["metadata"] == {"name": "bot", "namespace": "team", "resourceVersion": "11"}
    assert answer["metadata"]["resourceVersion"] == "12"


async def test_a_status_of_an_older_version_is_refused(cluster, server, body):
    old = body()
    server.put(STATUS.removesuffix("/status"), body())
    with pytest.raises(ApiError) as caught:
        await cluster.write_status(old, {"state": "Running"})
    assert caught.value.status == 409


async def test_a_finetunejob_is_read_or_absent(cluster, server, body):
    assert await cluster.get_finetunejob("team", "bot") is None
    server.put(STATUS.removesuffix("/status"), body())
    assert (await cluster.get_finetunejob("team", "bot"))["metadata"]["name"] == "bot"


async def test_an_error_of_the_server_is_not_an_absence(cluster, server):
    server.answers = [refused(500, "etcd is down")]
    with pytest.raises(ApiError, match="500: etcd is down"):
        await cluster.get_finetunejob("team", "bot")


@pytest.mark.parametrize(
    ("namespace", "path"),
    [
        (None, "/apis/kubetune.io/v1alpha1/finetunejobs"),
        ("team", "/apis/kubetune.io/v1alpha1/namespaces/team/finetunejobs"),
    ],
)
async def test_finetunejobs_are_listed_where_the_operator_may(connect, server, body, namespace, path):
    server.put(STATUS.removesuffix("/status"), body())
    listed, at = await connect(namespace).list_finetunejobs()
    assert at == server.version
    assert server.requests == [("GET", path)]
    assert listed[0]["kind"] == "FineTuneJob", "items of a list have no kind of their own"


# ---------------------------------------------------------------- watches


async def test_children_are_listed_and_watched_by_their_label(watching, server, job, attempt_job, pod):
    await watching("team")
    await until(lambda: len(server.watches) == 2)
    assert {path for _, path in server.requests} == {JOBS, "/api/v1/namespaces/team/pods"}
    assert all(query["labelSelector"] == names.ROLE_LABEL for query in server.queries)
    watched = [query for query in server.queries if "watch" in query]
    assert all((query["resourceVersion"], query["allowWatchBookmarks"]) == ("10", "true") for query in watched)


async def test_what_was_there_and_what_comes_is_told(watching, server, job, attempt_job):
    known = server.put(f"{JOBS}/bot-a1", attempt_job(job(), 1))
    cluster = await watching()
    later = attempt_job(job(), 2)
    later["metadata"] |= {"resourceVersion": "50"}
    server.feed("jobs", "ADDED", later)
    await until(lambda: len(cluster.told) == 2)
    assert [item["metadata"]["name"] for item in cluster.told] == ["bot-a1", "bot-a2"]
    assert [item["metadata"]["uid"] for item in cluster.jobs.group(worker_group("team", "bot"))] == [
        known["metadata"]["uid"],
        "job-uid-2",
    ]


async def test_an_expired_watch_lists_again(watching, server, job, attempt_job):
    """An ERROR event with code 410 comes inside the stream, after 200."""
    server.put(f"{JOBS}/bot-a1", attempt_job(job(), 1))
    cluster = await watching()
    server.objects.clear()
    server.version = 90
    server.feed("jobs", "ERROR", {"kind": "Status", "code": 410, "message": "too old resource version: 1 (90)"})
    await until(lambda: cluster.jobs.get("team", "bot-a1") is None)
    assert [item["metadata"]["name"] for item in cluster.told] == ["bot-a1", "bot-a1"]
    assert cluster.pods.group("any") == []


async def test_a_refused_watch_is_tried_again_from_the_same_place(watching, server):
    cluster = await watching()
    server.feed("pods", "ERROR", {"kind": "Status", "code": 500, "message": "etcdserver: leader changed"})
    await until(lambda: sum("watch" in query for query in server.queries) >= 3)
    assert cluster.is_synced
    assert sum(path.endswith("/pods") for _, path in server.requests) == 1, "it was listed only once"


async def test_half_a_line_is_no_answer(connect, server):
    cluster = connect()

    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"type": "ADDED", "obj')
        return response

    server.stream = broken
    with pytest.raises(Unreachable, match="no answer from the API server"):
        async for _ in cluster.connection.stream("/api/v1/pods", {"watch": "true"}):
            pass


async def test_a_server_that_is_not_there_is_unreachable(connect, server):
    cluster = connect()
    cluster.connection._client.configuration.host = "http://127.0.0.1:9"
    with pytest.raises(Unreachable):
        await cluster.get_finetunejob("team", "bot")


async def test_an_answer_that_is_no_status_is_told_by_its_reason(cluster, server):
    server.answers = [web.Response(status=418, text="slow down", reason="I am a teapot")]
    with pytest.raises(ApiError, match="418: I am a teapot"):
        await cluster.list_finetunejobs()


async def test_a_job_that_the_cache_lacks_is_asked_for(cluster, server, job, attempt_job):
    """Its watch may be late."""
    await cluster.find_job("team", "bot-a1")
    assert cluster.jobs.get("team", "bot-a1") is None
    server.put(f"{JOBS}/bot-a1", attempt_job(job(), 1))
    await cluster.find_job("team", "bot-a1")
    assert cluster.jobs.get("team", "bot-a1") is not None
