"""Requests: counted, fenced, made again when the server is too busy, under a token that is rotated."""

import datetime as dt
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client as kubernetes
from kubernetes.aio.config import incluster_config

from kubetune_operator import connection as module
from kubetune_operator.cluster import LeaseObject
from kubetune_operator.connection import Call, Connection, meaning_of, throttle
from kubetune_operator.endpoint import server_context
from kubetune_operator.errors import ApiError, Deposed, Unreachable

JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "bot-a1", "namespace": "team"}}
JOBS = "/apis/batch/v1/namespaces/team/jobs"


@pytest.fixture
async def connection(server):
    """A connection to the server; what it counted is in `calls`."""
    calls: list[Call] = []
    configuration = kubernetes.Configuration()
    configuration.host = server.url
    made = Connection(kubernetes.ApiClient(configuration), calls.append)
    made.calls = calls
    yield made
    await made.close()


# ---------------------------------------------------------------- a server that is too busy


def busy(seconds: str | None = None) -> web.Response:
    headers = {} if seconds is None else {"Retry-After": seconds}
    return web.json_response({"message": "too many requests"}, status=429, headers=headers)


@pytest.fixture
def quick(monkeypatch):
    """Waits take no time; what was waited for is returned."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    return waits


async def test_a_throttled_write_is_made_again_when_the_server_says_so(connection, server, quick):
    server.answers = [busy("3"), busy()]
    await connection.request("POST", JOBS, {}, dict(JOB))
    assert server.requests == [("POST", JOBS)] * 3
    assert 3.0 <= quick[0] <= 4.5
    assert 1.0 <= quick[1] <= 1.5


async def test_a_server_that_stays_too_busy_is_told_in_the_end(connection, server, quick):
    server.answers = [busy("1") for _ in range(9)]
    with pytest.raises(ApiError, match="too many requests") as caught:
        await connection.request("GET", JOBS)
    assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
    assert len(server.requests) == module.THROTTLED_TRIES


async def test_a_conflict_is_not_tried_again(connection, server, quick):
    """The plan rested on another version: a new one must be made."""
    server.answers = [web.json_response({"message": "the object has been modified"}, status=409)]
    with pytest.raises(ApiError, match="409"):
        await connection.request("PATCH", f"{JOBS}/bot-a1", {}, dict(JOB))
    assert (len(server.requests), quick) == (1, [])


def test_no_server_makes_the_operator_wait_for_ever():
    assert throttle(3600) <= 1.5 * module.LONGEST_THROTTLE_SECONDS


# ---------------------------------------------------------------- the fence


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_who_does_not_lead_changes_nothing(connection, server, method):
    connection.may_write = lambda: False
    with pytest.raises(Deposed, match=f"this replica is not the leader: {method} {JOBS}/bot-a1 is not sent"):
        await connection.request(method, f"{JOBS}/bot-a1", {}, dict(JOB))
    assert server.requests == []


async def test_a_leader_that_is_deposed_while_it_waits_does_not_try_again(connection, server, quick):
    """The second try would come from an old leader."""
    server.answers = [busy("1")]
    votes = [True, False]
    connection.may_write = lambda: votes.pop(0)
    with pytest.raises(Deposed):
        await connection.request("POST", JOBS, {}, dict(JOB))
    assert len(server.requests) == 1


async def test_a_standby_reads_and_asks_for_the_lease(connection, server):
    connection.may_write = lambda: False
    await connection.request("GET", JOBS)
    lease = LeaseObject(connection, "ops", "kubetune")
    assert await lease.read() is None
    made = await lease.create({"metadata": {}, "spec": {"holderIdentity": "one"}})
    path = "/apis/coordination.k8s.io/v1/namespaces/ops/leases"
    assert (made["metadata"]["name"], made["metadata"]["namespace"]) == ("kubetune", "ops")
    assert server.requests[-2:] == [("GET", f"{path}/kubetune"), ("POST", path)]


# ---------------------------------------------------------------- what is counted

MEANINGS = [
    ("GET", "/api/v1/pods", {}, ("list", "pods")),
    ("GET", "/api/v1/pods", {"watch": "true"}, ("watch", "pods")),
    ("GET", "/api/v1/namespaces/team/configmaps/bot", {}, ("get", "configmaps")),
    ("GET", JOBS, {}, ("list", "jobs")),
    ("POST", JOBS, {}, ("create", "jobs")),
    ("DELETE", f"{JOBS}/bot-a1", {}, ("delete", "jobs")),
    (
        "PATCH",
        "/apis/kubetune.io/v1alpha1/namespaces/team/finetunejobs/bot/status",
        {},
        ("patch", "finetunejobs/status"),
    ),
    ("PUT", "/apis/coordination.k8s.io/v1/namespaces/ops/leases/kubetune", {}, ("update", "leases")),
    ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", {}, ("create", "tokenreviews")),
    ("GET", "/openid/v1/jwks", {}, ("get", "openid")),
]


@pytest.mark.parametrize(("method", "path", "query", "meaning"), MEANINGS, ids=[" ".join(case[3]) for case in MEANINGS])
def test_a_request_is_named_as_the_api_names_it(method, path, query, meaning):
    assert meaning_of(method, path, query) == meaning


async def test_every_request_is_counted_with_its_code(connection, server):
    await connection.request("POST", JOBS, {}, dict(JOB))
    with pytest.raises(ApiError):
        await connection.request("POST", JOBS, {}, dict(JOB))
    connection._client.configuration.host = "http://127.0.0.1:9"
    with pytest.raises(Unreachable):
        await connection.request("GET", JOBS)
    assert [call[:3] for call in connection.calls] == [
        ("create", "jobs", "201"),
        ("create", "jobs", "409"),
        ("list", "jobs", "error"),
    ]
    assert all(0 <= call.seconds < 5 for call in connection.calls)


async def test_an_answer_is_a_sign_of_life_and_an_outage_is_none(connection, server):
    assert connection.answered == float("-inf")
    with pytest.raises(ApiError):
        await connection.request("GET", f"{JOBS}/none")
    alive = connection.answered
    assert alive > 0
    connection._client.configuration.host = "http://127.0.0.1:9"
    with pytest.raises(Unreachable):
        await connection.request("GET", JOBS)
    assert connection.answered == alive


# ---------------------------------------------------------------- the pod's account


async def test_a_rotated_token_is_used_within_a_minute(certificate, tmp_path, monkeypatch):
    """Tokens of pods live for an hour; the kubelet writes a new one in time."""
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"items": []})

    clock = [dt.datetime(2030, 1, 1)]
    stub = SimpleNamespace(datetime=SimpleNamespace(now=lambda: clock[0]), timedelta=dt.timedelta)
    monkeypatch.setattr(incluster_config, "datetime", stub)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "tls.crt"))
    context = server_context(*certificate(tmp_path))
    (tmp_path / "token").write_text("first")
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    server = TestServer(app, host="127.0.0.1", scheme="https")
    await server.start_server(ssl=context)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    opened = await Connection.open()
    await opened.request("GET", JOBS)
    (tmp_path / "token").write_text("second")
    await opened.request("GET", JOBS)
    clock[0] += dt.timedelta(seconds=61)
    await opened.request("GET", JOBS)
    await opened.close()
    await server.close()
    assert [value.lower() for value in seen] == ["bearer first", "bearer first", "bearer second"]
