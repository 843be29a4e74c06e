"""What keeps pods from starting, in the words of whoever keeps them, and what a person can do about it. Pure.

The pod's own status says most of it. Three things stand only in Events: why the Job controller may not create a pod,
why a volume is not mounted, and why a claim is not bound. They are worth a request only once a pod is late.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from kubetune_operator.diagnosis import (
    Events,
    Inquiry,
    Manifest,
    about,
    condition,
    ended,
    ending_condition,
    index_of,
    is_deleting,
    is_live,
    moment,
    name_of,
    node_of,
)
from kubetune_operator.faults import fault

POD_SECONDS: Final = 3.0
"""After which a Job without all its pods is asked for its Events."""
START_SECONDS: Final = 10.0
"""After which a pod on a node whose containers are not created is asked for its Events."""
SILENCE_SECONDS: Final = 30.0
"""After which a node that says nothing at all about its pod is told."""
ASKED_AT_ONCE: Final = 4
"""Pods whose Events are read in one go; what holds up a gang holds up most of it."""

IMAGE_REASONS: Final = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
CREATE_REASONS: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_AT_WORK: Final = frozenset({"", "ContainerCreating", "PodInitializing"})
_OLD: Final = frozenset({"Scheduled", "FailedScheduling", "Created", "Started", "Killing"})
"""Events that say nothing about a pod that has a node and does not run."""

_MISSING_CLAIM: Final = re.compile(r'persistentvolumeclaim "([^"]+)" not found')
_UNBOUND: Final = "unbound immediate PersistentVolumeClaims"
_BACK_OFF: Final = re.compile(r'^Back-off pulling image "[^"]*"(: ErrImagePull: )?')
_REFUSED_POD: Final = re.compile(r'^(Error creating: )?([Pp]ods? "[^"]*" (is forbidden|is invalid): )?')
"""The pod's name is another one each time."""
_REFUSED_OBJECT: Final = re.compile(r'^\S+ "[^"]*" is forbidden: ')
_MISSING_KEY: Final = re.compile(r"couldn't find key (\S+) in (Secret|ConfigMap) [^/]+/(\S+)")
_MISSING_OBJECT: Final = re.compile(r'\b(secret|configmap) "([^"]+)" not found')
_MISSING_ITEM: Final = re.compile(r"(configmap|secret) references non-existent (?:config|secret) key: (\S+)")


class Obstacle(NamedTuple):
    """Why a pod does not start."""

    reason: str
    message: str
    missing_claim: str | None = None
    since: datetime | None = None
    remedy: str = ""
    warning: bool = True
    """Whether somebody should look at it; what only takes its time is told without an alarm."""

    @property
    def told(self) -> str:
        """The message and the remedy."""
        return f"{ended(self.message)} {self.remedy}" if self.remedy else self.message


# ---------------------------------------------------------------- what stands in a pod's own status


def obstacle(pods: Iterable[Manifest], events: Events | None = None, now: datetime | None = None) -> Obstacle | None:
    """The first thing that keeps a pod from starting; a real obstacle goes before what only takes its time."""
    waiting = [pod for pod in sorted(pods, key=index_of) if is_live(pod) and not is_deleting(pod)]
    found = [item for pod in waiting if (item := _obstacle(pod, events or {}, now)) is not None]
    return next((item for item in found if item.warning), found[0] if found else None)


def _obstacle(pod: Manifest, events: Events, now: datetime | None) -> Obstacle | None:
    unscheduled = _unscheduled(pod, events)
    if unscheduled is not None:
        return unscheduled
    for container, reason, words in _waiting(pod):
        if reason in IMAGE_REASONS:
            return _image(pod, container["image"], _BACK_OFF.sub("", words) or reason)
        if reason in CREATE_REASONS:
            return _container(pod, reason, words)
    return _late(pod, events, now)


def _waiting(pod: Manifest) -> Iterator[tuple[Manifest, str, str]]:
    """Containers that do not run, with the kubelet's reason and words."""
    status = pod.get("status", {})
    for container in (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])):
        state = container.get("state", {}).get("waiting")
        if state is not None:
            yield container, state.get("reason", ""), state.get("message", "")


def _unscheduled(pod: Manifest, events: Events) -> Obstacle | None:
    item = next((one for one in _conditions(pod) if (one["type"], one["status"]) == ("PodScheduled", "False")), None)
    if item is None:
        return _unbound(pod, events) if condition(pod, "PodScheduled") is None else None
    words, reason = item.get("message", ""), item.get("reason", "Unschedulable")
    since = moment(pod["metadata"].get("creationTimestamp"))
    if _UNBOUND in words:
        return _unbound(pod, events) or Obstacle("VolumeNotBound", _cannot(pod, words), since=since)
    missing = _MISSING_CLAIM.search(words)
    if missing:
        return Obstacle("VolumeMissing", _cannot(pod, words), missing[1], since)
    return Obstacle(reason, _cannot(pod, words), since=since, remedy=_room(reason, words))


def _cannot(pod: Manifest, words: str) -> str:
    return f"{name_of(pod)} cannot be scheduled: {words}"


_ROOM: Final = (
    ("Insufficient nvidia.com/gpu", "Wait for GPUs to become free, add nodes with GPUs, or lower workers.gpusPerNode."),
    ("Insufficient ", "Wait for room, add nodes, or lower workers.resources."),
    ("Too many pods", "Wait for other pods to end, or add nodes."),
    ("volume node affinity conflict", "The volume and the free nodes are in different places: move one of them."),
    ("PersistentVolume's node affinity", "No free node can reach the volume: use one that the nodes can mount."),
    ("untolerated taint", "Tolerate the taint under workers.tolerations, or use other nodes."),
    ("node affinity/selector", "No node has the labels that workers.nodeSelector and workers.affinity ask for."),
    ("were unschedulable", "Nodes are cordoned: kubectl uncordon NODE lets pods on them again."),
    ("topology spread", "Loosen workers.topologySpreadConstraints, or add nodes in the places that lack them."),
    ("anti-affinity", "Loosen workers.affinity, or add nodes."),
    ("no nodes available", "The cluster has no node: add one."),
)
"""Words of the scheduler, and what they ask for."""


def _room(reason: str, words: str) -> str:
    if reason == "SchedulingGated":
        return "Whoever set the gate, such as a queue, must lift it."
    return " ".join(remedy for known, remedy in _told_once(words))


def _told_once(words: str) -> list[tuple[str, str]]:
    found = [(known, remedy) for known, remedy in _ROOM if known in words]
    exact = [item for item in found if item[0] != "Insufficient "]
    return exact if "Insufficient nvidia.com/gpu" in words and words.count("Insufficient") == 1 else found


def _image(pod: Manifest, image: str, words: str) -> Obstacle:
    remedy = "Check that the image exists and that the node can reach its registry."
    if any(word in words.lower() for word in ("unauthorized", "denied", "forbidden", "authentication")):
        remedy = (
            "The registry wants a login: name a Secret of type kubernetes.io/dockerconfigjson as image pull secret."
        )
    return Obstacle("ImagePull", f"{name_of(pod)} cannot pull image {image}: {words}", remedy=remedy)


def _container(pod: Manifest, reason: str, words: str) -> Obstacle:
    if (missing := _missing(words)) is not None:
        return missing._replace(message=f"{name_of(pod)} cannot start its container: {words}")
    remedy = "The kubelet tries again by itself once that is corrected."
    return Obstacle(reason, f"{name_of(pod)} cannot start its container: {words}", remedy=remedy)


def _missing(words: str) -> Obstacle | None:
    """A Secret or ConfigMap, or a key of one, that is not there."""
    if key := _MISSING_KEY.search(words):
        kind, remedy = key[2], f'Add the key "{key[1]}" to {key[2]} "{key[3]}", or name another key.'
    elif whole := _MISSING_OBJECT.search(words):
        kind = {"secret": "Secret", "configmap": "ConfigMap"}[whole[1]]
        remedy = f'Create {kind} "{whole[2]}" in this namespace, or name one that exists.'
    elif item := _MISSING_ITEM.search(words):
        kind = {"secret": "Secret", "configmap": "ConfigMap"}[item[1]]
        remedy = f'Add the key "{item[2]}" to it, or name another key.'
    else:
        return None
    return Obstacle(f"{kind}Missing", words, remedy=f"{remedy} The pod then starts by itself.")


# ---------------------------------------------------------------- what stands only in Events


def inquiries(
    job: Manifest, wanted: int, pods: Sequence[Manifest], now: datetime
) -> tuple[list[Inquiry], float | None]:
    """Whose Events should be read now, and in how many seconds that may change. Nothing for a gang that starts well."""
    asked: list[Inquiry] = []
    waits: list[float] = []

    def ask(since: str | None, patience: float, *about: Inquiry) -> None:
        left = patience - (now - (moment(since) or now)).total_seconds()
        if left <= 0:
            asked.extend(item for item in about if item not in asked)
        else:
            waits.append(left)

    live = [pod for pod in pods if is_live(pod) and not is_deleting(pod)]
    metadata = job["metadata"]
    done = sum(pod.get("status", {}).get("phase") in _counts(job) for pod in pods)
    if len(live) + done < wanted and not job["spec"].get("suspend") and ending_condition(job) is None:
        since = job.get("status", {}).get("startTime") or metadata.get("creationTimestamp")
        ask(since, POD_SECONDS, Inquiry("Job", metadata["name"], metadata.get("uid")))
    late = [pod for pod in sorted(live, key=index_of) if _is_late(pod)]
    for pod in late[:ASKED_AT_ONCE]:
        ask(_since(pod), *_question(pod))
    return asked, min(waits, default=None)


def _counts(job: Manifest) -> tuple[str, ...]:
    """Phases of pods that are not made again."""
    return ("Succeeded",) if job["spec"].get("backoffLimit") else ("Succeeded", "Failed")


def _is_late(pod: Manifest) -> bool:
    """Whether the pod's status has nothing to say and yet it does not run."""
    if any("waiting" not in one.get("state", {}) for one in pod.get("status", {}).get("containerStatuses") or []):
        return False
    if condition(pod, "PodScheduled") is None:
        item = next((one for one in _conditions(pod) if one["type"] == "PodScheduled"), None)
        return item is None or _UNBOUND in item.get("message", "")
    return all(reason in _AT_WORK for _, reason, _ in _waiting(pod))


def _since(pod: Manifest) -> str | None:
    scheduled = condition(pod, "PodScheduled") or {}
    since: str | None = scheduled.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
    return since


def _question(pod: Manifest) -> tuple[float, *tuple[Inquiry, ...]]:
    if condition(pod, "PodScheduled") is None:
        return (POD_SECONDS, *_claims(pod))
    return START_SECONDS, about(pod)


def _claims(pod: Manifest) -> list[Inquiry]:
    volumes = (volume.get("persistentVolumeClaim") for volume in pod["spec"].get("volumes") or [])
    names = dict.fromkeys(volume["claimName"] for volume in volumes if volume)
    return [Inquiry("PersistentVolumeClaim", name) for name in names]


def not_created(job: Manifest, events: Events) -> Obstacle | None:
    """Why the Job controller cannot create all pods of the Job."""
    found = events.get(Inquiry("Job", job["metadata"]["name"], job["metadata"].get("uid")), ())
    failed = [event for event in found if event.get("reason") == "FailedCreate"]
    if not failed:
        return None
    words = _REFUSED_POD.sub("", max(failed, key=_time).get("message", ""))
    refused = refusal(words)
    return refused._replace(message=f"pods cannot be created: {words}")


def refusal(words: str) -> Obstacle:
    """Why the API server refuses an object. Reason InvalidConfig: only another manifest can help."""
    wrong = fault(words)
    if wrong is not None:
        return Obstacle("InvalidConfig", f"the API server refuses the Job: {wrong}")
    words = _REFUSED_OBJECT.sub("", words)
    if "exceeded quota" in words:
        remedy = "It goes on as soon as there is room: free some of the quota, have it raised, or ask for less."
        return Obstacle("QuotaExceeded", words, remedy=remedy)
    if "failed quota" in words:
        remedy = "The quota counts only pods that say what they need: set it under workers.resources."
        return Obstacle("QuotaExceeded", words, remedy=remedy)
    remedy = next((told for known, told in _ADMISSION if known in words), "Change what it objects to.")
    return Obstacle("AdmissionDenied", words, remedy=remedy)


_ADMISSION: Final = (
    ("violates PodSecurity", "Have the namespace's Pod Security level changed, or drop what it forbids."),
    ("failed calling webhook", "The webhook does not answer: whoever runs it must repair it."),
    ("denied the request", "Ask whoever runs the webhook, or change what it objects to."),
    ("less than or equal to memory limit", "A LimitRange of the namespace bounds it: stay within it, or raise it."),
    (" usage per ", "A LimitRange of the namespace bounds it: stay within it under workers.resources."),
    ("service account", "Create the ServiceAccount, or name one that exists."),
    ("serviceaccount", "Create the ServiceAccount, or name one that exists."),
    ("PriorityClass", "Create the PriorityClass, or name one that exists."),
    ("RuntimeClass", "Create the RuntimeClass, or name one that exists."),
    ("being terminated", "The namespace is being deleted: nothing can be created in it."),
    ("cannot create resource", "The operator's account lacks this right: install it with rights for this namespace."),
    ("cannot patch resource", "The operator's account lacks this right: install it with rights for this namespace."),
)
"""Words of the API server, and what they ask for."""


def _unbound(pod: Manifest, events: Events) -> Obstacle | None:
    """Why a claim is not bound, in the words of whoever should bind it."""
    for claim in _claims(pod):
        found = [event for event in events.get(claim, ()) if event.get("reason") not in _BOUND]
        if not found:
            continue
        last = max(found, key=_time)
        told = f'PersistentVolumeClaim "{claim.name}" is not bound: {last.get("message", "")}'
        remedy = "Name a StorageClass that exists and can provide it, or create a PersistentVolume for it."
        if last.get("type") == "Normal" and last.get("reason") != "FailedBinding":
            remedy = "If this lasts, the provisioner of its StorageClass does not work."
        since = moment(pod["metadata"].get("creationTimestamp"))
        return Obstacle("VolumeNotBound", f"{name_of(pod)} waits: {told}", since=since, remedy=remedy)
    return None


_BOUND: Final = frozenset({"ProvisioningSucceeded", "Resizing", "FileSystemResizeSuccessful"})


def _late(pod: Manifest, events: Events, now: datetime | None) -> Obstacle | None:
    """Why a pod that has a node is still being made, by its newest Event."""
    if not _is_late(pod) or condition(pod, "PodScheduled") is None:
        return None
    found = [event for event in events.get(about(pod), ()) if event.get("reason") not in _OLD]
    return _by_event(pod, max(found, key=_time)) if found else _silent(pod, now)


def _by_event(pod: Manifest, event: Manifest) -> Obstacle | None:
    reason, words = event.get("reason", ""), " ".join(event.get("message", "").split())
    if reason == "Pulling":
        image = words.removeprefix("Pulling image ").strip('"')
        return Obstacle("Starting", f"{name_of(pod)} pulls image {image} on {node_of(pod)}", warning=False)
    if event.get("type") != "Warning":
        return None
    if reason in ("FailedMount", "FailedAttachVolume", "FailedMapVolume"):
        return _mount(pod, words)
    if reason == "FailedCreatePodSandBox":
        remedy = f"The network or the runtime of {node_of(pod)} does not work: its administrator must look at it."
        return Obstacle("SandboxFailed", f"{name_of(pod)} gets no sandbox: {words}", remedy=remedy)
    return Obstacle("PodNotStarted", f"{name_of(pod)} does not start on {node_of(pod)} ({reason}): {words}")


def _mount(pod: Manifest, words: str) -> Obstacle:
    told = f"{name_of(pod)} cannot mount its volumes on {node_of(pod)}: {words}"
    if (missing := _missing(words)) is not None:
        return missing._replace(message=told)
    remedy = "Check that the volume is there and that this node can reach it."
    if "Multi-Attach" in words or "already used by" in words or "already exclusively attached" in words:
        remedy = "Another pod holds the volume: end it, or use a claim that several nodes can mount (ReadWriteMany)."
    return Obstacle("MountFailed", told, remedy=remedy)


def _silent(pod: Manifest, now: datetime | None) -> Obstacle | None:
    """A node that has not even taken note of its pod."""
    since = moment(_since(pod))
    if now is None or since is None or (now - since).total_seconds() < SILENCE_SECONDS:
        return None
    if pod.get("status", {}).get("containerStatuses"):
        words = f"{name_of(pod)} is being set up on {node_of(pod)}: its volumes and its network"
        return Obstacle("Starting", words, warning=False)
    remedy = "Its kubelet may be down: kubectl describe node tells."
    return Obstacle("NodeSilent", f"{name_of(pod)} was given to {node_of(pod)}, which does not start it", remedy=remedy)


def _conditions(pod: Manifest) -> list[Manifest]:
    found: list[Manifest] = pod.get("status", {}).get("conditions") or []
    return found


def _time(event: Manifest) -> str:
    """When the Event was last seen; the API writes it in one of three places."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    told = next((time for time in times if time), None) or event.get("firstTimestamp") or ""
    return str(told)
