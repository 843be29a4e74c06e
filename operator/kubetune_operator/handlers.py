"""From events to keys: kopf's watch on FineTuneJobs, the full passes over them, and the workers that reconcile.

Every event only names a key.
"""

import asyncio
import logging
import time
from typing import Any, Final

import kubetune_operator.lean  # noqa: F401 - before what it keeps small

# isort: split
import kopf

from kubetune_operator.api import GROUP, PLURAL, VERSION
from kubetune_operator.cluster import Cluster
from kubetune_operator.errors import ApiError, OperatorError, retry_after
from kubetune_operator.metrics import Metrics
from kubetune_operator.reconciler import Reconciler
from kubetune_operator.store import Manifest, Store, key_of
from kubetune_operator.watch import version
from kubetune_operator.workqueue import WorkQueue

KOPF_BACKOFFS: Final = (0.5, *[1.0] * 600)
"""Waits of kopf between requests that fail: its own growing ones cost up to 14 s after an API server's restart."""
LIST_RETRY_SECONDS: Final = 2.0

log = logging.getLogger(__name__)


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
            wait = queue.failed(key, retry_after(error))
            log.warning("%s: trying again in %.1f s: %s", key, wait, error, extra=_about(key, started, wait))
        except Exception:
            metrics.errors.inc()
            wait = queue.failed(key)
            about = _about(key, started, wait)
            log.exception("%s: trying again in %.1f s after an error of our own", key, wait, extra=about)
        else:
            queue.done(key, again_after)
        metrics.reconcile_seconds.observe(time.monotonic() - started)


def _about(key: str, started: float, wait: float) -> dict[str, object]:
    """What a program may look for in a log line about a reconcile."""
    return {"job": key, "duration": round(time.monotonic() - started, 3), "wait": round(wait, 3)}


async def resync(cluster: Cluster, store: Store, queue: WorkQueue, seconds: float) -> None:
    """Look at every FineTuneJob now and every so many seconds, also for what an event should have told.

    Runs until cancelled. Ends with ApiError 404 if there is no such API: kopf would not notice it later.
    """
    while True:
        try:
            take_list(*await cluster.list_finetunejobs(), store, queue)
        except OperatorError as error:
            if isinstance(error, ApiError) and error.status == 404:
                log.critical("the API server does not know FineTuneJobs: install the CRD")
                raise
            log.warning("cannot list FineTuneJobs: %s", error)
            await asyncio.sleep(max(min(seconds, LIST_RETRY_SECONDS), retry_after(error)))
        else:
            await asyncio.sleep(seconds)


def take_list(bodies: list[Manifest], listed_at: int, store: Store, queue: WorkQueue) -> None:
    """Take the complete list of FineTuneJobs of one version: what is older than that and not in it is gone."""
    listed = {key_of(body): body for body in bodies}
    for body in bodies:
        store.offer(body)
    for key in list(store):
        known = store.get(key)
        if key not in listed and known is not None and version(known) <= listed_at:
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
        store.bury(body)
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
