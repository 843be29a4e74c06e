"""The API server as the tests reach it, and a proxy before it that counts and breaks an operator's requests."""

import asyncio
import base64
import http.client
import json
import socket
import ssl
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import yaml
from aiohttp import web

Object = dict[str, Any]
SECONDS = 30.0
VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete", "GET": "get"}
HOP_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding"})


class Account(NamedTuple):
    """A server and how to show who one is."""

    host: str
    port: int
    context: ssl.SSLContext

    @classmethod
    def of(cls, kubeconfig: Path) -> "Account":
        """The current context of a kubeconfig that carries its certificates."""
        config = yaml.safe_load(kubeconfig.read_text())
        named = next(item["context"] for item in config["contexts"] if item["name"] == config["current-context"])
        cluster = next(item["cluster"] for item in config["clusters"] if item["name"] == named["cluster"])
        user = next(item["user"] for item in config["users"] if item["name"] == named["user"])
        context = ssl.create_default_context(cadata=_pem(cluster, "certificate-authority").decode())
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(_pem(user, "client-certificate") + b"\n" + _pem(user, "client-key"))
            pair.flush()
            context.load_cert_chain(pair.name)
        url = urlsplit(cluster["server"])
        return cls(str(url.hostname), url.port or 443, context)


def _pem(section: Object, name: str) -> bytes:
    if name in section:
        return Path(section[name]).read_bytes()
    return base64.b64decode(section[f"{name}-data"])


class Refused(Exception):
    """The API server's answer was an error."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(f"{status}: {text}")


class Api:
    """Requests of one thread, over one connection."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.connection: http.client.HTTPSConnection | None = None

    def request(self, method: str, path: str, body: Object | None = None) -> Object:
        """One request and its answer, tried again while the server is away or busy. Raises Refused."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return self._once(method, path, body)
            except (Refused, OSError, http.client.HTTPException) as error:
                self.close()
                busy = not isinstance(error, Refused) or error.status in (429, 500, 503)
                if not busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _once(self, method: str, path: str, body: Object | None) -> Object:
        if self.connection is None:
            self.connection = self._open(SECONDS)
        patch = "application/merge-patch+json" if method == "PATCH" else "application/json"
        text = None if body is None else json.dumps(body)
        self.connection.request(method, path, text, {"Content-Type": patch})
        answer = self.connection.getresponse()
        data = answer.read()
        if answer.status >= 400:
            raise Refused(answer.status, data.decode(errors="replace"))
        return dict(json.loads(data))

    def watch(self, path: str, stopped: Callable[[], bool], selector: str = "") -> Iterator[tuple[str, Object]]:
        """What there is and what happens to it, until `stopped` says so; ("TICK", {}) when a second had no news."""
        query = f"labelSelector={selector}" if selector else ""
        version = ""
        while not stopped():
            if not version:
                listed = self.request("GET", f"{path}?{query}")
                yield from (("ADDED", item) for item in listed["items"])
                version = listed["metadata"]["resourceVersion"]
            connection = self._open(1.0)
            try:
                connection.request("GET", f"{path}?{query}&watch=1&resourceVersion={version}&timeoutSeconds=300")
                with connection.getresponse() as answer:
                    for event in _lines(answer, stopped):
                        if event.get("type") == "ERROR":
                            version = ""
                            break
                        if event:
                            version = event["object"]["metadata"]["resourceVersion"]
                            yield event["type"], event["object"]
                        else:
                            yield "TICK", {}
            except (OSError, http.client.HTTPException):
                version = ""  # the server went away: what happened meanwhile is in the next list
                time.sleep(0.5)
            finally:
                connection.close()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _open(self, seconds: float) -> http.client.HTTPSConnection:
        account = self.account
        return http.client.HTTPSConnection(account.host, account.port, context=account.context, timeout=seconds)


def _lines(answer: http.client.HTTPResponse, stopped: Callable[[], bool]) -> Iterator[Object]:
    """The documents of a stream; an empty one for every second of silence."""
    rest = b""
    while not stopped():
        try:
            chunk = answer.read1(1 << 16)
        except TimeoutError:
            # A response cannot be read on after a time-out: the watch is opened again from the last version.
            yield {}
            return
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


# ---------------------------------------------------------------- the proxy


class Call(NamedTuple):
    """A request that the operator made."""

    verb: str
    resource: str
    """Such as `jobs` or `finetunejobs/status`."""
    namespace: str
    name: str
    body: Object | None
    code: int

    @property
    def kind(self) -> str:
        return f"{self.verb} {self.resource}"


class Fault(NamedTuple):
    """What happens to a request instead."""

    code: int = 0
    message: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    lost: bool = False
    """The request is carried out, but its answer never arrives."""


def call_of(method: str, path: str, body: Object | None) -> Call:
    """What a request is about. Its code is not known yet."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        namespace, parts = parts[1], parts[2:]
    name = parts[1] if len(parts) > 1 else (body or {}).get("metadata", {}).get("name", "")
    resource = "/".join([parts[0] if parts else "", *parts[2:]])
    return Call(VERBS[method], resource, namespace, name, body, 0)


def without_a_scheduler(call: Call) -> None:
    """Let no scheduler say that it misses the pods' claims: here, the tests play the kubelet."""
    if call.resource == "jobs" and "template" in (call.body or {}).get("spec", {}):
        call.body["spec"]["template"]["spec"]["schedulerName"] = "nobody"


class Proxy:
    """Stands between an operator and the API server. `fault` may break a write, `edit` may change it: before each."""

    def __init__(self, account: Account, folder: Path) -> None:
        self.account = account
        self.calls: list[Call] = []
        self.fault: Callable[[Call], Fault | None] = lambda call: None
        self.edit: Callable[[Call], None] = without_a_scheduler
        self.kubeconfig = folder / "proxy.kubeconfig"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> Path:
        """Listen; the kubeconfig of those who come through it."""
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(SECONDS)
        cluster = {"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{port}"}}
        context = {"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}
        user = {"name": "nobody", "user": {}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "proxy"}
        config |= {"clusters": [cluster], "contexts": [context], "users": [user]}
        self.kubeconfig.write_text(yaml.safe_dump(config))
        return self.kubeconfig

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()

    def writes(self) -> list[Call]:
        """Every write, refused ones included."""
        # A token review asks something; it only has the form of a write. The Lease is written whatever jobs there are.
        apart = ("tokenreviews", "leases")
        return [call for call in list(self.calls) if call.verb != "get" and call.resource not in apart]

    def counted(self) -> Counter[str]:
        """Writes by verb and resource."""
        return Counter(call.kind for call in self.writes())

    async def _serve(self) -> int:
        connector = aiohttp.TCPConnector(ssl=self.account.context, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _close(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        body = json.loads(data) if data else None
        call = call_of(request.method, request.path, body)
        fault = None if request.method == "GET" else self.fault(call)
        self.edit(call)
        if fault is not None and not fault.lost:
            self.calls.append(call._replace(code=fault.code))
            told = {"kind": "Status", "status": "Failure", "message": fault.message, "code": fault.code}
            return web.json_response(told, status=fault.code, headers=dict(fault.headers))
        url = f"https://{self.account.host}:{self.account.port}{request.raw_path}"
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_HEADERS}
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.request(request.method, url, json=body, headers=headers, timeout=timeout) as answer:
            self.calls.append(call._replace(code=answer.status))
            if fault is not None:
                await answer.read()
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            return await self._pass_on(request, answer)

    async def _pass_on(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_HEADERS}
        if not request.query.get("watch"):
            return web.Response(status=answer.status, body=await answer.read(), headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        with suppress(ConnectionResetError):  # the operator was killed
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
        return response


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
