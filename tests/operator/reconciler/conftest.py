"""A reconciler with a real client against a small HTTP server, and caches that the test fills by hand."""

import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client as kubernetes

from kubetune_contract.staging import StagedModel
from kubetune_operator.cluster import Cluster
from kubetune_operator.connection import Connection
from kubetune_operator.metrics import Metrics
from kubetune_operator.progress import ProgressStore
from kubetune_operator.reconciler import Reconciler
from kubetune_operator.store import Store

Object = dict[str, Any]
STAGED = StagedModel(path="models/llama", architecture="LlamaForCausalLM", parameters=1, bytes=1)
CONDITION = {"lastTransitionTime": "2030-01-01T12:00:00Z", "reason": "Why", "message": ""}


def versioned(body: Object, version: int) -> Object:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": str(version)}}


class Api:
    """Just enough of the API server for one FineTuneJob: what was written is in `writes`."""

    def __init__(self, body: Object) -> None:
        self.body: Object | None = body
        self.writes: list[tuple[str, str, Object]] = []
        self.refuse: dict[str, web.Response] = {}
        self.version = 100
        self.jobs: dict[str, Object] = {}
        """Jobs that can be read, by name."""
        self.is_taken = True
        """Whether the Service of the name is somebody else's."""
        self.events: list[Object] = []
        self.events_read = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else {}
        last = request.path.rsplit("/", 1)[-1]
        if request.method == "GET":
            return await self.read(request.path)
        what = request.path.split("/namespaces/team/")[-1]
        self.writes.append((request.method, what, body))
        if what in self.refuse:
            return self.refuse.pop(what)
        self.version += 1
        if last == "status":
            assert self.body is not None
            self.body = versioned({**self.body, "status": body["status"]}, self.version)
            return web.json_response(self.body)
        manifest = {"spec": {}, **body}
        manifest["metadata"] = {"uid": f"uid-{self.version}", **manifest.get("metadata", {})}
        return web.json_response(versioned(manifest, self.version))

    async def read(self, path: str) -> web.Response:
        if "finetunejobs" in path and self.body is not None:
            return web.json_response(self.body)
        if path.endswith("/events"):
            self.events_read += 1
            return web.json_response({"items": self.events})
        if "/jobs/" in path and path.rsplit("/", 1)[-1] in self.jobs:
            return web.json_response(self.jobs[path.rsplit("/", 1)[-1]])
        if path.endswith("/services/bot") and self.is_taken:
            return web.json_response({"metadata": {"name": "bot", "uid": "theirs"}})
        return web.json_response({"message": "not found"}, status=404)

    @property
    def written(self) -> list[str]:
        """The writes, in short."""
        return [f"{method} {what}" for method, what, _ in self.writes]


class Stage:
    """A reconciler between an API server and caches that the test fills by hand."""

    def __init__(self, api: Api, cluster: Cluster, settings: Any) -> None:
        self.api = api
        self.cluster = cluster
        self.store = Store()
        self.progress = ProgressStore(settings.progress_write_seconds)
        self.metrics = Metrics()
        self.reconciler = Reconciler(cluster, self.store, self.progress, settings, self.metrics)
        if api.body is not None:
            self.store.offer(api.body)

    async def reconcile(self) -> float | None:
        return await self.reconciler.reconcile("team/bot")

    @property
    def status(self) -> Object:
        assert self.api.body is not None
        return self.api.body.get("status", {})

    def condition(self, kind: str) -> Object:
        return next(item for item in self.status["conditions"] if item["type"] == kind)

    def add(self, cache: Any, manifest: Object) -> Object:
        manifest["metadata"].setdefault("resourceVersion", "50")
        cache._put(manifest)
        return manifest


@pytest.fixture
async def stage(settings, tmp_path):
    """stage(body): a reconciler for that FineTuneJob."""
    (tmp_path / "ca.crt").write_text("PEM")
    chosen = settings.model_copy(update={"ca_file": tmp_path / "ca.crt"})
    cleanups = []

    async def make(body: Object) -> Stage:
        api = Api(body)
        server = TestServer(api.app())
        await server.start_server()
        configuration = kubernetes.Configuration()
        configuration.host = str(server.make_url("")).rstrip("/")
        cluster = Cluster(Connection(kubernetes.ApiClient(configuration)), None, lambda _: None)
        cleanups.extend([cluster.close, server.close])
        return Stage(api, cluster, chosen)

    yield make
    for cleanup in cleanups:
        await cleanup()


@pytest.fixture
def staged_body(body):
    """A FineTuneJob whose model is staged."""

    def make(**more: Any) -> Object:
        status = {
            "observedGeneration": 1,
            "staged": STAGED.to_dict(),
            "conditions": [{"type": "Staged", "status": "True", **CONDITION}],
            **more,
        }
        return body(status=status)

    return make
