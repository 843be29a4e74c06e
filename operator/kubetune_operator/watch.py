"""A cache of the objects of one kind, kept fresh by list and watch. Knows no client: the caller brings the requests.

Why not kopf's: after an expired watch (410) it loses deletions, and it cannot say when its caches are complete.
"""

import asyncio
import logging
import random
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection, Hashable
from typing import Any, Final, NamedTuple, Protocol

from kubetune_operator.errors import Expired, OperatorError, retry_after

Manifest = dict[str, Any]
Key = tuple[str, str]

GRAVE_SECONDS: Final = 300.0
"""How long the last sight of a deleted object is remembered: how a deleted pod ended is nowhere else."""
GRAVES: Final = 4096
UNREAD: Final = ("env", "envFrom", "volumeMounts", "command", "args", "securityContext")
"""Parts of a pod's container that are not remembered: nothing here asks what a pod was made of."""
RETRY_SECONDS: Final = (0.1, 0.5, 1.0, 2.0, 5.0)

log = logging.getLogger(__name__)


class Source(Protocol):
    """The requests of one kind."""

    async def list(self) -> Manifest:
        """The whole list, with metadata.resourceVersion."""
        ...

    def watch(self, resource_version: str) -> AsyncIterator[Manifest]:
        """Events from there on, bookmarks included. Ends when the server ends it. Raises Expired."""
        ...


class _Grave(NamedTuple):
    time: float
    group: Hashable
    manifest: Manifest


class ObjectCache:
    """What the API server has of one kind.

    `group` sorts objects into the groups that are asked for; `changed` is called with every object that was added,
    changed or deleted, also when the change is only found by a new list.
    """

    def __init__(
        self, source: Source, group: Callable[[Manifest], Hashable], changed: Callable[[Manifest], None]
    ) -> None:
        self._source = source
        self._group = group
        self._changed = changed
        self._objects: dict[Key, Manifest] = {}
        self._groups: dict[Hashable, set[Key]] = defaultdict(set)
        self._graves: deque[_Grave] = deque(maxlen=GRAVES)
        self._version = ""
        self.heard = time.monotonic()
        """When the server last said anything of this kind, were it only that nothing has changed."""
        self.restarted: Callable[[str], None] = lambda _: None
        """Hears why a watch is opened anew: it has ended, expired, or broken by an error."""
        self.synced = asyncio.Event()
        """Set once the first list is complete."""

    def get(self, namespace: str, name: str) -> Manifest | None:
        """The object of that name."""
        return self._objects.get((namespace, name))

    def group(self, group: Hashable) -> list[Manifest]:
        """All objects of the group, by name."""
        return [self._objects[key] for key in sorted(self._groups.get(group, ()))]

    def gone(self, group: Hashable) -> list[Manifest]:
        """The last sight of the group's objects that were deleted a short while ago."""
        oldest = time.monotonic() - GRAVE_SECONDS
        return [grave.manifest for grave in self._graves if grave.group == group and grave.time >= oldest]

    def saw(self, manifest: Manifest) -> None:
        """Take in the answer to an own write, so that the next look knows it.

        What the watch has already passed is left alone: the object may have been deleted since.
        """
        if version(manifest) > int(self._version or 0):
            self._put(manifest)

    async def run(self) -> None:
        """Keep the cache fresh until cancelled."""
        failures = 0
        while True:
            try:
                if not self._version:
                    await self._list()
                await self._follow()
                failures = 0
                self.restarted("ended")
            except Expired:
                self.restarted("expired")
                self._version = ""
            except OperatorError as error:
                wait = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)] * random.uniform(0.5, 1.0)  # noqa: S311
                wait += retry_after(error)
                failures += 1
                self.restarted("error")
                log.warning("watch interrupted, trying again in %.1f s: %s", wait, error)
                await asyncio.sleep(wait)

    async def _list(self) -> None:
        answer = await self._source.list()
        found = {_key(item): item for item in answer.get("items") or []}
        for key in [key for key in self._objects if key not in found]:
            self._remove(self._objects[key])
        for key, item in found.items():
            known = self._objects.get(key)
            if known is not None and known["metadata"]["uid"] != item["metadata"]["uid"]:
                self._remove(known)
            if known is None or version(known) != version(item):
                self._put(item)
        self._version = answer["metadata"]["resourceVersion"]
        self.heard = time.monotonic()
        self.synced.set()

    async def _follow(self) -> None:
        async for event in self._source.watch(self._version):
            self.heard = time.monotonic()
            manifest = event["object"]
            match event["type"]:
                case "ADDED" | "MODIFIED":
                    self._put(manifest)
                case "DELETED":
                    self._remove(manifest)
            self._version = manifest["metadata"]["resourceVersion"]

    def _put(self, manifest: Manifest) -> None:
        manifest = slim(manifest)
        key = _key(manifest)
        known = self._objects.get(key)
        if known is not None and version(known) >= version(manifest):
            return
        self._objects[key] = manifest
        self._groups[self._group(manifest)].add(key)
        if known is None or not has_only_joined(known, manifest):
            # Of the many that share a staging Job, each would otherwise be looked at whenever one more joins.
            self._changed(manifest)

    def _remove(self, manifest: Manifest) -> None:
        key = _key(manifest)
        manifest = slim(manifest)
        self._graves.append(_Grave(time.monotonic(), self._group(manifest), manifest))
        known = self._objects.get(key)
        if known is not None and known["metadata"]["uid"] == manifest["metadata"]["uid"]:
            del self._objects[key]
            group = self._group(known)
            self._groups[group].discard(key)
            if not self._groups[group]:
                del self._groups[group]
        self._changed(manifest)


def version(manifest: Manifest) -> int:
    """The object's resourceVersion. Since v1.35 the API says that it may be compared as a number."""
    return int(manifest["metadata"]["resourceVersion"])


def slim(manifest: Manifest) -> Manifest:
    """The object without what nobody here reads, which is two thirds of a child Job or pod."""
    found = {**manifest, "metadata": _without(manifest["metadata"], ("managedFields",))}
    if "spec" in manifest:
        spec = found["spec"] = _without(manifest["spec"], ("template",))
        for kind in ("initContainers", "containers"):
            if kind in spec:
                spec[kind] = [_without(container, UNREAD) for container in spec[kind]]
    return found


def has_only_joined(known: Manifest, manifest: Manifest) -> bool:
    """Whether nothing has changed but that there are more owners."""
    apart = ("resourceVersion", "ownerReferences")
    before, after = (
        {owner["uid"] for owner in one["metadata"].get("ownerReferences") or ()} for one in (known, manifest)
    )
    return (
        before < after
        and _without(known["metadata"], apart) == _without(manifest["metadata"], apart)
        and _without(known, ("metadata",)) == _without(manifest, ("metadata",))
    )


def _without(mapping: Manifest, names: Collection[str]) -> Manifest:
    return {name: value for name, value in mapping.items() if name not in names}


def _key(manifest: Manifest) -> Key:
    return manifest["metadata"]["namespace"], manifest["metadata"]["name"]
