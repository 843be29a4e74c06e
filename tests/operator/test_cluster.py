"""The client side of the API, against an HTTP server that answers as the API server does."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client as kubernetes

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_operator import build, names
from kubetune_operator.cluster import Cluster, group_of, path_of, stage_group, worker_group
from kubetune_operator.errors import ApiError, NameTaken, Unreachable

Object = dict[str, Any]
DEADLINE = 5.0
JOBS = "/apis/batch/v1/namespaces/team/jobs"
STATUS = "/apis/kubetune.io/v1alpha1/namespaces/team/finetunejobs/bot/status"


class ApiServer:
    """Objects by path, and the requests that came. Watches are fed by the test."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[Any] = []
        self.queries: list[dict[str, str]] = []
        self.types: list[str | None] = []
        self.version = 10
        self.watches: dict[str, asyncio.Queue[Object | None]] = {}
        self.answers: list[web.Response] = []
        """Answers to give instead, first to last."""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    def put(self, path: str, manifest: Object) -> Object:
        self.version += 1
        manifest["metadata"] = {
            "uid": f"uid-{self.version}",
            **manifest["metadata"],
            "resourceVersion": str(self.version),
        }
        self.objects[path] = manifest
        return manifest

    def feed(self, plural: str, kind: str, manifest: Object) -> None:
        self.watches.setdefault(plural, asyncio.Queue()).put_nowait({"type": kind, "object": manifest})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch"):
            self.queries.append(dict(request.query))
            return await self.stream(request)
        text = await request.text()
        body = json.loads(text) if text else None
        self.requests.append((request.method, request.path))
        self.bodies.append(body)
        self.queries.append(dict(request.query))
        self.types.append(request.headers.get("Content-Type"))
        if self.answers:
            return self.answers.pop(0)
        return getattr(self, request.method.lower())(request.path, body)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        queue = self.watches.setdefault(request.path.rsplit("/", 1)[-1], asyncio.Queue())
        while (event := await queue.get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response

    def get(self, path: str, _: Any) -> web.Response:
        if path in self.objects:
            return web.json_response(self.objects[path])
        if path.endswith("s"):
            items = [item for key, item in self.objects.items() if key.rsplit("/", 2)[-2] == path.rsplit("/", 1)[-1]]
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": items})
        return refused(404, f"{path} not found")

    def post(self, path: str, body: Object) -> web.Response:
        key = f"{path}/{body.get('metadata', {}).get('name', '')}"
        if key in self.objects:
            return refused(409, f"{key} already exists")
        return web.json_response(self.put(key, body), status=201)

    def patch(self, path: str, body: Object) -> web.Response:
        key = path.removesuffix("/status")
        known = self.objects.get(key, {"metadata": {}})
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != known["metadata"].get("resourceVersion"):
            return refused(409, "the object has been modified")
        return web.json_response(
            self.put(key, {**known, **body, "metadata": {**known["metadata"], **body.get("metadata", {})}})
        )

    def delete(self, path: str, body: Object) -> web.Response:
        known = self.objects.get(path)
        if known is None:
            return refused(404, "not found")
        if known["metadata"]["uid"] != body["preconditions"]["uid"]:
            return refused(409, "the UID in the precondition does not match")
        return web.json_response(self.objects.pop(path))


def refused(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message}, status=status)


@pytest.fixture
async def server():
    """An API server on a free port."""
    api = ApiServer()
    async with TestServer(api.app()) as running:
        api.url = str(running.make_url("")).rstrip("/")
        yield api
        for queue in api.watches.values():
            queue.put_nowait(None)


@pytest.fixture
async def connect(server):
    """connect(namespace): a cluster whose changes are collected in `told`."""
    clusters = []

    def make(namespace: str | None = None) -> Cluster:
        configuration = kubernetes.Configuration()
        configuration.host = server.url
        told: list[Object] = []
        cluster = Cluster(kubernetes.ApiClient(configuration), namespace, told.append)
        cluster.told = told
        clusters.append(cluster)
        return cluster

    yield make
    for cluster in clusters:
        await cluster.close()


@pytest.fixture
def cluster(connect) -> Cluster:
    """A cluster that watches all namespaces."""
    return connect()


@pytest.fixture
async def watching(connect):
    """watching(namespace): a cluster whose caches are kept fresh until the test ends."""
    tasks = []

    async def make(namespace: str | None = None) -> Cluster:
        cluster = connect(namespace)
        tasks.append(asyncio.create_task(cluster.run()))
        await asyncio.wait_for(cluster.synced(), DEADLINE)
        return cluster

    yield make
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Any) -> None:
    async with asyncio.timeout(DEADLINE):
        while not holds():
            await asyncio.sleep(0.005)


# ---------------------------------------------------------------- paths and groups


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("Job", "team", "a"), "/apis/batch/v1/namespaces/team/jobs/a"),
        (("Job",), "/apis/batch/v1/jobs"),
        (("Pod", "team"), "/api/v1/namespaces/team/pods"),
        (("FineTuneJob", "team", "a", "status"), "/apis/kubetune.io/v1alpha1/namespaces/team/finetunejobs/a/status"),
    ],
)
def test_paths_are_the_apis(arguments, path):
    assert path_of(*arguments) == path


def test_worker_jobs_and_pods_are_grouped_by_their_finetunejob(job, attempt_job, pod):
    owner = attempt_job(job(), 3)
    assert group_of(owner) == group_of(pod(owner)) == worker_group("team", "bot")


def test_staging_pods_are_grouped_by_their_job(job, stage_job, pod):
    owner = stage_job(job())
    assert group_of(owner) == group_of(pod(owner)) == stage_group("team", owner["metadata"]["name"])


# ---------------------------------------------------------------- children


async def test_a_child_is_created_under_our_field_manager(cluster, server, job, settings):
    await cluster.create(build.worker_job(job(), 1, settings))
    assert server.requests == [("POST", JOBS)]
    assert server.queries == [{"fieldManager": "kubetune"}]
    assert cluster.jobs.get("team", "bot-a1")["metadata"]["uid"] == "uid-11", "it is known before its event comes"


async def test_a_job_that_is_already_ours_is_left_as_it_is(cluster, server, job, settings):
    """A restarted operator, or a plan made before the event came: its template cannot be changed anyway."""
    manifest = build.worker_job(job(), 1, settings)
    server.put(f"{JOBS}/bot-a1", {**manifest, "spec": {"as": "before"}})
    await cluster.create(manifest)
    assert [method for method, _ in server.requests] == ["POST", "GET"]
    assert cluster.jobs.get("team", "bot-a1")["spec"] == {"as": "before"}


async def test_a_service_that_is_already_ours_is_brought_up_to_date(cluster, server, job):
    path = "/api/v1/namespaces/team/services/bot"
    server.put(path, {**build.service(job()), "spec": {"old": True}})
    await cluster.create(build.service(job()))
    assert server.requests[-1] == ("PATCH", path)
    assert server.types[-1] == "application/apply-patch+yaml"
    assert server.queries[-1] == {"fieldManager": "kubetune", "force": "true"}


@pytest.mark.parametrize("owners", [None, [{"uid": "another", "kind": "FineTuneJob", "name": "bot"}]])
async def test_a_name_that_belongs_to_somebody_else_is_not_taken_over(cluster, server, job, owners):
    path = "/api/v1/namespaces/team/services/bot"
    metadata = {"name": "bot", "namespace": "team", **({"ownerReferences": owners} if owners else {})}
    theirs = server.put(path, {"metadata": metadata, "spec": {"theirs": True}})
    with pytest.raises(NameTaken, match=r'Service "bot" exists in namespace team and does not belong.*another name'):
        await cluster.create(build.service(job()))
    assert server.objects[path] == theirs


async def test_a_child_that_vanishes_while_it_is_looked_at_is_tried_again(cluster, server, job):
    server.answers = [refused(409, "already exists"), refused(404, "not found")]
    with pytest.raises(ApiError, match="409: Service bot was deleted"):
        await cluster.create(build.service(job()))


async def test_a_refused_child_says_why(cluster, server, job):
    server.answers = [refused(403, 'services is forbidden: exceeded quota "team"')]
    with pytest.raises(ApiError, match="403: services is forbidden: exceeded quota"):
        await cluster.create(build.service(job()))


async def test_a_child_is_kept_with_one_write_as_long_as_it_does_not_change(cluster, server, job):
    manifest = build.service(job())
    for _ in range(3):
        await cluster.keep(manifest)
    assert len(server.requests) == 1
    await cluster.keep({**manifest, "spec": {"changed": True}})
    assert len(server.requests) == 2


async def test_a_child_just_created_needs_no_write_to_be_kept(cluster, server, job):
    await cluster.create(build.service(job()))
    await cluster.keep(build.service(job()))
    assert len(server.requests) == 1


async def test_what_was_applied_is_forgotten_with_its_job(cluster, server, job):
    await cluster.keep(build.service(job()))
    cluster.forget("team", ["bot"])
    await cluster.keep(build.service(job()))
    assert len(server.requests) == 2


async def test_a_shared_child_is_applied_under_a_manager_of_its_own(cluster, server, job, settings):
    manifest = build.stage_job(job(), settings)
    await cluster.share(manifest, names.stage_manager(job()))
    assert server.queries == [{"fieldManager": f"kubetune-{job().uid}", "force": "true"}]
    assert cluster.jobs.get("team", manifest["metadata"]["name"]) is not None


async def test_suspending_names_the_uid(cluster, server, job, settings):
    """A Job of the same name that came later must not be suspended."""
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.suspend("team", "bot-a1", "uid-11", True)
    assert server.bodies[-1] == {"metadata": {"uid": "uid-11"}, "spec": {"suspend": True}}
    assert server.types[-1] == "application/merge-patch+json"
    assert cluster.jobs.get("team", "bot-a1")["spec"]["suspend"] is True


async def test_deleting_names_the_uid_and_leaves_the_rest_to_the_collector(cluster, server, job, settings):
    server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.delete("Job", "team", "bot-a1", "uid-11")
    assert server.bodies[-1] == {"propagationPolicy": "Background", "preconditions": {"uid": "uid-11"}}
    assert server.objects == {}


@pytest.mark.parametrize("uid", ["uid-11", "another"], ids=["gone", "a namesake"])
async def test_deleting_what_is_gone_is_done(cluster, server, job, settings, uid):
    if uid == "another":
        server.put(f"{JOBS}/bot-a1", build.worker_job(job(), 1, settings))
    await cluster.delete("Job", "team", "bot-a1", uid)


async def test_deleting_may_be_forbidden(cluster, server):
    server.answers = [refused(403, "no")]
    with pytest.raises(ApiError):
        await cluster.delete("Job", "team", "bot-a1", "uid-11")


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
    listed = await connect(namespace).list_finetunejobs()
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
        async for _ in cluster.stream("/api/v1/pods", {"watch": "true"}):
            pass


async def test_a_server_that_is_not_there_is_unreachable(connect, server):
    cluster = connect()
    cluster._client.configuration.host = "http://127.0.0.1:9"
    with pytest.raises(Unreachable):
        await cluster.get_finetunejob("team", "bot")


async def test_an_answer_that_is_no_status_is_told_by_its_reason(cluster, server):
    server.answers = [web.Response(status=429, text="slow down", reason="Too Many Requests")]
    with pytest.raises(ApiError, match="429: Too Many Requests"):
        await cluster.list_finetunejobs()


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
