"""What Jobs and pods say, and why one of them ended. Pure functions over API objects."""

import re
import signal
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kubetune_contract.config import RunConfig
from kubetune_contract.errors import as_in_manifests
from kubetune_contract.exit_codes import USER_ERRORS, ExitCode, reason_of
from kubetune_contract.progress import TerminationMessage
from kubetune_operator.disruptions import explained
from kubetune_operator.names import CONTAINER

Manifest = dict[str, Any]

INDEX_LABEL: Final = "batch.kubernetes.io/job-completion-index"
LOG_LINES: Final = 12
"""Last lines of a log that are worth quoting."""

_EXIT_CODE: Final = re.compile(r"failed with exit code (\d+)")
_LEAVING: Final = frozenset({ExitCode.SAVED, ExitCode.PEER_LOST, 128 + signal.SIGTERM, 128 + signal.SIGABRT})
"""NCCL's watchdog aborts a process that has lost a peer."""


class Inquiry(NamedTuple):
    """An object whose Events are to be read: its own status does not say all."""

    kind: str
    name: str
    uid: str | None = None
    """None for an object that is known by its name alone."""


Events = Mapping[Inquiry, Sequence[Manifest]]
"""Events by the object that they are about."""


class Cause(IntEnum):
    """Why a pod ended, the most telling cause first."""

    USER_ERROR = 0
    DISRUPTION = 1
    REMOVED = 2
    CRASH = 3
    LEFT = 4
    """It saved on a signal or lost a peer: somebody else went first."""
    UNCLEAR = 5
    """It was deleted in the second in which its Job was found to fail: cause or consequence."""
    COLLATERAL = 6
    """The Job controller ended it because another pod had failed."""


class Ending(NamedTuple):
    """Why an attempt or a staging ended."""

    cause: Cause
    reason: str
    message: str
    log: str = ""
    """The last lines of its log, where it left no message of its own."""

    def told(self, *more: str) -> str:
        """The message, further sentences, and the log under them."""
        text = " ".join((ended(self.message), *more))
        return f"{text}\nLast lines of its log:\n{self.log}" if self.log else text


def ended(text: str) -> str:
    """The text with a full stop, so that a sentence can follow. Its first letter stays: it may be a path's."""
    text = text.strip()
    return text if text[-1:] in (".", "!", "?") else f"{text}."


def moment(text: str | None) -> datetime | None:
    """An API timestamp."""
    return datetime.fromisoformat(text) if text else None


def condition(manifest: Manifest, kind: str) -> Manifest | None:
    """The True condition of that type of a Job or pod."""
    conditions = manifest.get("status", {}).get("conditions") or []
    return next((item for item in conditions if item["type"] == kind and item["status"] == "True"), None)


def ending_condition(job: Manifest) -> Manifest | None:
    """The condition that says that the Job fails or has failed."""
    return condition(job, "Failed") or condition(job, "FailureTarget")


def is_decided(job: Manifest) -> bool:
    """Whether the Job is complete, or fails or has failed: its end is certain."""
    return condition(job, "Complete") is not None or ending_condition(job) is not None


def is_over(job: Manifest) -> bool:
    """Whether the Job is complete or has failed: none of its pods runs."""
    return condition(job, "Complete") is not None or condition(job, "Failed") is not None


def is_deleting(manifest: Manifest) -> bool:
    """Whether somebody asked for the object's deletion."""
    return "deletionTimestamp" in manifest["metadata"]


def is_live(pod: Manifest) -> bool:
    """Whether the pod's containers may still run."""
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


def is_lost(pod: Manifest, now: datetime, grace_seconds: float) -> bool:
    """Whether the pod should have been gone for so long that its node must be unreachable.

    A deletionTimestamp already includes the pod's own grace period.
    """
    due = moment(pod["metadata"].get("deletionTimestamp"))
    return due is not None and now >= due + timedelta(seconds=grace_seconds)


def is_ready(pod: Manifest) -> bool:
    """Whether all containers of the pod run."""
    return condition(pod, "Ready") is not None


def index_of(pod: Manifest) -> int:
    """The pod's completion index; 0 where it has none."""
    return int(pod["metadata"].get("labels", {}).get(INDEX_LABEL, 0))


def name_of(pod: Manifest) -> str:
    """The pod in a sentence: `worker 1`, or `the staging pod`."""
    labels = pod["metadata"].get("labels", {})
    return f"worker {labels[INDEX_LABEL]}" if INDEX_LABEL in labels else "the staging pod"


def about(pod: Manifest) -> Inquiry:
    """The pod's own Events."""
    return Inquiry("Pod", pod["metadata"]["name"], pod["metadata"].get("uid"))


def node_of(pod: Manifest) -> str:
    """The pod's node in a sentence: `node "gpu-3"`."""
    name = pod["spec"].get("nodeName")
    return f'node "{name}"' if name else "its node"


def ended_container(pod: Manifest) -> Manifest | None:
    """The terminated state of our own container, or of another one that failed and took the pod along."""
    return _ended(pod)[1]


def _ended(pod: Manifest) -> tuple[str, Manifest | None]:
    """The container that tells how the pod ended, and its terminated state."""
    status = pod.get("status", {})
    states = [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]
    over = [(one.get("name", CONTAINER), one["state"]["terminated"]) for one in states if "terminated" in one["state"]]
    ours = [item for item in over if item[0] == CONTAINER]
    others = [item for item in over if item[1].get("exitCode")]
    return next(iter([*ours, *others]), (CONTAINER, None))


def last_word(pod: Manifest) -> TerminationMessage | None:
    """What our program left as its termination message, with fields spelt as in the manifest; None if it left none."""
    state = ended_container(pod)
    try:
        word = TerminationMessage.model_validate_json((state or {}).get("message") or "")
    except ValidationError:
        return None
    return word.model_copy(update={"message": as_in_manifests(word.message, RunConfig)})


def ending(job: Manifest, pods: Iterable[Manifest], events: Events | None = None) -> Ending | None:
    """Why the failed or failing Job ended. None if no pod shows it: the caller may wait a moment for one."""
    end = ending_condition(job) or {}
    since = moment(end.get("lastTransitionTime"))
    failed = _failed(pods, since)
    if not failed:
        return None
    first = failed[0]
    cause = cause_of(first, since)
    if cause is Cause.UNCLEAR and len(failed) == 1:
        cause = Cause.REMOVED  # the others certainly went later
    if cause > Cause.DISRUPTION and "DisruptionTarget" in end.get("message", ""):
        return Ending(Cause.DISRUPTION, "Disruption", end["message"])
    return _told(cause, first, events or {})


def failed_tries(pods: Iterable[Manifest]) -> str:
    """How often a Job that retries by itself has failed so far, and why the last time; "" if never."""
    failed = sorted((pod for pod in pods if _has_failed(pod) and not is_live(pod)), key=_finished)
    if not failed:
        return ""
    why = _told(cause_of(failed[-1], None), failed[-1], {})
    tries = "One try has failed" if len(failed) == 1 else f"{len(failed)} tries have failed, the last one so"
    return f"{tries}: {ended(why.message)}"


def culprit(job: Manifest, pods: Iterable[Manifest]) -> Manifest | None:
    """The pod whose end is the best reason for the Job's; None if none shows one."""
    failed = _failed(pods, moment((ending_condition(job) or {}).get("lastTransitionTime")))
    return failed[0] if failed else None


def _failed(pods: Iterable[Manifest], since: datetime | None) -> list[Manifest]:
    """The pods that failed by themselves, the one that tells most first."""
    causes = [(cause_of(pod, since), pod) for pod in pods if _has_failed(pod)]
    crashed = min((_finished(pod) for cause, pod in causes if cause is Cause.CRASH), default="9999")
    # Who was deleted after a peer's crash was deleted for it: the Job's condition may be written late.
    late = [pod for cause, pod in causes if cause in (Cause.REMOVED, Cause.UNCLEAR) and _asked(pod) > crashed]
    own = [(cause, pod) for cause, pod in causes if cause is not Cause.COLLATERAL and pod not in late]
    return [pod for _, pod in sorted(own, key=lambda one: (one[0], _finished(one[1]), index_of(one[1])))]


def _asked(pod: Manifest) -> str:
    return f"{asked:%Y-%m-%dT%H:%M:%SZ}" if (asked := _deletion_asked(pod)) else ""


def ending_by_job(job: Manifest) -> Ending:
    """Why the Job ended, where only its own condition is left to tell it."""
    end = ending_condition(job) or {}
    name, reason, words = job["metadata"]["name"], end.get("reason", ""), end.get("message", "")
    if "DisruptionTarget" in words:
        return Ending(Cause.DISRUPTION, "Disruption", words)
    told, code = f"Job {name} has failed: {words or reason}", _EXIT_CODE.search(words)
    if code is not None and int(code[1]) in USER_ERRORS:
        return Ending(Cause.USER_ERROR, reason_of(int(code[1])), told)
    if reason == "BackoffLimitExceeded":
        told = f"Job {name} has failed: a pod failed or was deleted, and nothing of it is left to read"
    return Ending(Cause.CRASH, reason if reason == "DeadlineExceeded" else ExitCode.CRASH.reason, told)


def cause_of(pod: Manifest, end: datetime | None) -> Cause:
    """Why the pod ended, given when its Job was found to fail."""
    container, state = _ended(pod)
    code = (state or {}).get("exitCode") if container == CONTAINER else None
    if code in USER_ERRORS:
        return Cause.USER_ERROR
    if condition(pod, "DisruptionTarget") is not None or _was_rejected(pod):
        return Cause.DISRUPTION
    asked = _deletion_asked(pod)
    if asked is not None and end is not None and asked >= end:
        return Cause.COLLATERAL if asked > end else Cause.UNCLEAR
    if asked is not None:
        return Cause.REMOVED
    return Cause.LEFT if code in _LEAVING and not _is_over_limit(pod) else Cause.CRASH


def node_lost(pod: Manifest) -> Ending:
    """The end of an attempt one of whose pods should be gone and is not: its peers only lost it."""
    who = _capital(name_of(pod))
    return Ending(Cause.DISRUPTION, "NodeLost", f"{who} does not end on {node_of(pod)}, which no longer answers")


def was_preempted(pod: Manifest) -> bool:
    """Whether the scheduler took the pod's place for another one. Its Events name that one."""
    return (condition(pod, "DisruptionTarget") or {}).get("reason") == "PreemptionByScheduler"


def disruption(pod: Manifest, events: Events, verb: str) -> tuple[str, str]:
    """Reason and sentence of a pod that is taken away from outside, such as `worker 1 must leave node "a": ...`."""
    target = condition(pod, "DisruptionTarget") or {}
    kind, words = target.get("reason", ""), target.get("message", "").strip()
    reason, why = explained(kind, words, events.get(about(pod), ()))
    return reason, f"{name_of(pod)} {verb} {node_of(pod)}: {why} ({kind}: {words})"


def _told(cause: Cause, pod: Manifest, events: Events) -> Ending:
    who, word = _capital(name_of(pod)), last_word(pod)
    if cause is Cause.DISRUPTION:
        return _rejected(pod) if _was_rejected(pod) else _disrupted(pod, events)
    if cause is Cause.REMOVED:
        return Ending(cause, "PodDeleted", f"{who}'s pod was deleted")
    if cause is Cause.UNCLEAR:
        return Ending(cause, "PodDeleted", "A worker's pod was deleted")
    if cause is Cause.USER_ERROR and word is not None:
        return Ending(cause, word.reason, word.message)
    if _is_over_limit(pod):
        told = f"{who} was ended by {node_of(pod)}: {pod['status'].get('message', '').strip()}"
        remedy = "Raise ephemeral-storage under workers.resources.limits: /tmp and all that is not a volume count"
        return Ending(cause, "StorageLimitExceeded", f"{ended(told)} {remedy}")
    return _by_code(cause, pod, who, word)


def _by_code(cause: Cause, pod: Manifest, who: str, word: TerminationMessage | None) -> Ending:
    container, state = _ended(pod)
    state = state or {}
    code, kind = state.get("exitCode", ExitCode.CRASH), state.get("reason")
    if kind in _NOT_STARTED:
        return Ending(cause, "StartError", f"{who}'s container could not be started: {state.get('message', '')}")
    name = who if container == CONTAINER else f'{who}\'s container "{container}"'
    message = f"{name} ended with exit code {code}"
    if kind == "OOMKilled":
        return Ending(cause, "OOMKilled", f"{message} ({_out_of_memory(pod, container)}", _log(pod, state, word))
    message += _signal(code)
    if word is not None:
        more = "" if word.message.endswith(f"exit code {code}") else f": {word.message}"  # the launcher knows no more
        return Ending(cause, word.reason, f"{message}{more}", word.log or "")
    reason = reason_of(code) if container == CONTAINER else ExitCode.CRASH.reason
    return Ending(cause, reason, message, _log(pod, state, word))


_NOT_STARTED: Final = ("StartError", "ContainerCannotRun")


def _out_of_memory(pod: Manifest, name: str) -> str:
    spec = pod["spec"]
    containers = [*spec["containers"], *(spec.get("initContainers") or [])]
    found = next((one for one in containers if one["name"] == name), containers[0])
    limit = found.get("resources", {}).get("limits", {}).get("memory")
    if limit is None:
        return "OOMKilled; it has no memory limit, its node ran out). Request the memory that it needs"
    if INDEX_LABEL not in pod["metadata"].get("labels", {}):
        return f"OOMKilled; memory limit {limit}). Staging asks for no limit: raise that of the namespace's LimitRange"
    return (
        f"OOMKilled; memory limit {limit}). Raise workers.resources.limits.memory, or lower training.batchSize, "
        "dataset.maxSequenceLength or the processes of a worker"
    )


def _signal(code: int) -> str:
    """What ended a process that gave no exit code of its own."""
    if code == 128 + signal.SIGKILL:
        return " (SIGKILL, but not by its own memory limit: often its node ran out of memory)"
    if code == 128 + signal.SIGABRT:
        return " (SIGABRT: on GPUs it is NCCL's watchdog that aborts a process whose peer is gone or silent)"
    known = {128 + number: number.name for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGTERM)}
    return f" ({known[code]})" if code in known else ""


def _disrupted(pod: Manifest, events: Events) -> Ending:
    reason, told = disruption(pod, events, "had to leave")
    return Ending(Cause.DISRUPTION, reason, _capital(told))


def _was_rejected(pod: Manifest) -> bool:
    """Whether the kubelet has not taken the pod at all."""
    status = pod.get("status", {})
    if condition(pod, "DisruptionTarget") is not None or ended_container(pod) is not None:
        return False
    return status.get("phase") == "Failed" and bool(status.get("reason"))


def _rejected(pod: Manifest) -> Ending:
    status = pod["status"]
    words = status.get("message", "").strip().removeprefix("Pod was rejected: ")
    told = f"{_capital(node_of(pod))} did not take {name_of(pod)} ({status['reason']}): {words}"
    return Ending(Cause.DISRUPTION, "NodeRejected", told)


def _is_over_limit(pod: Manifest) -> bool:
    """Whether the kubelet ended the pod for writing more than it may: that is no disruption, it would do so again."""
    return pod.get("status", {}).get("reason") == "Evicted" and condition(pod, "DisruptionTarget") is None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _log(pod: Manifest, state: Manifest, word: TerminationMessage | None) -> str:
    if word is not None:
        return word.log or ""
    text = state.get("message") or pod.get("status", {}).get("message") or ""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[-LOG_LINES:])


def _has_failed(pod: Manifest) -> bool:
    state = ended_container(pod)
    if state is not None:
        return bool(state.get("exitCode"))
    leaving = _deletion_asked(pod) is not None or condition(pod, "DisruptionTarget") is not None
    return leaving or pod.get("status", {}).get("phase") == "Failed"


def _finished(pod: Manifest) -> str:
    return (ended_container(pod) or {}).get("finishedAt") or "9999"


def _deletion_asked(pod: Manifest) -> datetime | None:
    due = moment(pod["metadata"].get("deletionTimestamp"))
    return due and due - timedelta(seconds=pod["metadata"].get("deletionGracePeriodSeconds") or 0)
