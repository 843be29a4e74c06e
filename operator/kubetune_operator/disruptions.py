"""What Kubernetes says of a pod that it takes away, in our words. Pure."""

from collections.abc import Iterable
from typing import Any, Final

OTHER: Final = "Disruption"
"""Reason of what has no reason of its own here."""

TABLE: Final = (
    ("PreemptionByScheduler", "", "Preempted", "{pod} of a higher priority takes its place"),
    (
        "EvictionByEvictionAPI",
        "",
        "Evicted",
        "an eviction, such as kubectl drain, autoscalers and deschedulers ask for",
    ),
    ("DeletionByTaintManager", "", "NodeLost", "a NoExecute taint: the node does not answer, or it is being emptied"),
    ("DeletionByPodGC", "", "NodeLost", "the node no longer exists"),
    ("TerminationByKubelet", "shutdown", "NodeShutdown", "the node shuts down"),
    ("TerminationByKubelet", "critical", "Preempted", "a critical pod takes its place"),
    (
        "TerminationByKubelet",
        "",
        "NodePressure",
        "the node ran out of a resource, of which it used more than it requests",
    ),
)
"""Reason of the pod's condition DisruptionTarget (Kubernetes' page on disruptions lists them), a word of its message,
our reason, and our words."""


def explained(kind: str, words: str, events: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """Our reason and our words for the reason and the message of a DisruptionTarget; the pod's Events say more."""
    for known, word, reason, why in TABLE:
        if kind == known and word in words:
            return reason, why.format(pod=_preemptor(events))
    return OTHER, "it was taken away"


def _preemptor(events: Iterable[dict[str, Any]]) -> str:
    """The scheduler names the other pod as the related object of its Event."""
    for event in events:
        by = event.get("related") or {}
        if event.get("reason") == "Preempted" and by.get("name"):
            return f"pod {by.get('namespace')}/{by['name']}"
    return "a pod"
