"""Start the operator: no arguments, settings from KUBETUNE_* variables, JSON logs, SIGTERM ends it cleanly."""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import kopf

from kubetune_contract.progress import ProgressReport
from kubetune_operator.cluster import Cluster
from kubetune_operator.errors import OperatorError
from kubetune_operator.handlers import kopf_settings, registry_for, resync, work
from kubetune_operator.metrics import Metrics
from kubetune_operator.progress import (
    ProgressServer,
    ProgressStore,
    health_app,
    keep_certificate_fresh,
    serve,
    server_context,
)
from kubetune_operator.reconciler import Reconciler, keys_of_child
from kubetune_operator.settings import Settings, SettingsError
from kubetune_operator.store import Manifest, Store
from kubetune_operator.tokens import PodIdentity, TokenVerifier
from kubetune_operator.workqueue import WorkQueue

log = logging.getLogger("kubetune_operator")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, severity, logger and message, with the traceback where there is one."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Operator:
    """All parts of the operator, wired together."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.store = Store(settings.operator_name)
        self.queue = WorkQueue(settings.debounce_seconds)
        self.progress = ProgressStore(settings.progress_write_seconds)
        self.cluster: Cluster | None = None
        self.watching = asyncio.Event()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, which kopf takes."""
        self.cluster = await Cluster.connect(self.settings.watch_namespace, self.child_changed)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.cluster.close)
            await self._serve(stack)
            self._start(stack, self.cluster.run())
            self._start(stack, self._count())
            self._start(stack, self._work(self.cluster))
            await self._watch()
        log.info("stopped")

    async def _work(self, cluster: Cluster) -> None:
        """Reconcile, once everything that exists is known."""
        reconciler = Reconciler(cluster, self.store, self.progress, self.settings, self.metrics)
        await cluster.synced()
        log.info("caches are complete")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(resync(cluster, self.store, self.queue, self.settings.resync_seconds))
            for _ in range(self.settings.workers):
                tasks.create_task(work(self.queue, reconciler, self.metrics))

    async def _watch(self) -> None:
        namespace = self.settings.watch_namespace
        await kopf.operator(
            registry=registry_for(self.store, self.queue),
            settings=kopf_settings(),
            ready_flag=self.watching,
            standalone=True,
            clusterwide=namespace is None,
            namespaces=[namespace] if namespace else [],
        )

    async def _serve(self, stack: AsyncExitStack) -> None:
        health = await serve(health_app(self.metrics, self.is_ready), self.settings.metrics_port)
        stack.push_async_callback(health.cleanup)
        certificate, key = self.settings.tls_cert_file, self.settings.tls_key_file
        if certificate is None or key is None:
            log.info("no certificate is set: training runs without progress reports")
            return
        context = server_context(certificate, key)
        assert self.cluster is not None
        authenticate = await self._authenticator(self.cluster)
        server = ProgressServer(authenticate, self.cluster.pods.get, self.take_report)
        endpoint = await serve(server.app(), self.settings.progress_port, context)
        stack.push_async_callback(endpoint.cleanup)
        self._start(stack, keep_certificate_fresh(context, certificate, key))

    async def _authenticator(self, cluster: Cluster) -> Callable[[str], Awaitable[PodIdentity | None]]:
        if self.settings.progress_auth == "TokenReview":
            return cluster.review_token
        verifier = TokenVerifier(cluster.connection)
        try:
            await verifier.refresh()
        except OperatorError as error:
            log.error(
                "training runs without progress reports, whose tokens cannot be checked yet: %s. "
                "Every service account may read the cluster's keys by default: see that ClusterRole "
                "system:service-account-issuer-discovery is bound to system:serviceaccounts",
                error,
            )
        return verifier.identify

    def _start(self, stack: AsyncExitStack, job: Coroutine[Any, Any, None]) -> None:
        """Run in the background until the stack unwinds. A part that breaks ends the process."""
        task = asyncio.create_task(job)
        task.add_done_callback(_end_if_broken)
        stack.push_async_callback(_cancel, task)

    def is_ready(self) -> bool:
        """Whether the caches are complete and FineTuneJobs are watched."""
        return self.watching.is_set() and self.cluster is not None and self.cluster.is_synced

    def child_changed(self, manifest: Manifest) -> None:
        """A child Job or pod has changed: look at the FineTuneJobs that it is about."""
        assert self.cluster is not None
        for key in keys_of_child(manifest, self.cluster.jobs.get):
            self.queue.add(key)

    def take_report(self, namespace: str, name: str, attempt: int, pod_uid: str, report: ProgressReport) -> None:
        """A trainer has reported: show it in the metrics at once, in the status when it is time."""
        key = f"{namespace}/{name}"
        self.metrics.training(namespace, name, report.progress)
        wait = self.progress.put(key, attempt, pod_uid, report, time.monotonic())
        if wait is not None:
            self.queue.add_later(key, wait)

    async def _count(self) -> None:
        while True:
            self.metrics.count_jobs(self.store.states())
            self.metrics.queue_depth.set(len(self.queue))
            await asyncio.sleep(1)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _end_if_broken(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the operator cannot go on", exc_info=error)
        os._exit(1)


def main() -> None:
    """Run the operator."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        for problem in error.problems:
            log.critical("%s", problem)
        sys.exit(2)
    logging.getLogger().setLevel(settings.log_level)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    asyncio.run(Operator(settings).run())


if __name__ == "__main__":
    main()
