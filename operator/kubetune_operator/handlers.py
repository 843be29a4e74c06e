"""From events to plans to writes: kopf's watch on FineTuneJobs, the reconciler, and the workers that call it.

Every event only names a key. What is done about it follows from what is observed when a worker gets to it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

import kopf

from kubetune_operator.api import GROUP, KIND, PLURAL, VERSION, FineTuneJob, FineTuneJobSpec, FineTuneJobStatus, parse
from kubetune_operator.cluster import Cluster, stage_group, worker_group
from kubetune_operator.diagnosis import is_live
from kubetune_operator.errors import ApiError, InvalidJob, NameTaken, OperatorError
from kubetune_operator.metrics import Metrics
from kubetune_operator.names import (
    ATTEMPT_LABEL,
    JOB_LABEL,
    OPERATOR_LABEL,
    ROLE_LABEL,
    STAGE,
    WORKER,
    config_map_name,
    service_name,
    stage_manager,
    stage_name,
)
from kubetune_operator.plan import Observed, Plan, plan, refuse
from kubetune_operator.progress import ProgressStore
from kubetune_operator.settings import OPERATOR_NAME, Settings
from kubetune_operator.status import is_finished
from kubetune_operator.watch import version
from kubetune_operator.workqueue import WorkQueue

Manifest = dict[str, Any]

KOPF_BACKOFFS: Final = (0.5, *[1.0] * 600)
"""Waits of kopf between requests that fail: its own growing ones cost up to 14 s after an API server's restart."""
LIST_RETRY_SECONDS: Final = 2.0

log = logging.getLogger(__name__)


def key_of(body: Manifest) -> str:
    """namespace/name."""
    return f"{body['metadata']['namespace']}/{body['metadata']['name']}"


class Store:
    """The newest known body of every FineTuneJob that this operator handles."""

    def __init__(self, operator: str = OPERATOR_NAME) -> None:
        self._operator = operator
        self._bodies: dict[str, Manifest] = {}

    def __len__(self) -> int:
        return len(self._bodies)

    def get(self, key: str) -> Manifest | None:
        """The body; None if there is no such FineTuneJob."""
        return self._bodies.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bodies)

    def offer(self, body: Manifest) -> bool:
        """Take a body unless a newer one is known; whether that changed anything."""
        if body["metadata"].get("labels", {}).get(OPERATOR_LABEL, OPERATOR_NAME) != self._operator:
            return self.remove(key_of(body))
        known = self._bodies.get(key_of(body))
        if known is not None and version(known) >= version(body):
            return False
        self._bodies[key_of(body)] = body
        return True

    def remove(self, key: str, uid: str | None = None) -> bool:
        """Forget a FineTuneJob, if it is the one with that uid; whether it was."""
        known = self._bodies.get(key)
        if known is None or (uid is not None and known["metadata"]["uid"] != uid):
            return False
        del self._bodies[key]
        return True

    def states(self) -> list[str]:
        """The state of every FineTuneJob."""
        return [(body.get("status") or {}).get("state", "Pending") for body in self._bodies.values()]

    def needs_staging(self, namespace: str, owner: Manifest) -> bool:
        """Whether the owner of a staging Job still waits for it."""
        body = self._bodies.get(f"{namespace}/{owner['name']}")
        if body is None or body["metadata"]["uid"] != owner["uid"] or body["spec"].get("suspend"):
            return False
        conditions = (body.get("status") or {}).get("conditions") or []
        over = {condition["type"] for condition in conditions if condition["status"] == "True"}
        return not over & {"Staged", "Succeeded", "Failed"}


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
        self._conflicts: dict[str, str] = {}

    async def reconcile(self, key: str) -> float | None:
        """Observe, plan, act, write. Returns after how many seconds time alone may change the plan.

        Raises OperatorError where the API server did not do its part.
        """
        body = self._store.get(key)
        if body is None:
            self._forget(key)
            return None
        decided = self._plan(body)
        if any(manifest["kind"] == "Job" for manifest in decided.apply) and not await self._is_current(body):
            return 0.0
        try:
            await self._act(body, decided)
            self._conflicts.pop(key, None)
        except NameTaken as taken:
            self._conflicts[key] = str(taken)
            decided = self._plan(body)  # which says so, and when to try again
        told = await self._tell(body, decided)
        # What a new status makes possible is planned from it; its event is no news, it was taken in already.
        return self._settings.debounce_seconds if told else decided.requeue_after

    def _plan(self, body: Manifest) -> Plan:
        now = datetime.now(UTC)
        try:
            job = parse(body)
        except InvalidJob as error:
            return refuse(_unread(body), error.problems, self._settings, now)
        return plan(job, self.observe(job), self._settings, now, self._ca_pem())

    def observe(self, job: FineTuneJob) -> Observed:
        """What the caches know of the job's children."""
        jobs, pods = self._cluster.jobs, self._cluster.pods
        name = stage_name(job.spec.model, job.spec.storage.models.claim_name)
        stage, group = jobs.get(job.namespace, name), worker_group(job.namespace, job.name)
        owned = {_attempt(child): child for child in jobs.group(group) if _owner_uid(child) == job.uid}
        gone = [child for child in jobs.gone(group) if _owner_uid(child) == job.uid]
        uids = {child["metadata"]["uid"] for child in (*owned.values(), *gone)}
        report = self._progress.shown(job.key, max(1, job.status.attempt), time.monotonic())
        return Observed(
            stage_job=stage,
            stage_shared=stage is not None and self._is_shared(stage, job),
            stage_pods=[pod for pod in pods.group(stage_group(job.namespace, name)) if _belongs(pod, stage)],
            attempt_jobs=owned,
            pods=[pod for pod in pods.group(group) if _owner_uid(pod) in uids or is_live(pod)],
            gone_pods=[pod for pod in pods.gone(group) if _owner_uid(pod) in uids],
            progress=report,
            conflict=self._conflicts.get(job.key),
        )

    def _is_shared(self, stage: Manifest, job: FineTuneJob) -> bool:
        owners = stage["metadata"].get("ownerReferences") or []
        others = [owner for owner in owners if owner["uid"] != job.uid]
        return any(self._store.needs_staging(job.namespace, owner) for owner in others)

    def _ca_pem(self) -> str:
        file = self._settings.ca_file
        return file.read_text() if file is not None else ""

    async def _is_current(self, body: Manifest) -> bool:
        """Whether the plan rests on the newest body. A Job is created for nothing less."""
        metadata = body["metadata"]
        fresh = await self._cluster.get_finetunejob(metadata["namespace"], metadata["name"])
        if fresh is None:
            self._store.remove(key_of(body), metadata["uid"])
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
                await self._cluster.keep(manifest)
        for suspension in decided.suspend:
            await self._cluster.suspend(namespace, *suspension)
        for deletion in decided.delete:
            await self._cluster.delete(deletion.kind, namespace, deletion.name, deletion.uid)

    async def _tell(self, body: Manifest, decided: Plan) -> bool:
        """Write the status and post the events that explain it, if it changed; whether it did."""
        if decided.status == FineTuneJobStatus.model_validate(body.get("status") or {}):
            return False
        try:
            answer = await self._cluster.write_status(body, decided.status.to_dict())
        except ApiError as error:
            if error.status in (404, 409):
                await self._is_current(body)
            raise
        self._metrics.status_writes.inc()
        self._store.offer(answer)
        if is_finished(decided.status):
            self._metrics.forget(body["metadata"]["namespace"], body["metadata"]["name"])
        for event in decided.events:
            try:
                await self._cluster.post_event(body, event.type, event.reason, event.message)
            except OperatorError as error:  # the conditions say the same: an event is not worth a second try
                log.warning("%s: cannot post event %s: %s", key_of(body), event.reason, error)
        return True

    def _forget(self, key: str) -> None:
        namespace, _, name = key.partition("/")
        self._conflicts.pop(key, None)
        self._progress.forget(key)
        self._metrics.forget(namespace, name)
        self._cluster.forget(namespace, [config_map_name(name), service_name(name)])


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


async def work(queue: WorkQueue, reconciler: Reconciler, metrics: Metrics) -> None:
    """One worker: reconcile key after key until cancelled. No error of one object may stop the others."""
    while True:
        key = await queue.get()
        metrics.queue_depth.set(len(queue))
        started = time.monotonic()
        try:
            again_after = await reconciler.reconcile(key)
        except OperatorError as error:
            metrics.errors.inc()
            log.warning("%s: trying again in %.1f s: %s", key, queue.failed(key), error)
        except Exception:
            metrics.errors.inc()
            log.exception("%s: trying again in %.1f s after an error of our own", key, queue.failed(key))
        else:
            queue.done(key, again_after)
        metrics.reconcile_seconds.observe(time.monotonic() - started)


async def resync(cluster: Cluster, store: Store, queue: WorkQueue, seconds: float) -> None:
    """Look at every FineTuneJob now and every so many seconds, also for what an event should have told.

    Runs until cancelled. Ends with ApiError 404 if there is no such API: kopf would not notice it later.
    """
    while True:
        try:
            take_list(await cluster.list_finetunejobs(), store, queue)
        except OperatorError as error:
            if isinstance(error, ApiError) and error.status == 404:
                log.critical("the API server does not know FineTuneJobs: install the CRD")
                raise
            log.warning("cannot list FineTuneJobs: %s", error)
            await asyncio.sleep(min(seconds, LIST_RETRY_SECONDS))
        else:
            await asyncio.sleep(seconds)


def take_list(bodies: list[Manifest], store: Store, queue: WorkQueue) -> None:
    """Take a complete list of FineTuneJobs: what is not in it is gone."""
    listed = {key_of(body): body for body in bodies}
    for body in bodies:
        store.offer(body)
    for key in list(store):
        if key not in listed:
            store.remove(key)
        queue.add(key)


def registry_for(store: Store, queue: WorkQueue) -> kopf.OperatorRegistry:
    """kopf's part: hear of every change of a FineTuneJob, and leave nothing on it."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry, errors=kopf.ErrorsMode.TEMPORARY)(login)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def on_event(event: Any, **_: Any) -> None:
        take_event(event, store, queue)

    return registry


def take_event(event: Manifest, store: Store, queue: WorkQueue) -> None:
    """Take one event of a FineTuneJob's watch. A new object, or one with a new spec, goes first."""
    body = dict(event["object"])
    key = key_of(body)
    if event["type"] == "DELETED":
        store.remove(key, body["metadata"]["uid"])
        queue.add(key)
        return
    status = body.get("status") or {}
    if store.offer(body):
        queue.add(key, urgent=status.get("observedGeneration") != body["metadata"].get("generation"))


def login(**arguments: Any) -> kopf.ConnectionInfo | None:
    """The same account as the rest of the operator: the pod's, else KUBECONFIG's."""
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)


def kopf_settings() -> kopf.OperatorSettings:
    """kopf without the parts that we do not use."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # the operator may not watch CRDs and namespaces, and need not
    settings.networking.error_backoffs = KOPF_BACKOFFS
    return settings


def _unread(body: Manifest) -> FineTuneJob:
    """The FineTuneJob of a body whose spec is not looked at."""
    metadata = body["metadata"]
    return FineTuneJob(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        deleting="deletionTimestamp" in metadata,
        spec=FineTuneJobSpec.model_construct(),  # type: ignore[call-arg]
        status=FineTuneJobStatus.model_validate(body.get("status") or {}),
    )


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
