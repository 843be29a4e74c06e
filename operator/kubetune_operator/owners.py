"""Whose an object is, and Events about whose they are. Pure."""

import time
from typing import Any

from kubetune_operator.api import API_VERSION, KIND
from kubetune_operator.names import FIELD_MANAGER

Manifest = dict[str, Any]


def is_owned(found: Manifest, owner: str) -> bool:
    """Whether the object has an owner of that uid."""
    return any(reference["uid"] == owner for reference in found["metadata"].get("ownerReferences") or [])


def was_left(found: Manifest, owner: Manifest) -> bool:
    """Whether the object belongs to an earlier FineTuneJob of the owner's name: the collector is about to remove it."""
    same = ("apiVersion", "kind", "name")
    owners = found["metadata"].get("ownerReferences") or []
    left = [all(one.get(key) == owner[key] for key in same) and one["uid"] != owner["uid"] for one in owners]
    return bool(left) and all(left)


def event_on(body: Manifest, kind: str, reason: str, message: str, now: str) -> Manifest:
    """A new Event. Its name grows with time: kubectl shows those of one second in the order of their names."""
    metadata = body["metadata"]
    subject = {key: metadata[key] for key in ("name", "namespace", "uid", "resourceVersion")}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{time.time_ns():x}", "namespace": metadata["namespace"]},
        "involvedObject": {"apiVersion": API_VERSION, "kind": KIND, **subject},
        "type": kind,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
