"""Pods that do not start: their statuses, as Kubernetes v1.35 writes them, and Events about them."""

from datetime import UTC, datetime
from typing import Any

import pytest

Object = dict[str, Any]
EARLIER = "2030-01-01T11:50:00Z"
NOON = datetime(2030, 1, 1, 12, 0, tzinfo=UTC)
UNBOUND = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"


def unscheduled(words: str, reason: str = "Unschedulable") -> Object:
    """The status of a pod that has no node."""
    item = {
        "type": "PodScheduled",
        "status": "False",
        "reason": reason,
        "message": words,
        "lastTransitionTime": EARLIER,
    }
    return {"phase": "Pending", "conditions": [item]}


def on_a_node(reason: str | None = None, words: str | None = None) -> Object:
    """The status of a pod that has a node, with the kubelet's word about its container; None: not even that."""
    item = {"type": "PodScheduled", "status": "True", "lastTransitionTime": EARLIER}
    waiting = {"reason": reason, **({"message": words} if words else {})}
    container = {"name": "main", "image": "registry.example/trainer:1", "state": {"waiting": waiting}}
    return {"phase": "Pending", "conditions": [item], **({"containerStatuses": [container]} if reason else {})}


def event(reason: str, message: str, kind: str = "Warning", at: str = "11:59:50") -> Object:
    return {"type": kind, "reason": reason, "message": message, "lastTimestamp": f"2030-01-01T{at}Z"}


@pytest.fixture
def stuck(worker):
    """stuck(status): worker 0 on node gpu-3, if it has a node, with exactly that status."""

    def make(status: Object) -> Object:
        made = worker(0, "Pending", creationTimestamp=EARLIER)
        made["spec"] = {**made["spec"], "nodeName": "gpu-3"}
        return {**made, "status": status}

    return make
