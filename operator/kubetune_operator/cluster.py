"""What the API server has of FineTuneJobs and their children: cached Jobs and pods, creates, applies, status, events.

Token reviews too: everything that the operator asks the API server for goes through here.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable
from typing import Final, NamedTuple

from kubetune_contract.paths import TOKEN_AUDIENCE
from kubetune_operator.api import API_VERSION, KIND
from kubetune_operator.connection import MERGE, Connection, Manifest, is_within, path_of
from kubetune_operator.diagnosis import Inquiry
from kubetune_operator.errors import ApiError, Expired, NameTaken
from kubetune_operator.names import FIELD_MANAGER, JOB_LABEL, MANAGED_BY, ROLE_LABEL, STAGE
from kubetune_operator.owners import event_on, is_owned, was_left
from kubetune_operator.tokens import PodIdentity
from kubetune_operator.watch import ObjectCache, version

WATCH_SECONDS: Final = 300
"""After which the server ends a watch, so that a silent one is noticed."""
JUST_MADE: Final = 10.0  # seconds
TOKEN_CACHE_SECONDS: Final = 60.0
MEMORY_SIZE: Final = 10000
"""Tokens, and Events, that are remembered. More of them are all forgotten: that costs only requests."""
JOB_NAME_LABEL: Final = "batch.kubernetes.io/job-name"


class _Applied(NamedTuple):
    digest: str
    time: float
    """When it was last seen to be there, as time.monotonic()."""


def worker_group(namespace: str, name: str) -> Hashable:
    """The group of a FineTuneJob's worker Jobs, and of its worker pods."""
    return (namespace, "worker", name)


def stage_group(namespace: str, name: str) -> Hashable:
    """The group of a staging Job's pods."""
    return (namespace, "stage", name)


def group_of(manifest: Manifest) -> Hashable:
    """The group in which a child Job or pod is looked for."""
    metadata = manifest["metadata"]
    labels = metadata.get("labels", {})
    if labels.get(ROLE_LABEL) == STAGE:
        return stage_group(metadata["namespace"], labels.get(JOB_NAME_LABEL, metadata["name"]))
    return worker_group(metadata["namespace"], labels.get(JOB_LABEL, ""))


class Cluster:
    """The objects of one cluster, or of one of its namespaces."""

    def __init__(self, connection: Connection, namespace: str | None, changed: Callable[[Manifest], None]) -> None:
        """`namespace` is the only one to watch, None is all. `changed` hears of every change of a child."""
        self.connection = connection
        self._namespace = namespace
        self.listed = float("-inf")
        """Monotonic time of the last complete list of FineTuneJobs."""
        self._applied: dict[tuple[str, str, str], _Applied] = {}
        self._tokens: dict[str, tuple[float, PodIdentity | None]] = {}
        self._posted: dict[tuple[str, str, str, str], tuple[str, int]] = {}
        self._taken: set[tuple[str, str, str]] = set()
        """Names that were somebody else's at the last look: it costs less to read them again than to be refused."""
        self.jobs = ObjectCache(_Children(connection, path_of("Job", namespace)), group_of, changed)
        self.pods = ObjectCache(_Children(connection, path_of("Pod", namespace)), group_of, changed)

    async def run(self) -> None:
        """Keep the caches fresh until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.jobs.run())
            tasks.create_task(self.pods.run())

    async def synced(self) -> None:
        """Wait until both caches are complete."""
        await self.jobs.synced.wait()
        await self.pods.synced.wait()

    @property
    def is_synced(self) -> bool:
        """Whether both caches are complete."""
        return self.jobs.synced.is_set() and self.pods.synced.is_set()

    async def close(self) -> None:
        """Close the connections."""
        await self.connection.close()

    # ------------------------------------------------------------ FineTuneJobs

    async def list_finetunejobs(self) -> tuple[list[Manifest], int]:
        """All FineTuneJobs, and the version of which this was all."""
        answer = await self.connection.request("GET", path_of(KIND, self._namespace))
        self.listed = time.monotonic()
        return [{"apiVersion": API_VERSION, "kind": KIND, **item} for item in answer["items"]], version(answer)

    async def find_job(self, namespace: str, name: str) -> None:
        """Ask for a child Job that the cache does not have: its watch may be late."""
        found = await self.connection.get("Job", namespace, name)
        if found is not None:
            self.jobs.saw(found)

    async def get_finetunejob(self, namespace: str, name: str) -> Manifest | None:
        """The FineTuneJob as it is now; None if there is none."""
        return await self.connection.get(KIND, namespace, name)

    async def write_status(self, body: Manifest, status: Manifest) -> Manifest:
        """Replace our part of the status of the FineTuneJob, if it is still as in `body`; its new body.

        What the last write set and this one does not is removed by the server. Raises ApiError 409 if it has changed,
        404 if it is gone.
        """
        metadata = {key: body["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
        manifest = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status}
        path = path_of(KIND, metadata["namespace"], metadata["name"], "status")
        return await self.connection.apply(path, manifest, FIELD_MANAGER)

    # ------------------------------------------------------------ children

    async def create(self, manifest: Manifest) -> None:
        """Create a child, or bring one that is ours up to date; a Job that is there is never changed.

        Raises NameTaken if the name belongs to somebody else.
        """
        kind, metadata = manifest["kind"], manifest["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        known, made = self._applied.get((kind, namespace, name)), _Applied(_digest(manifest), time.monotonic())
        if kind != "Job" and known is not None and known.digest == made.digest and made.time - known.time < JUST_MADE:
            return  # what came after it failed, and is tried again
        if (kind, namespace, name) in self._taken and await self.connection.get(kind, namespace, name) is not None:
            await self._existing(kind, namespace, name, metadata["ownerReferences"][0])
        try:
            # Strict: of the parts that the user wrote in Kubernetes' own words, unknown ones would be dropped.
            query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
            answer = await self.connection.request("POST", path_of(kind, namespace), query, manifest)
        except ApiError as error:
            if error.status != 409:
                raise
            answer = await self._existing(kind, namespace, name, metadata["ownerReferences"][0])
            if kind != "Job":
                answer = await self.connection.apply(path_of(kind, namespace, name), manifest, FIELD_MANAGER)
        self._saw(kind, answer)
        self._applied[(kind, namespace, name)] = made

    async def keep(self, manifest: Manifest, trusted_seconds: float) -> None:
        """Have a ConfigMap or Service be there with this content; a deleted one comes back.

        It is only looked at if the last look is older than `trusted_seconds` or was about another content. Raises
        NameTaken if the name belongs to somebody else.
        """
        kind, metadata = manifest["kind"], manifest["metadata"]
        key, digest = (kind, metadata["namespace"], metadata["name"]), _digest(manifest)
        known, now = self._applied.get(key), time.monotonic()
        if known is not None and known.digest == digest and now - known.time < trusted_seconds:
            return
        found = await self.connection.get(*key)
        if found is None or not is_within(manifest, found):
            self._applied.pop(key, None)
            await self.create(manifest)
        else:
            self._applied[key] = _Applied(digest, now)

    async def share(self, manifest: Manifest, manager: str) -> None:
        """Create a shared child, or join the owners of one that is there, under a field manager of one's own.

        A manifest without a spec only joins. Raises NameTaken if the name belongs to somebody else.
        """
        kind, metadata = manifest["kind"], manifest["metadata"]
        path = path_of(kind, metadata["namespace"], metadata["name"])
        if "spec" in manifest:
            try:
                query = {"fieldManager": manager, "fieldValidation": "Strict"}
                answer = await self.connection.request("POST", path_of(kind, metadata["namespace"]), query, manifest)
            except ApiError as error:
                if error.status != 409:
                    raise
                await self._shared(kind, metadata)
                joined = {name: metadata[name] for name in ("name", "namespace", "ownerReferences")}
                manifest = {**{name: manifest[name] for name in ("apiVersion", "kind")}, "metadata": joined}
            else:
                self._saw(kind, answer)
                return
        try:
            self._saw(kind, await self.connection.apply(path, manifest, manager))
        except ApiError as error:
            if error.status != 422:
                raise
            # What is to be joined is gone: without a spec, an apply makes no new one.
            raise ApiError(409, f"{kind} {metadata['name']} was deleted while it was looked at") from error

    async def stop(self, namespace: str, name: str, uid: str) -> None:
        """End the running pods of a child Job, if it is still the one with that uid; its ended pods stay."""
        body = {"metadata": {"uid": uid}, "spec": {"activeDeadlineSeconds": 1}}
        try:
            path, query = path_of("Job", namespace, name), {"fieldManager": FIELD_MANAGER}
            self._saw("Job", await self.connection.request("PATCH", path, query, body, MERGE))
        except ApiError as error:
            if error.status not in (404, 409, 422):  # it is gone, or another one has its name
                raise

    async def suspend(self, namespace: str, name: str, uid: str, suspended: bool) -> None:
        """Suspend or resume a child Job, if it is still the one with that uid."""
        body = {"metadata": {"uid": uid}, "spec": {"suspend": suspended}}
        query = {"fieldManager": FIELD_MANAGER}
        path = path_of("Job", namespace, name)
        try:
            self._saw("Job", await self.connection.request("PATCH", path, query, body, MERGE))
        except ApiError as error:
            if error.status not in (404, 409) and not (error.status == 422 and "uid" in error.message):
                raise  # else it is gone, or another one has its name: the next look knows

    async def remove(self, kind: str, namespace: str, name: str, owner: str) -> None:
        """Delete a ConfigMap or Service that is known by its name only, if it has that owner."""
        found = await self.connection.get(kind, namespace, name)
        if found is not None and is_owned(found, owner):
            await self.delete(kind, namespace, name, found["metadata"]["uid"])
        self._applied.pop((kind, namespace, name), None)

    async def delete(self, kind: str, namespace: str, name: str, uid: str, version: str | None = None) -> None:
        """Delete an object and what depends on it, if it is still the one with that uid and, if given, that version."""
        exactly = {"uid": uid} if version is None else {"uid": uid, "resourceVersion": version}
        body = {"propagationPolicy": "Background", "preconditions": exactly}
        try:
            await self.connection.request("DELETE", path_of(kind, namespace, name), {}, body)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    def forget(self, namespace: str, names: list[str]) -> None:
        """Drop what is remembered of a deleted FineTuneJob's children."""
        for kind in ("ConfigMap", "Service"):
            for name in names:
                self._applied.pop((kind, namespace, name), None)
                self._taken.discard((kind, namespace, name))

    async def _existing(self, kind: str, namespace: str, name: str, owner: Manifest) -> Manifest:
        found = await self.connection.get(kind, namespace, name)
        if found is None:
            raise ApiError(409, f"{kind} {name} was deleted while it was looked at")
        if was_left(found, owner):
            raise ApiError(409, f"{kind} {name} of a deleted FineTuneJob {owner['name']} is still to be collected")
        if not is_owned(found, owner["uid"]):
            self._taken.add((kind, namespace, name))
            raise NameTaken(
                f'{kind} "{name}" exists in namespace {namespace} and does not belong to this FineTuneJob: '
                "delete it, or give the FineTuneJob another name"
            )
        return found

    async def _shared(self, kind: str, metadata: Manifest) -> None:
        """Check that the object of that name is what we would have made."""
        namespace, name = metadata["namespace"], metadata["name"]
        found = await self.connection.get(kind, namespace, name)
        if found is None:
            raise ApiError(409, f"{kind} {name} was deleted while it was looked at")
        if (found["metadata"].get("labels") or {}).get(ROLE_LABEL) != metadata["labels"][ROLE_LABEL]:
            raise NameTaken(f'{kind} "{name}" exists in namespace {namespace} and was not made by Kubetune: delete it')

    def _saw(self, kind: str, answer: Manifest) -> None:
        if kind == "Job":
            self.jobs.saw(answer)

    # ------------------------------------------------------------ events and tokens

    async def post_event(self, body: Manifest, kind: str, reason: str, message: str) -> None:
        """Post an Event on the FineTuneJob. The same one again only raises its count."""
        key, now = (body["metadata"]["uid"], kind, reason, message), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        name, count = self._posted.get(key, ("", 0))
        try:
            if count:
                again = {"count": count + 1, "lastTimestamp": now}
                path = path_of("Event", body["metadata"]["namespace"], name)
                await self.connection.request("PATCH", path, {}, again, MERGE)
        except ApiError as error:
            if error.status != 404:  # events live for an hour
                raise
            count = 0
        if not count:
            event = event_on(body, kind, reason, message, now)
            name = event["metadata"]["name"]
            await self.connection.request("POST", path_of("Event", body["metadata"]["namespace"]), {}, event)
        if len(self._posted) >= MEMORY_SIZE:
            self._posted.clear()
        self._posted[key] = (name, count + 1)

    async def read_events(self, namespace: str, about: Inquiry) -> list[Manifest]:
        """The Events of one object that live still; they do for an hour."""
        fields = {"kind": about.kind, "name": about.name, **({"uid": about.uid} if about.uid else {})}
        selector = ",".join(f"involvedObject.{field}={value}" for field, value in fields.items())
        answer = await self.connection.request("GET", path_of("Event", namespace), {"fieldSelector": selector})
        events: list[Manifest] = answer.get("items") or []
        return events

    async def review_token(self, token: str) -> PodIdentity | None:
        """The pod that the progress token was made for; None if it is no such token. Answers are cached a minute."""
        digest, now = hashlib.sha256(token.encode()).hexdigest(), time.monotonic()
        known = self._tokens.get(digest)
        if known is not None and now - known[0] < TOKEN_CACHE_SECONDS:
            return known[1]
        spec = {"token": token, "audiences": [TOKEN_AUDIENCE]}
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        answer = await self.connection.request(
            "POST", "/apis/authentication.k8s.io/v1/tokenreviews", {}, review, fenced=False
        )
        if len(self._tokens) >= MEMORY_SIZE:
            self._tokens.clear()
        identity = _identity(answer.get("status", {}))
        self._tokens[digest] = (now, identity)
        return identity


class LeaseObject:
    """The requests about one Lease. They are not fenced: who does not lead asks for it here."""

    def __init__(self, connection: Connection, namespace: str, name: str) -> None:
        self._connection = connection
        self._namespace = namespace
        self._name = name

    async def read(self) -> Manifest | None:
        """The Lease; None if there is none."""
        return await self._connection.get("Lease", self._namespace, self._name)

    async def create(self, manifest: Manifest) -> Manifest:
        """Make the Lease."""
        manifest["metadata"] |= {"name": self._name, "namespace": self._namespace, "labels": MANAGED_BY}
        path, query = path_of("Lease", self._namespace), {"fieldManager": FIELD_MANAGER}
        return await self._connection.request("POST", path, query, manifest, fenced=False)

    async def replace(self, manifest: Manifest) -> Manifest:
        """Write the Lease, if it is still as it was read."""
        path, query = path_of("Lease", self._namespace, self._name), {"fieldManager": FIELD_MANAGER}
        return await self._connection.request("PUT", path, query, manifest, fenced=False)

    async def watch(self, resource_version: str) -> AsyncGenerator[Manifest]:
        """What happens to the Lease from there on. The right to watch is for this one name."""
        query = {
            "fieldSelector": f"metadata.name={self._name}",
            "watch": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async for event in self._connection.stream(path_of("Lease", self._namespace), query):
            if event["type"] == "ERROR":
                raise ApiError(event["object"].get("code", 500), event["object"].get("message", ""))
            yield event


class _Children:
    """List and watch of one kind of children."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path

    async def list(self) -> Manifest:
        return await self._connection.request("GET", self._path, {"labelSelector": ROLE_LABEL})

    async def watch(self, resource_version: str) -> AsyncIterator[Manifest]:
        query = {
            "labelSelector": ROLE_LABEL,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        try:
            async for event in self._connection.stream(self._path, query):
                if event["type"] == "ERROR":
                    raise ApiError(event["object"].get("code", 500), event["object"].get("message", ""))
                yield event
        except ApiError as error:
            if error.status == 410:
                raise Expired from error
            raise


def _identity(status: Manifest) -> PodIdentity | None:
    """A wrong token is answered too: only `authenticated` for our audience counts."""
    if status.get("authenticated") is not True or TOKEN_AUDIENCE not in (status.get("audiences") or []):
        return None
    user = status["user"]
    extra = user.get("extra") or {}
    pods, uids = (extra.get(f"authentication.kubernetes.io/pod-{what}") or [] for what in ("name", "uid"))
    parts = user["username"].split(":")
    if not pods or not uids or parts[:2] != ["system", "serviceaccount"]:
        return None
    return PodIdentity(namespace=parts[2], pod=pods[0], uid=uids[0])


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
