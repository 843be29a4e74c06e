"""Start the operator: no arguments, settings from KUBETUNE_* variables, JSON logs, SIGTERM ends it cleanly."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

import kubetune_operator.lean  # noqa: F401 - before what it keeps small

# isort: split
import kopf

from kubetune_contract.progress import ProgressReport
from kubetune_operator.cluster import Cluster, LeaseObject
from kubetune_operator.connection import Connection
from kubetune_operator.endpoint import health_app, keep_certificate_fresh, serve, server_context
from kubetune_operator.errors import OperatorError
from kubetune_operator.handlers import kopf_settings, registry_for, resync, work
from kubetune_operator.health import Vitals, not_alive, not_ready
from kubetune_operator.lease import Election
from kubetune_operator.logs import JsonFormatter
from kubetune_operator.metrics import Metrics, standing
from kubetune_operator.progress import ProgressServer, ProgressStore, Relay
from kubetune_operator.reconciler import Reconciler, keys_of_child
from kubetune_operator.settings import Settings, SettingsError
from kubetune_operator.store import Manifest, Store
from kubetune_operator.tokens import PodIdentity, TokenVerifier
from kubetune_operator.workqueue import WorkQueue

FINISH_SECONDS: Final = 2.0
"""How long a replica that stops waits for its workers, and for the answer to the Lease that it gives back."""
LOST: Final = 1
"""Exit code of a replica that has lost the Lease; its pod starts it again, as a standby."""

log = logging.getLogger("kubetune_operator")


class Operator:
    """All parts of the operator, wired together."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.store = Store(settings.operator_name)
        self.queue = WorkQueue(settings.debounce_seconds)
        self.queue.accepting = False  # until this replica leads
        self.progress = ProgressStore(settings.progress_write_seconds)
        self.cluster: Cluster | None = None
        self.leads: Callable[[], bool] = lambda: False
        self.led_since = float("-inf")
        self.watching = asyncio.Event()
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. The caller ends the process: some parts still run."""
        settings = self.settings
        connection = await Connection.open(self.metrics.called)
        lease = LeaseObject(connection, settings.namespace, settings.lease_name)
        election = Election(lease, identity_of(settings), address_of(settings))
        connection.may_write = self.leads = election.leads
        self.cluster = Cluster(connection, settings.watch_namespace, self.child_changed)
        self.cluster.jobs.restarted = self.metrics.watch_of("jobs")
        self.cluster.pods.restarted = self.metrics.watch_of("pods")
        self.metrics.leader.set_function(lambda: float(election.leads()))
        await self._serve(self.cluster, election)
        lead = asyncio.create_task(self._lead(self.cluster, election))
        tasks = {lead, *(asyncio.create_task(part) for part in (self.cluster.run(), self._count(), self._watch()))}
        stopped = asyncio.create_task(self.stopping.wait())
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for broken in done - {stopped}:
            broken.result()  # raises what broke it; no part ends by itself
            raise RuntimeError("a part of the operator has ended")
        await self._finish()
        lead.cancel()  # a renewal would take back what is given back
        await self._give_back(connection, election)

    async def _lead(self, cluster: Cluster, election: Election) -> None:
        """Wait for the caches, then for the Lease; reconcile until it is lost."""
        await cluster.synced()
        log.info("caches are complete")
        await election.acquire()
        log.info("this replica leads", extra={"holder": election.identity})
        self.led_since = time.monotonic()
        self.queue.accepting = True
        reconciler = Reconciler(cluster, self.store, self.progress, self.settings, self.metrics)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(resync(cluster, self.store, self.queue, self.settings.resync_seconds))
            for _ in range(self.settings.workers):
                tasks.create_task(work(self.queue, reconciler, self.metrics))
            why = await election.keep()
            log.critical("this replica leads no more, and ends: %s", why, extra={"holder": election.identity})
            logging.shutdown()
            os._exit(LOST)  # at once: what is under way must not be written

    async def _finish(self) -> None:
        """Let workers finish what they have."""
        self.queue.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(FINISH_SECONDS):
                while self.queue.busy:
                    await asyncio.sleep(0.01)

    async def _give_back(self, connection: Connection, election: Election) -> None:
        """Let another replica lead at once."""
        connection.may_write = lambda: False
        try:
            async with asyncio.timeout(FINISH_SECONDS):
                await election.release()
        except (OperatorError, TimeoutError) as error:
            log.warning("cannot give the Lease back: %s", str(error) or "no answer in time")
        log.info("stopped")

    async def _watch(self) -> None:
        namespace = self.settings.watch_namespace
        tasks = await kopf.spawn_tasks(
            registry=registry_for(self.store, self.queue),
            settings=kopf_settings(),
            ready_flag=self.watching,
            standalone=True,
            clusterwide=namespace is None,
            namespaces=[namespace] if namespace else [],
        )
        # In place of kopf's own: it would take 5 s to end, and end our tasks before they have given the Lease back.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stopping.set)
        await kopf.run_tasks(tasks)

    async def _serve(self, cluster: Cluster, election: Election) -> None:
        health = health_app(self.metrics, lambda: not_alive(self.vitals()), lambda: not_ready(self.vitals()))
        await serve(health, self.settings.metrics_port)
        settings = self.settings
        certificate, key, authority, url = (
            settings.tls_cert_file,
            settings.tls_key_file,
            settings.ca_file,
            settings.progress_url,
        )
        if certificate is None or key is None or authority is None or url is None:
            log.info("no certificate is set: training runs without progress reports")
            return
        context = server_context(certificate, key)
        server = ProgressServer(
            await self._authenticator(cluster),
            cluster.pods.get,
            self.take_report,
            relay=Relay(lambda: election.leader_address, authority, urlsplit(url).hostname or ""),
            leads=election.leads,
            told=self.metrics.reported,
        )
        await serve(server.app(), settings.progress_port, context)
        self._refresh = asyncio.create_task(keep_certificate_fresh(context, certificate, key))

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

    def vitals(self) -> Vitals:
        """Signs of life of all parts."""
        now, cluster = time.monotonic(), self.cluster
        assert cluster is not None
        return Vitals(
            synced=self.watching.is_set() and cluster.is_synced,
            leads=self.leads(),
            answered=now - cluster.connection.answered,
            heard={"jobs": now - cluster.jobs.heard, "pods": now - cluster.pods.heard},
            listed=now - max(cluster.listed, self.led_since),
            resync=self.settings.resync_seconds,
            working=self.queue.working,
            waiting=self.queue.waiting,
        )

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
            self.metrics.count_jobs(standing(status) for status in self.store.statuses())
            self.metrics.keep(self.store.trainings())
            self.metrics.queue_depth.set(len(self.queue))
            await asyncio.sleep(1)


def identity_of(settings: Settings) -> str:
    """The name under which this replica holds the Lease."""
    return settings.pod_name or f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


def address_of(settings: Settings) -> str | None:
    """host:port at which the other replicas reach this one's progress endpoint."""
    if settings.pod_ip is None or settings.tls_cert_file is None:
        return None
    host = f"[{settings.pod_ip}]" if ":" in settings.pod_ip else settings.pod_ip
    return f"{host}:{settings.progress_port}"


async def _run(settings: Settings) -> None:
    code = 0
    try:
        await Operator(settings).run()
    except Exception:
        log.critical("the operator cannot go on", exc_info=True)
        code = 1
    logging.shutdown()
    os._exit(code)  # nothing is left to be saved, and kopf would take seconds to end


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
    asyncio.run(_run(settings))


if __name__ == "__main__":
    main()
