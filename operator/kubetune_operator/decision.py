"""One reconcile in the making: what was observed, what is decided, and the status that tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from kubetune_contract.progress import ProgressReport
from kubetune_operator.api import KIND, Condition, ConditionType, Display, FineTuneJob, FineTuneJobStatus
from kubetune_operator.diagnosis import (
    Cause,
    Ending,
    Events,
    Inquiry,
    Manifest,
    about,
    culprit,
    disruption,
    ended,
    ending,
    is_live,
    is_lost,
    moment,
    node_lost,
    was_preempted,
)
from kubetune_operator.names import ATTEMPT_LABEL, QUEUE_LABEL
from kubetune_operator.obstacles import Obstacle, inquiries, not_created, obstacle
from kubetune_operator.settings import Settings
from kubetune_operator.status import (
    clipped,
    clock_stopped,
    find,
    is_true,
    readable_bytes,
    seconds_of,
    state_of,
    with_condition,
)

TRUSTED_SECONDS: Final = 300.0
"""Age of the last look at a ConfigMap or Service, which are not watched, after which it is looked at again."""
EVIDENCE_SECONDS: Final = 5.0
"""How long a finished Job may wait for the cache to show its pods' last words."""


class StageView(NamedTuple):
    """A staging Job as the caches know it."""

    job: Manifest
    pods: Sequence[Manifest] = ()
    shared: bool = False
    """Another FineTuneJob that is neither finished nor suspended needs it too."""


@dataclass(frozen=True)
class Observed:
    """What the caches know of one FineTuneJob's children."""

    stages: Mapping[str, StageView] = field(default_factory=dict)
    """The staging Jobs that are there, by name."""
    attempt_jobs: dict[int, Manifest] = field(default_factory=dict)
    """The worker Jobs that this very FineTuneJob owns, by attempt."""
    pods: list[Manifest] = field(default_factory=list)
    """Worker pods of all attempts."""
    gone_pods: list[Manifest] = field(default_factory=list)
    """The last sight of worker pods that are no more."""
    progress: ProgressReport | None = None
    """The report to show, of the present attempt."""
    reports_since: datetime | None = None
    """Since when this operator takes reports: what came before may have come to nobody."""
    conflict: str | None = None
    """Why a child could not be created: an object of that name is not ours."""
    refused: Obstacle | None = None
    """Why the API server refused a child."""
    events: Events = field(default_factory=dict)
    """Events that an earlier plan asked for."""


class Event(NamedTuple):
    """An Event to post on the FineTuneJob."""

    type: str
    reason: str
    message: str


class Deletion(NamedTuple):
    """A child to delete, with all that depends on it."""

    kind: str
    name: str
    uid: str


class Removal(NamedTuple):
    """A child that is known by name only, to delete if it belongs to this FineTuneJob."""

    kind: str
    name: str


class Stop(NamedTuple):
    """A child Job whose running pods are to end, while it and its ended pods stay."""

    name: str
    uid: str


class Suspension(NamedTuple):
    """A child Job to suspend or to resume."""

    name: str
    uid: str
    suspended: bool


@dataclass(frozen=True)
class Plan:
    """What to do now, in this order, and when to look again."""

    apply: list[Manifest]
    suspend: list[Suspension]
    delete: list[Deletion]
    status: FineTuneJobStatus
    events: list[Event]
    requeue_after: float | None
    """Seconds after which time alone may change the plan."""
    inquiries: tuple[Inquiry, ...] = ()
    """Objects whose Events would tell more. They are read before the status is written, and the plan is made anew."""
    stop: list[Stop] = field(default_factory=list)
    remove: list[Removal] = field(default_factory=list)
    trusted_seconds: float = TRUSTED_SECONDS
    """How long ago a ConfigMap or Service may have been seen for the last time to count as being there."""


class Decision:
    """Collects one plan. Children are only removed after the status that explains it was written."""

    def __init__(self, job: FineTuneJob, observed: Observed, settings: Settings, now: datetime) -> None:
        self.job = job
        self.observed = observed
        self.settings = settings
        self.now = now
        self.status = job.status.model_copy(update={"observed_generation": job.generation})
        self._apply: list[Manifest] = []
        self._suspend: list[Suspension] = []
        self._delete: list[Deletion] = []
        self._events: list[Event] = []
        self._stop: list[Stop] = []
        self._remove: list[Removal] = []
        self._trusted_seconds = TRUSTED_SECONDS
        self.waiting_for: ConditionType | None = None
        """The condition that says why the staging pod or the workers are not up, while they are waited for."""
        self.queued = False
        """Whether a queue holds the job back: it waits for nobody else, and its time does not count."""
        self._requeue_after: float | None = None
        self._inquiries: list[Inquiry] = []

    @property
    def attempt(self) -> int:
        """The number of the present attempt."""
        return max(1, self.status.attempt)

    def workers_of(self, attempt: int) -> list[Manifest]:
        """The worker pods of one attempt."""
        return [pod for pod in self.observed.pods if attempt_of(pod) == attempt]

    def set(self, **fields: Any) -> None:
        """Set fields of the status."""
        self.status = self.status.model_copy(update=fields)

    def condition(self, kind: ConditionType, holds: bool, reason: str, message: str, event: str | None = None) -> None:
        """Set a condition; `event` is the type of the Event that tells people when its status or reason changes.

        Events are for trouble, for its end and for the end of the job: what goes as expected the conditions tell.
        """
        text = clipped(message)
        before = find(self.status, kind)
        state = "True" if holds else "False"
        self.status = with_condition(
            self.status,
            Condition(
                type=kind,
                status="True" if holds else "False",
                reason=reason,
                message=text,
                last_transition_time=seconds_of(self.now),
                observed_generation=self.job.generation,
            ),
        )
        if event is not None and (before is None or (before.status, before.reason) != (state, reason)):
            self._events.append(Event(event, reason, text))

    def said_otherwise(self, kind: ConditionType, reason: str) -> bool:
        """Whether the job's condition has another reason than that of the way on which all goes well."""
        before = find(self.job.status, kind)
        return before is not None and before.reason != reason

    def withdraw(self, kind: ConditionType, reason: str, message: str) -> None:
        """Set a condition to False if it was ever set: a thing that never held needs no denial."""
        if find(self.status, kind) is not None:
            self.condition(kind, False, reason, message)

    def fail(self, reason: str, message: str) -> None:
        """End the job for good."""
        self.condition("Failed", True, reason, message)
        self._events.append(Event("Warning", "Failed", f"{reason}: {clipped(message)}"))
        self.condition("Succeeded", False, reason, message)
        self._stand_still(reason, "The job has failed.")

    def succeed(self, message: str) -> None:
        """End the job well."""
        self.condition("Succeeded", True, "Done", message)
        self._events.append(Event("Normal", "Succeeded", clipped(message)))
        self._stand_still("Done", "The job has succeeded.")

    def _stand_still(self, reason: str, message: str) -> None:
        self.withdraw("Running", reason, message)
        if is_true(self.status, "Suspended"):
            self.withdraw("Suspended", reason, message)
        self.status = clock_stopped(self.status, self.now)
        self.set(completion_time=seconds_of(self.now), next_attempt_time=None, waiting_since=None)
        self._requeue_after = None
        self.withhold()

    def inquire(self, *about: Inquiry) -> None:
        """Ask for the Events of these objects."""
        self._inquiries += [item for item in about if item not in self._inquiries]

    def obstacle(self, child: Manifest, wanted: int, pods: list[Manifest]) -> Obstacle | None:
        """What keeps a child Job from having that many running pods; asks for the Events that may say more."""
        asked, wait = inquiries(child, wanted, pods, self.now)
        self.inquire(*asked)
        if wait is not None:
            self.look_again(wait)
        events = {item: self.observed.events.get(item, ()) for item in asked}
        found = obstacle(pods, events, self.now)
        return found if found is not None and found.warning else not_created(child, events) or found

    def blocked(self, kind: ConditionType, found: Obstacle, prefix: str = "") -> None:
        """Say what keeps a pod from starting. A claim that stays missing ends the job.

        The kubelet alternates between two wordings of an image that it cannot pull: the first one stays.
        """
        before = find(self.status, kind)
        if found.reason == "ImagePull" and before is not None and before.reason == "ImagePull":
            return
        if found.missing_claim is not None and self._grace_is_over(found):
            message = self._missing(found.missing_claim)
            self.condition(kind, False, found.reason, message)
            self.fail(found.reason, message)
            return
        message = prefix + found.told
        event = "Warning" if found.warning else None
        self.condition(kind, False, found.reason, message[0].upper() + message[1:], event)

    def ending(self, child: Manifest, pods: list[Manifest]) -> Ending | None:
        """Why a failing child Job ended, given all its pods, also those that are gone; None if none shows it."""
        first = culprit(child, pods)
        if first is not None and was_preempted(first):
            self.inquire(about(first))
        why = ending(child, pods, self.observed.events)
        lost = self.lost(pods) if why is not None and why.cause in (Cause.LEFT, Cause.UNCLEAR) else None
        return lost or (why and self._with_estimate(why))

    def lost(self, pods: list[Manifest]) -> Ending | None:
        """The end of an attempt one of whose pods stays Terminating; until its grace is over, look again then.

        Nobody ends such a pod, so its Job does not fail either: a Job waits for its pods to end.
        """
        grace = self.settings.lost_node_grace_seconds
        for pod in pods:
            due = moment(pod["metadata"].get("deletionTimestamp"))
            if due is None or not is_live(pod):
                continue
            if is_lost(pod, self.now, grace):
                return node_lost(pod)
            self.look_again_at(due + timedelta(seconds=grace))
        return None

    def _with_estimate(self, why: Ending) -> Ending:
        """A worker on the CPU that ran out of memory is told what it was expected to need."""
        expected = self.status.estimate
        if why.reason != "OOMKilled" or expected is None or expected.device != "Pod":
            return why
        needs = f"A step takes at most {readable_bytes(expected.bytes)} by the estimate"
        return why._replace(message=f"{ended(why.message)} {needs}")

    def disruption(self, pod: Manifest) -> tuple[str, str]:
        """Reason and sentence of a pod that is being taken away from outside."""
        if was_preempted(pod):
            self.inquire(about(pod))
        reason, told = disruption(pod, self.observed.events, "must leave")
        return reason, ended(told[0].upper() + told[1:])

    def _grace_is_over(self, found: Obstacle) -> bool:
        since = found.since or self.now
        left = (since - self.now).total_seconds() + self.settings.volume_grace_seconds
        if left > 0:
            self.look_again(left)
        return left <= 0

    def _missing(self, claim: str) -> str:
        storage = self.job.spec.storage
        named = {"spec.storage.models.claimName": storage.models, "spec.storage.output.claimName": storage.output}
        fields = " and ".join(field for field, value in named.items() if value.claim_name == claim)
        return (
            f'PersistentVolumeClaim "{claim}" ({fields or "storage"}) does not exist '
            f"in namespace {self.job.namespace}: create it, or name one that exists, and submit the job again"
        )

    def apply(self, *manifests: Manifest) -> None:
        """Create or keep children, in this order."""
        self._apply.extend(manifests)

    def withhold(self) -> None:
        """Apply, suspend and resume nothing after all."""
        self._apply.clear()
        self._suspend.clear()

    def suspend(self, child: Manifest, suspended: bool) -> None:
        """Suspend or resume a child Job that is not so already. One in a queue is Kueue's: it only can be deleted."""
        if QUEUE_LABEL in child["metadata"].get("labels", {}):
            if suspended:
                self.delete(child)
            return
        if bool(child["spec"].get("suspend")) != suspended:
            self._suspend.append(Suspension(child["metadata"]["name"], child["metadata"]["uid"], suspended))

    def delete(self, child: Manifest) -> None:
        """Delete a child Job that is not being deleted already."""
        if "deletionTimestamp" not in child["metadata"]:
            self._delete.append(Deletion("Job", child["metadata"]["name"], child["metadata"]["uid"]))

    def delete_job(self) -> None:
        """Delete the FineTuneJob itself."""
        self._delete.append(Deletion(KIND, self.job.name, self.job.uid))

    def stop(self, child: Manifest) -> None:
        """End the running pods of a child Job that is not suspended."""
        self._stop.append(Stop(child["metadata"]["name"], child["metadata"]["uid"]))

    def remove(self, kind: str, name: str) -> None:
        """Delete a child that is known by name only."""
        self._remove.append(Removal(kind, name))

    def trust(self, seconds: float) -> None:
        """Have ConfigMap and Service looked at again if the last look was so long ago."""
        self._trusted_seconds = seconds

    def look_again(self, seconds: float) -> None:
        """Plan again after so many seconds, or sooner if somebody else asked for it."""
        seconds = max(0.05, seconds)
        self._requeue_after = min(seconds, self._requeue_after or seconds)

    def look_again_at(self, due: datetime) -> None:
        """Plan again at that moment."""
        self.look_again((due - self.now).total_seconds())

    def evidence_due(self, ended: str | None) -> bool:
        """Whether last words should have arrived by now, given the API's time of the end; if not, look again soon."""
        left = ((moment(ended) or self.now) - self.now).total_seconds() + EVIDENCE_SECONDS
        if left > 0:
            self.look_again(min(1.0, left))
        return left <= 0

    def in_seconds(self, seconds: float) -> datetime:
        """The moment so many seconds from now, rounded up to a whole one."""
        return seconds_of(self.now + timedelta(seconds=seconds, microseconds=999999))

    def plan(self) -> Plan:
        """All that was decided."""
        progress = self.status.progress
        self.set(state=state_of(self.status), display=progress and Display.of(progress))
        return Plan(
            apply=self._apply,
            suspend=self._suspend,
            delete=self._delete,
            status=self.status,
            events=self._events,
            requeue_after=self._requeue_after,
            inquiries=tuple(self._inquiries),
            stop=self._stop,
            remove=self._remove,
            trusted_seconds=self._trusted_seconds,
        )


def attempt_of(pod: Manifest) -> int:
    """The number of the attempt that a worker pod belongs to."""
    return int(pod["metadata"].get("labels", {}).get(ATTEMPT_LABEL, 0))
