"""An HTTP server that answers as the API server does, and clients of it."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client as kubernetes

from kubetune_operator.cluster import Cluster
from kubetune_operator.connection import Connection

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
        cluster = Cluster(Connection(kubernetes.ApiClient(configuration)), namespace, told.append)
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
