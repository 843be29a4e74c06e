"""The connection to the API server: plain JSON requests and streams, and every failure as an error of ours.

Requests go through the official asynchronous client, but with plain JSON objects: its models cost memory and time and
add nothing to what the planner reads. In a pod, the client reads the account's token anew every minute: it is rotated.

Every request is counted. One that changes something is only sent while this replica may write, and one that the server
is too busy for (429) is made again when the server says so.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, Self

import kubetune_operator.lean  # noqa: F401 - before what it keeps small

# isort: split
import aiohttp
from kubernetes.aio import client as kubernetes
from kubernetes.aio import config as kubernetes_config

from kubetune_operator.api import GROUP, KIND, PLURAL, VERSION
from kubetune_operator.errors import ApiError, Deposed, Unreachable

Manifest = dict[str, Any]

TIMEOUT_SECONDS: Final = 30.0
"""Of one request; the client's own default is 300 s."""
SILENCE_SECONDS: Final = 120.0
"""A watch on which not even a bookmark came for so long is opened anew. Bookmarks come every minute."""
THROTTLED_TRIES: Final = 4
"""How often a request is made in all that the server is too busy for."""
LONGEST_THROTTLE_SECONDS: Final = 10.0
"""The longest wait between two of these tries, whatever the server asks for."""
JSON: Final = "application/json"
ACCEPT: Final = f"{JSON}, application/jwk-set+json"
"""The second is what the cluster's public keys come as, and only as that."""
APPLY: Final = "application/apply-patch+yaml"
MERGE: Final = "application/merge-patch+json"

_COLLECTIONS: Final = {
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Event": ("/api/v1", "events"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    KIND: (f"/apis/{GROUP}/{VERSION}", PLURAL),
}
_VERBS: Final = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def path_of(kind: str, namespace: str | None = None, name: str | None = None, part: str | None = None) -> str:
    """The URL path of a collection or an object."""
    base, plural = _COLLECTIONS[kind]
    parts = [base, f"namespaces/{namespace}" if namespace else None, plural, name, part]
    return "/".join(item for item in parts if item)


class Call(NamedTuple):
    """One request, as metrics count it."""

    verb: str
    """In the words of the API: get, list, watch, create, update, patch or delete."""
    resource: str
    """Such as `jobs` or `finetunejobs/status`."""
    code: str
    """The HTTP code; `error` where no answer came."""
    seconds: float
    """Until the answer began."""


class Connection:
    """Requests under one account."""

    def __init__(self, client: Any, counted: Callable[[Call], None] = lambda _: None) -> None:
        """`counted` hears of every request."""
        self._client = client
        self._counted = counted
        self.may_write: Callable[[], bool] = lambda: True
        """Asked before every request that changes something: who is not the leader, or not surely, sends none."""
        self.answered = float("-inf")
        """Monotonic time of the server's last sign of life."""

    @classmethod
    async def open(cls, counted: Callable[[Call], None] = lambda _: None) -> Self:
        """Connect from within a pod by its account, from elsewhere by KUBECONFIG."""
        configuration = kubernetes.Configuration()
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            await kubernetes_config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return cls(kubernetes.ApiClient(configuration), counted)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = JSON,
        *,
        fenced: bool = True,
    ) -> Manifest:
        """One request and its JSON answer. Raises ApiError, Unreachable, and Deposed where only the leader may write.

        `fenced=False` is for what changes no object of a FineTuneJob.
        """
        for left in reversed(range(THROTTLED_TRIES)):
            if fenced and method != "GET" and not self.may_write():
                raise Deposed(f"this replica is not the leader: {method} {path} is not sent")
            try:
                return await self._once(method, path, query, body, content_type)
            except ApiError as error:
                if error.status != 429 or not left:
                    raise
                await asyncio.sleep(throttle(error.retry_after))
        raise AssertionError("the last try returns or raises")

    async def _once(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Manifest | None, content_type: str
    ) -> Manifest:
        with _reaching(path):
            async with await self._open(
                method, path, query=query, body=body, content_type=content_type, timeout=TIMEOUT_SECONDS
            ) as response:
                answer: Manifest = json.loads(await response.read() or b"{}")
                return answer

    async def stream(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Manifest]:
        """The JSON documents of a watch, line by line. Raises ApiError or Unreachable."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=SILENCE_SECONDS)
        with _reaching(path):
            async with await self._open(
                "GET", path, query=query, body=None, content_type=JSON, timeout=timeout
            ) as response:
                async for line in response.content:
                    self.answered = time.monotonic()
                    yield json.loads(line)

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """The object as it is now; None if there is none. Raises ApiError or Unreachable."""
        try:
            return await self.request("GET", path_of(kind, namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def apply(self, path: str, manifest: Manifest, manager: str) -> Manifest:
        """Server-side apply under a field manager; the object as it is then. Raises ApiError or Unreachable."""
        return await self.request("PATCH", path, {"fieldManager": manager, "force": "true"}, manifest, APPLY)

    async def _open(
        self, method: str, path: str, *, query: Any, body: Any, content_type: str, timeout: Any
    ) -> aiohttp.ClientResponse:
        arguments = await self._client.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params={"Accept": ACCEPT, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        started, code = time.monotonic(), "error"
        try:
            answer = await self._client.call_api(*arguments, _request_timeout=timeout)
            response: aiohttp.ClientResponse = answer.response
            code, self.answered = str(response.status), time.monotonic()
        finally:
            self._counted(Call(*meaning_of(method, path, query), code, time.monotonic() - started))
        if response.status >= 400:
            told = _told(await response.read(), response.reason)
            raise ApiError(response.status, told, _seconds(response.headers.get("Retry-After")))
        return response


def throttle(retry_after: float | None) -> float:
    """Seconds until a throttled request is made again; jittered, as the server tells all clients the same."""
    asked = 1.0 if retry_after is None else min(retry_after, LONGEST_THROTTLE_SECONDS)
    return asked * random.uniform(1.0, 1.5)  # noqa: S311


def meaning_of(method: str, path: str, query: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Verb and resource of a request, in the words of the API."""
    parts = path.strip("/").split("/")
    if parts[0] not in ("api", "apis"):  # what is no object, such as the public keys
        return "get", parts[0]
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if len(parts) > 2 and parts[0] == "namespaces":
        parts = parts[2:]
    resource = "/".join([parts[0], *parts[2:]])
    if method != "GET":
        return _VERBS[method], resource
    if query and query.get("watch"):
        return "watch", resource
    return ("get" if len(parts) > 1 else "list"), resource


@contextmanager
def _reaching(path: str) -> Iterator[None]:
    """Whatever can happen to a connection, as one error."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError) as error:
        raise Unreachable(f"no answer from the API server to {path}: {error or type(error).__name__}") from error


def _told(text: bytes, reason: str | None) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return reason or "no reason given"


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header. The API server never writes the header's other form, a date."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


def is_within(wanted: Any, found: Any) -> bool:
    """Whether an object has everything that was asked for; the server adds more."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            key in found and is_within(value, found[key]) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(is_within(*pair) for pair in zip(wanted, found, strict=True))
        )
    return bool(wanted == found)
