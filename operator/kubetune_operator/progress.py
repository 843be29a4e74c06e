"""The endpoint to which trainers report, and what they last said. Also health and metrics, on a port of their own.

A report is taken from a worker pod of the very attempt that it is about, and from nobody else.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web
from pydantic import ValidationError

from kubetune_contract.errors import explain
from kubetune_contract.paths import PROGRESS_PATH
from kubetune_contract.progress import ProgressReport
from kubetune_operator.errors import OperatorError
from kubetune_operator.metrics import Metrics
from kubetune_operator.names import ATTEMPT_LABEL, JOB_LABEL, ROLE_LABEL, WORKER

BODY_LIMIT: Final = 64 * 1024
"""Bytes of one report."""
RELOAD_SECONDS: Final = 60.0
"""Time between two looks at the certificate's files, which are renewed in place."""

log = logging.getLogger(__name__)


class Identity(Protocol):
    """The pod that a token was made for."""

    @property
    def namespace(self) -> str: ...  # noqa: D102
    @property
    def pod(self) -> str: ...  # noqa: D102
    @property
    def uid(self) -> str: ...  # noqa: D102


@dataclass
class _Slot:
    attempt: int
    pod_uid: str
    latest: ProgressReport
    shown: ProgressReport
    shown_at: float


class ProgressStore:
    """The reports of all jobs, in memory. What is shown changes at most once in `interval` seconds per job.

    Times are any clock's seconds that only go forward.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._slots: dict[str, _Slot] = {}

    def put(self, key: str, attempt: int, pod_uid: str, report: ProgressReport, now: float) -> float | None:
        """Take a report. Returns in how many seconds the job should be looked at; None if it tells nothing new."""
        slot = self._slots.get(key)
        if slot is None or (slot.attempt, slot.pod_uid) != (attempt, pod_uid):
            if slot is not None and slot.attempt > attempt:
                return None
            self._slots[key] = _Slot(attempt, pod_uid, report, report, now)
            return 0.0
        if report.progress.step < slot.latest.progress.step:
            return None
        slot.latest = report
        done = report.progress.step >= report.progress.total_steps
        wait = 0.0 if done else max(0.0, slot.shown_at + self._interval - now)
        if wait == 0.0:
            slot.shown, slot.shown_at = report, now
        return wait

    def shown(self, key: str, attempt: int, now: float) -> ProgressReport | None:
        """The report of that attempt to show now."""
        slot = self._slots.get(key)
        if slot is None or slot.attempt != attempt:
            return None
        if now >= slot.shown_at + self._interval and slot.shown is not slot.latest:
            slot.shown, slot.shown_at = slot.latest, now
        return slot.shown

    def forget(self, key: str) -> None:
        """The job is over or gone."""
        self._slots.pop(key, None)


def may_report(pod: dict[str, Any] | None, identity: Identity, name: str, attempt: int) -> bool:
    """Whether the cached pod is the token's pod and works on that attempt of that job."""
    if pod is None or pod["metadata"]["uid"] != identity.uid:
        return False
    labels = pod["metadata"].get("labels", {})
    wanted = {ROLE_LABEL: WORKER, JOB_LABEL: name, ATTEMPT_LABEL: str(attempt)}
    return all(labels.get(label) == value for label, value in wanted.items())


class ProgressServer:
    """The HTTP side of the store."""

    def __init__(
        self,
        authenticate: Callable[[str], Awaitable[Identity | None]],
        pod_of: Callable[[str, str], dict[str, Any] | None],
        take: Callable[[str, str, int, str, ProgressReport], None],
    ) -> None:
        """`take` gets namespace, name, attempt, the pod's uid and the report."""
        self._authenticate = authenticate
        self._pod_of = pod_of
        self._take = take

    def app(self) -> web.Application:
        """The application behind TLS."""
        app = web.Application(client_max_size=BODY_LIMIT)
        app.router.add_post(PROGRESS_PATH.replace("{attempt}", r"{attempt:\d{1,9}}"), self._report)
        return app

    async def _report(self, request: web.Request) -> web.Response:
        namespace, name, attempt = (
            request.match_info["namespace"],
            request.match_info["name"],
            request.match_info["attempt"],
        )
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            identity = await self._authenticate(token) if scheme == "Bearer" and token else None
        except OperatorError as error:
            log.warning("cannot check a token: %s", error)
            return web.Response(status=503, text="the API server cannot check the token now; try again")
        if identity is None:
            return web.Response(status=401, text="a token of the pod for the progress audience is required")
        pod = self._pod_of(identity.namespace, identity.pod)
        if identity.namespace != namespace or not may_report(pod, identity, name, int(attempt)):
            return web.Response(
                status=403, text=f"pod {identity.namespace}/{identity.pod} does not work on this attempt"
            )
        try:
            report = ProgressReport.model_validate_json(await request.read())
        except ValidationError as error:
            return web.Response(status=400, text="; ".join(explain(error, ProgressReport)))
        self._take(namespace, name, int(attempt), identity.uid, report)
        return web.Response(status=204)


def health_app(metrics: Metrics, is_ready: Callable[[], bool]) -> web.Application:
    """/healthz: the loop turns. /readyz: the caches are complete. /metrics: for Prometheus."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok") if is_ready() else web.Response(status=503, text="the caches are being filled")

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    return app


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS with the mounted certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context


async def keep_certificate_fresh(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Load the certificate again when its file changes, for connections made from then on. Runs until cancelled."""
    loaded = certificate.stat().st_mtime_ns
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        try:
            changed = certificate.stat().st_mtime_ns
            if changed != loaded:
                context.load_cert_chain(certificate, key)
                loaded = changed
        except (OSError, ssl.SSLError) as error:
            log.warning("cannot load the renewed certificate %s: %s", certificate, error)


async def serve(app: web.Application, port: int, context: ssl.SSLContext | None = None) -> web.AppRunner:
    """Serve on all addresses; the caller cleans the runner up."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port, ssl_context=context).start()
    return runner
