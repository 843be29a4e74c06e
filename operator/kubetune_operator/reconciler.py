"""From a key to writes: observe, plan, act, tell.

What is done follows from what is observed when a worker gets to the key, and from nothing that led there.
"""

import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from kubetune_operator.api import KIND, FineTuneJob, FineTuneJobSpec, FineTuneJobStatus, parse
from kubetune_operator.cluster import Cluster, stage_group, worker_group
from kubetune_operator.contents import contents
from kubetune_operator.decision import StageView
from kubetune_operator.diagnosis import is_live
from kubetune_operator.errors import ApiError, InvalidJob, NameTaken, OperatorError, UnknownFields, Unreachable
from kubetune_operator.eventbook import EventBook
from kubetune_operator.gathering import Gathering
from kubetune_operator.metrics import Metrics, standing
from kubetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_LABEL,
    ROLE_LABEL,
    STAGE,
    WORKER,
    config_map_name,
    job_name,
    service_name,
    stage_manager,
    stage_name,
)
from kubetune_operator.obstacles import Obstacle, refusal
from kubetune_operator.plan import Observed, Plan, leave, plan, refuse
from kubetune_operator.progress import ProgressStore
from kubetune_operator.settings import Settings
from kubetune_operator.status import is_finished
from kubetune_operator.store import Store, key_of
from kubetune_operator.watch import version

Manifest = dict[str, Any]

log = logging.getLogger(__name__)


class Reconciler:
    """Brings one FineTuneJob at a time one step further."""

    def __init__(
        self, cluster: Cluster, store: Store, progress: ProgressStore, settings: Settings, metrics: Metrics
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._progress = progress
        self._settings = settings
        self._metrics = metrics
        self._uids: dict[str, str] = {}
        """Of the FineTuneJobs that the other memories are about: a namesake may come within a second."""
        self._conflicts: dict[str, str] = {}
        self._unposted: dict[str, Plan] = {}
        """Plans whose status may have been written, although no answer came."""
        self._refusals: dict[str, Obstacle] = {}
        self._events = EventBook(cluster.read_events)
        self._reports_since: datetime | None = None
        self._gathering = Gathering(settings.progress_write_seconds)
        self._ca: tuple[tuple[int, int, int], str] | None = None
        """The text of `ca_file`, and the file (inode, time, size) that it was read from."""

    async def reconcile(self, key: str) -> float | None:
        """Observe, plan, act, write. Returns after how many seconds time alone may change the plan.

        Raises OperatorError where the API server did not do its part.
        """
        self._reports_since = self._reports_since or datetime.now(UTC)
        body = self._store.get(key)
        if body is None or self._uids.setdefault(key, body["metadata"]["uid"]) != body["metadata"]["uid"]:
            self._forget(key)
        if body is None:
            return None
        before = _status(body)
        await self._look_twice(body, before)
        decided = self._plan(body)
        if await self._events.read(key, decided.inquiries):
            decided = self._plan(body)
        if any(manifest["kind"] == "Job" for manifest in decided.apply) and not await self._is_current(body):
            return 0.0
        try:
            await self._act(body, decided)
            if self._is_free_again(key):
                decided = self._plan(body)
        except NameTaken as taken:
            self._conflicts[key] = str(taken)
            decided = self._plan(body)  # which says so, and when to try again
        except ApiError as error:
            if not is_refusal(error) or not _creates_job(decided):
                raise  # to be tried again, ever more seldom
            self._refusals[key] = refusal(error.message)
            decided = self._plan(body)
        wait = self._gathering.wait(key, before, decided.status)
        if wait:
            return sooner(wait, sooner(decided.requeue_after, self._events.due(key)))
        told = await self._tell(body, before, decided)
        # What a new status makes possible is planned from it; its event is no news, it was taken in already.
        return self._settings.debounce_seconds if told else sooner(decided.requeue_after, self._events.due(key))

    async def _look_twice(self, body: Manifest, status: FineTuneJobStatus) -> None:
        """An attempt whose Job is gone is lost: not before the API server itself says that it is gone."""
        metadata = body["metadata"]
        if status.attempt_start_time is None or is_finished(status):
            return
        namespace, name = metadata["namespace"], job_name(metadata["name"], status.attempt)
        if self._cluster.jobs.get(namespace, name) is None:
            await self._cluster.find_job(namespace, name)

    def _is_free_again(self, key: str) -> bool:
        """Whether what was refused before has just been done."""
        conflict, refused = self._conflicts.pop(key, None), self._refusals.pop(key, None)
        return conflict is not None or refused is not None

    def _plan(self, body: Manifest) -> Plan:
        now = datetime.now(UTC)
        try:
            job = parse(body)
        except UnknownFields as error:
            return leave(_unread(body), error.problems, self._settings, now)
        except InvalidJob as error:
            return refuse(_unread(body), error.problems, self._settings, now)
        return plan(job, self.observe(job), self._settings, now, self._ca_pem())

    def observe(self, job: FineTuneJob) -> Observed:
        """What the caches know of the job's children."""
        jobs, pods = self._cluster.jobs, self._cluster.pods
        group = worker_group(job.namespace, job.name)
        owned = {_attempt(child): child for child in jobs.group(group) if _owner_uid(child) == job.uid}
        gone = [child for child in jobs.gone(group) if _owner_uid(child) == job.uid]
        uids = {child["metadata"]["uid"] for child in (*owned.values(), *gone)}
        report = self._progress.shown(job.key, max(1, job.status.attempt), time.monotonic())
        return Observed(
            stages=dict(self._stages(job)),
            attempt_jobs=owned,
            pods=[pod for pod in pods.group(group) if _owner_uid(pod) in uids or is_live(pod)],
            gone_pods=[pod for pod in pods.gone(group) if _owner_uid(pod) in uids],
            progress=report,
            reports_since=self._reports_since,
            conflict=self._conflicts.get(job.key),
            refused=self._refusals.get(job.key),
            events=self._events.known(job.key),
        )

    def _stages(self, job: FineTuneJob) -> Iterator[tuple[str, StageView]]:
        for content in contents(job.spec):
            name = stage_name(job.spec, content)
            stage = self._cluster.jobs.get(job.namespace, name)
            if stage is not None:
                pods = self._cluster.pods.group(stage_group(job.namespace, name))
                own = [pod for pod in pods if _belongs(pod, stage)]
                yield name, StageView(stage, own, self._is_shared(stage, job))

    def _is_shared(self, stage: Manifest, job: FineTuneJob) -> bool:
        owners = stage["metadata"].get("ownerReferences") or []
        others = [owner for owner in owners if owner["uid"] != job.uid]
        return any(self._store.needs_staging(job.namespace, owner) for owner in others)

    def _ca_pem(self) -> str:
        """The authority's certificates, read again only when the file is another one: each plan needs them."""
        file = self._settings.ca_file
        if file is None:
            return ""
        found = file.stat()
        seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        if self._ca is None or self._ca[0] != seen:
            self._ca = (seen, file.read_text())
        return self._ca[1]

    async def _is_current(self, body: Manifest) -> bool:
        """Whether the plan rests on the newest body. A Job is created for nothing less."""
        metadata = body["metadata"]
        fresh = await self._cluster.get_finetunejob(metadata["namespace"], metadata["name"])
        if fresh is None:
            self._store.bury(body)
            return False
        self._store.offer(fresh)
        return version(fresh) == version(body)

    async def _act(self, body: Manifest, decided: Plan) -> None:
        namespace = body["metadata"]["namespace"]
        creates = any(_role(manifest) == WORKER for manifest in decided.apply if manifest["kind"] == "Job")
        for manifest in decided.apply:
            if manifest["kind"] == "Job" and _role(manifest) != WORKER:
                await self._cluster.share(manifest, stage_manager(_unread(body)))
            elif creates:
                await self._cluster.create(manifest)
            else:
                await self._cluster.keep(manifest, decided.trusted_seconds)
        for suspension in decided.suspend:
            await self._cluster.suspend(namespace, *suspension)
        for stop in decided.stop:
            await self._cluster.stop(namespace, *stop)
        for removal in decided.remove:
            await self._cluster.remove(removal.kind, namespace, removal.name, body["metadata"]["uid"])
        for deletion in decided.delete:
            # A FineTuneJob goes as it was planned with: somebody may just have given it more time to live.
            exactly = body["metadata"]["resourceVersion"] if deletion.kind == KIND else None
            await self._cluster.delete(deletion.kind, namespace, deletion.name, deletion.uid, exactly)

    async def _tell(self, body: Manifest, before: FineTuneJobStatus, decided: Plan) -> bool:
        """Write the status and post the events that explain it, if it changed; whether it did."""
        key = key_of(body)
        if decided.status == before:
            unposted = self._unposted.pop(key, None)
            if unposted is not None and unposted.status == decided.status:
                await self._post(body, unposted)
            return False
        try:
            answer = await self._cluster.write_status(body, decided.status.to_dict())
        except ApiError as error:
            if error.status in (404, 409):
                await self._is_current(body)
            raise
        except Unreachable:
            self._unposted[key] = decided
            raise
        self._unposted.pop(key, None)
        self._metrics.status_writes.inc()
        self._metrics.told(before, decided.status)
        self._store.offer(answer)
        self._log(body, before, decided.status)
        if is_finished(decided.status):
            self._metrics.forget(body["metadata"]["namespace"], body["metadata"]["name"])
        await self._post(body, decided)
        return True

    async def _post(self, body: Manifest, decided: Plan) -> None:
        for event in decided.events:
            try:
                await self._cluster.post_event(body, event.type, event.reason, event.message)
            except OperatorError as error:  # the conditions say the same: an event is not worth a second try
                log.warning("%s: cannot post event %s: %s", key_of(body), event.reason, error)

    def _log(self, body: Manifest, before: FineTuneJobStatus, status: FineTuneJobStatus) -> None:
        """A line for each change of a job's state."""
        state, reason = standing(status.to_dict())
        if state != before.state:
            about = {"job": key_of(body), "attempt": status.attempt, "state": state, "reason": reason}
            if status.start_time is not None and status.completion_time is not None:
                about["duration"] = (status.completion_time - status.start_time).total_seconds()
            log.info("%s is %s (%s)", key_of(body), state, reason, extra=about)

    def _forget(self, key: str) -> None:
        namespace, _, name = key.partition("/")
        self._uids.pop(key, None)
        self._unposted.pop(key, None)
        self._conflicts.pop(key, None)
        self._refusals.pop(key, None)
        self._events.forget(key)
        self._gathering.forget(key)
        self._progress.forget(key)
        self._metrics.forget(namespace, name)
        self._cluster.forget(namespace, [config_map_name(name), service_name(name)])


def is_refusal(error: ApiError) -> bool:
    """Whether somebody must change something before the same request can succeed: spec, quota, admission, rights."""
    known = ("failed calling webhook", "failed to create typed patch object")  # which come as errors of the server
    return error.status in (400, 403, 422) or any(words in error.message for words in known)


def sooner(one: float | None, other: float | None) -> float | None:
    """The sooner of two times to look again, of which either may be never."""
    return min((seconds for seconds in (one, other) if seconds is not None), default=None)


def keys_of_child(manifest: Manifest, stage_job_of: Callable[[str, str], Manifest | None]) -> list[str]:
    """The FineTuneJobs that a child Job or pod is about."""
    metadata = manifest["metadata"]
    namespace, labels = metadata["namespace"], metadata.get("labels", {})
    if labels.get(ROLE_LABEL) != STAGE:
        return [f"{namespace}/{labels[JOB_LABEL]}"] if JOB_LABEL in labels else []
    if manifest.get("kind") != "Job" and _owner_kind(manifest) == "Job":
        stage = stage_job_of(namespace, labels.get("batch.kubernetes.io/job-name", ""))
        return keys_of_child(stage, stage_job_of) if stage is not None else []
    owners = metadata.get("ownerReferences") or []
    return [f"{namespace}/{owner['name']}" for owner in owners if owner["kind"] == KIND]


def _creates_job(decided: Plan) -> bool:
    """Whether the plan has a Job to create; others only join one."""
    return any(manifest["kind"] == "Job" and "spec" in manifest for manifest in decided.apply)


def _unread(body: Manifest) -> FineTuneJob:
    """The FineTuneJob of a body whose spec is not looked at."""
    return FineTuneJob.of(body, FineTuneJobSpec.model_construct())  # type: ignore[call-arg]


def _status(body: Manifest) -> FineTuneJobStatus:
    return FineTuneJobStatus.model_validate(body.get("status") or {})


def _role(manifest: Manifest) -> str | None:
    role: str | None = manifest["metadata"].get("labels", {}).get(ROLE_LABEL)
    return role


def _attempt(child: Manifest) -> int:
    return int(child["metadata"]["labels"][ATTEMPT_LABEL])


def _controller(child: Manifest) -> Manifest:
    owners = child["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), {})


def _owner_uid(child: Manifest) -> str | None:
    return _controller(child).get("uid")


def _owner_kind(child: Manifest) -> str | None:
    return _controller(child).get("kind")


def _belongs(pod: Manifest, job: Manifest | None) -> bool:
    return job is not None and _owner_uid(pod) == job["metadata"]["uid"]
