"""Events on FineTuneJobs, and whose token a token is."""

from typing import Any

import pytest
from aiohttp import web

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_operator.diagnosis import Inquiry
from kubetune_operator.errors import ApiError

Object = dict[str, Any]


def refused(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message}, status=status)


# ---------------------------------------------------------------- events


async def test_an_event_is_posted_on_the_finetunejob(cluster, server, body):
    await cluster.post_event(body(), "Warning", "Restarting", "Worker 1 was lost.")
    posted = server.bodies[0]
    assert server.requests == [("POST", "/api/v1/namespaces/team/events")]
    assert posted["involvedObject"]["uid"] == body()["metadata"]["uid"]
    assert (posted["type"], posted["reason"], posted["count"]) == ("Warning", "Restarting", 1)
    assert posted["source"] == {"component": "kubetune"}


async def test_the_same_event_again_only_raises_its_count(cluster, server, body):
    for _ in range(3):
        await cluster.post_event(body(), "Warning", "Restarting", "Worker 1 was lost.")
    assert [event["count"] for event in server.objects.values()] == [3]


async def test_an_event_that_has_expired_is_posted_anew(cluster, server, body):
    await cluster.post_event(body(), "Warning", "Restarting", "Worker 1 was lost.")
    server.objects.clear()
    server.answers = [refused(404, "not found")]
    await cluster.post_event(body(), "Warning", "Restarting", "Worker 1 was lost.")
    assert [event["count"] for event in server.objects.values()] == [1]


async def test_posted_events_do_not_fill_the_memory(cluster, monkeypatch, body):
    monkeypatch.setattr("kubetune_operator.cluster.MEMORY_SIZE", 3)
    for number in range(9):
        await cluster.post_event(body(), "Normal", "Staged", str(number))
    assert len(cluster._posted) <= 3


async def test_events_of_one_second_are_in_the_order_of_their_names(cluster, server, body):
    """As kubectl describe shows them."""
    for reason in ("Staged", "Starting", "Running", "Succeeded"):
        await cluster.post_event(body(), "Normal", reason, "Yes.")
    posted = sorted(server.bodies, key=lambda event: event["metadata"]["name"])
    assert [event["reason"] for event in posted] == ["Staged", "Starting", "Running", "Succeeded"]


async def test_another_message_is_another_event(cluster, server, body):
    await cluster.post_event(body(), "Warning", "Restarting", "Worker 1 was lost.")
    await cluster.post_event(body(), "Warning", "Restarting", "Worker 0 was lost.")
    assert len(server.objects) == 2


async def test_a_long_message_is_cut_to_what_events_may_hold(cluster, server, body):
    await cluster.post_event(body(), "Normal", "Staged", "x" * 3000)
    assert len(server.bodies[0]["message"]) == 1024


async def test_an_event_may_be_forbidden(cluster, server, body):
    server.answers = [refused(403, "namespace is being terminated")]
    with pytest.raises(ApiError):
        await cluster.post_event(body(), "Normal", "Staged", "done")


# ---------------------------------------------------------------- tokens


def reviewed(**changes: Any) -> web.Response:
    extra = {"authentication.kubernetes.io/pod-name": ["bot-a1-0-x"], "authentication.kubernetes.io/pod-uid": ["u1"]}
    user = {"username": "system:serviceaccount:team:default", "extra": extra}
    status = {"authenticated": True, "audiences": [TOKEN_AUDIENCE], "user": user, **changes}
    return web.json_response({"status": status}, status=201)


async def test_a_token_tells_the_pod_that_it_was_made_for(cluster, server):
    server.answers = [reviewed()]
    identity = await cluster.review_token("secret")
    assert tuple(identity) == ("team", "bot-a1-0-x", "u1")
    assert server.requests == [("POST", "/apis/authentication.k8s.io/v1/tokenreviews")]
    assert server.bodies[0]["spec"] == {"token": "secret", "audiences": [TOKEN_AUDIENCE]}


NO_TOKENS = [
    ("a token that is none", {"authenticated": False, "error": "invalid"}),
    ("a token for somebody else", {"audiences": ["https://kubernetes.default.svc"]}),
    ("a token without audiences", {"audiences": None}),
    ("a person's token", {"user": {"username": "alice", "extra": {}}}),
    ("a token of an account, not of a pod", {"user": {"username": "system:serviceaccount:team:default"}}),
    (
        "a token of a node",
        {
            "user": {
                "username": "system:node:node-0",
                "extra": {
                    "authentication.kubernetes.io/pod-name": ["a"],
                    "authentication.kubernetes.io/pod-uid": ["u"],
                },
            }
        },
    ),
]


@pytest.mark.parametrize("changes", [case[1] for case in NO_TOKENS], ids=[case[0] for case in NO_TOKENS])
async def test_what_is_no_progress_token(cluster, server, changes):
    """The API server answers 201 to wrong tokens too."""
    server.answers = [reviewed(**changes)]
    assert await cluster.review_token("secret") is None


async def test_a_token_is_reviewed_once_a_minute(cluster, server, monkeypatch):
    server.answers = [reviewed(), reviewed(authenticated=False)]
    assert await cluster.review_token("secret") == await cluster.review_token("secret")
    assert len(server.requests) == 1
    monkeypatch.setattr("kubetune_operator.cluster.TOKEN_CACHE_SECONDS", 0.0)
    assert await cluster.review_token("secret") is None


async def test_reviewed_tokens_do_not_fill_the_memory(cluster, server, monkeypatch):
    monkeypatch.setattr("kubetune_operator.cluster.MEMORY_SIZE", 3)
    server.answers = [reviewed(authenticated=False) for _ in range(9)]
    for number in range(9):
        await cluster.review_token(f"guess-{number}")
    assert len(cluster._tokens) <= 3


# ---------------------------------------------------------------- what others' events say


@pytest.mark.parametrize(
    ("about", "selector"),
    [
        (
            Inquiry("Job", "bot-a1", "uid-1"),
            "involvedObject.kind=Job,involvedObject.name=bot-a1,involvedObject.uid=uid-1",
        ),
        (
            Inquiry("PersistentVolumeClaim", "models"),
            "involvedObject.kind=PersistentVolumeClaim,involvedObject.name=models",
        ),
    ],
    ids=["an object that is known by its uid", "an object that is known by its name alone"],
)
async def test_only_the_events_of_one_object_are_read(cluster, server, about, selector):
    server.answers = [web.json_response({"items": [{"reason": "FailedCreate"}]})]
    assert await cluster.read_events("team", about) == [{"reason": "FailedCreate"}]
    assert server.requests == [("GET", "/api/v1/namespaces/team/events")]
    assert server.queries == [{"fieldSelector": selector}]
