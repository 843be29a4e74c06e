"""What Jobs and pods say, and why one of them ended. Pure functions over API objects."""

import signal
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from kubetune_contract.exit_codes import USER_ERRORS, ExitCode, reason_of
from kubetune_contract.progress import TerminationMessage

Manifest = dict[str, Any]

INDEX_LABEL: Final = "batch.kubernetes.io/job-completion-index"
LOG_LINES: Final = 12
"""Last lines of a log that are worth quoting."""

_LEAVING: Final = frozenset({ExitCode.SAVED, ExitCode.PEER_LOST, 128 + signal.SIGTERM})


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


def node_of(pod: Manifest) -> str:
    """The pod's node in a sentence: `node "gpu-3"`."""
    name = pod["spec"].get("nodeName")
    return f'node "{name}"' if name else "its node"


def ended_container(pod: Manifest) -> Manifest | None:
    """The terminated state of the pod's container."""
    for container in pod.get("status", {}).get("containerStatuses") or []:
        state: Manifest | None = container.get("state", {}).get("terminated")
        if state is not None:
            return state
    return None


def last_word(pod: Manifest) -> TerminationMessage | None:
    """What our program left as its termination message; None if it is a log tail or nothing."""
    state = ended_container(pod)
    try:
        return TerminationMessage.model_validate_json((state or {}).get("message") or "")
    except ValidationError:
        return None


def ending(job: Manifest, pods: Iterable[Manifest]) -> Ending | None:
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
    return _told(cause, first)


def culprit(job: Manifest, pods: Iterable[Manifest]) -> Manifest | None:
    """The pod whose end is the best reason for the Job's; None if none shows one."""
    failed = _failed(pods, moment((ending_condition(job) or {}).get("lastTransitionTime")))
    return failed[0] if failed else None


def _failed(pods: Iterable[Manifest], since: datetime | None) -> list[Manifest]:
    """The pods that failed by themselves, the one that tells most first."""
    failed = [pod for pod in pods if _has_failed(pod) and cause_of(pod, since) is not Cause.COLLATERAL]
    return sorted(failed, key=lambda pod: (cause_of(pod, since), _finished(pod), index_of(pod)))


def ending_by_job(job: Manifest) -> Ending:
    """Why the Job ended, where only its own condition is left to tell it."""
    end = ending_condition(job) or {}
    name, reason, words = job["metadata"]["name"], end.get("reason", ExitCode.CRASH.reason), end.get("message", "")
    if "DisruptionTarget" in words:
        return Ending(Cause.DISRUPTION, "Disruption", words)
    if reason == "BackoffLimitExceeded":
        words = "a pod failed or was deleted, and nothing of it is left to read"
    return Ending(Cause.CRASH, reason, f"Job {name} has failed: {words or reason}")


def cause_of(pod: Manifest, end: datetime | None) -> Cause:
    """Why the pod ended, given when its Job was found to fail."""
    code = (ended_container(pod) or {}).get("exitCode")
    if code in USER_ERRORS:
        return Cause.USER_ERROR
    if condition(pod, "DisruptionTarget") is not None:
        return Cause.DISRUPTION
    asked = _deletion_asked(pod)
    if asked is not None and end is not None and asked >= end:
        return Cause.COLLATERAL if asked > end else Cause.UNCLEAR
    if asked is not None:
        return Cause.REMOVED
    return Cause.LEFT if code in _LEAVING else Cause.CRASH


def _told(cause: Cause, pod: Manifest) -> Ending:
    state, who = ended_container(pod) or {}, name_of(pod)
    who = who[0].upper() + who[1:]
    code, word = state.get("exitCode", ExitCode.CRASH), last_word(pod)
    if cause is Cause.DISRUPTION:
        evicted = condition(pod, "DisruptionTarget") or {}
        return Ending(cause, "Disruption", f"{who} was evicted ({evicted.get('reason')}: {evicted.get('message')})")
    if cause is Cause.REMOVED:
        return Ending(cause, "PodDeleted", f"{who}'s pod was deleted")
    if cause is Cause.UNCLEAR:
        return Ending(cause, "PodDeleted", "A worker's pod was deleted")
    if cause is Cause.USER_ERROR and word is not None:
        return Ending(cause, word.reason, word.message)
    message = f"{who} ended with exit code {code}{_circumstances(pod, state)}"
    if word is not None:
        return Ending(cause, word.reason, f"{message}: {word.message}")
    reason = "OOMKilled" if state.get("reason") == "OOMKilled" else reason_of(code)
    return Ending(cause, reason, message, _log(pod, state))


def _circumstances(pod: Manifest, state: Manifest) -> str:
    if state.get("reason") != "OOMKilled":
        return ""
    limits = (container.get("resources", {}).get("limits", {}) for container in pod["spec"]["containers"])
    limit = next((limit["memory"] for limit in limits if "memory" in limit), None)
    return f" (OOMKilled; memory limit {limit})" if limit else " (OOMKilled; it has no memory limit, its node ran out)"


def _log(pod: Manifest, state: Manifest) -> str:
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
