"""How the operator serves HTTP: certificates, and clients that are slow, idle or too many.

Every pod of the cluster can reach the progress endpoint, so nobody may hold it up by doing nothing.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from kubetune_operator.metrics import Metrics

RELOAD_SECONDS: Final = 60.0
"""Time between two looks at the certificate's files, which are renewed in place."""
HANDSHAKE_SECONDS: Final = 5.0
"""In which a client must have agreed on TLS."""
REQUEST_SECONDS: Final = 10.0
"""In which a request must have come and been answered."""
IDLE_SECONDS: Final = 15.0
"""A connection without a request for so long is closed, also one that never had any."""
MOST_CONNECTIONS: Final = 2000
"""Idle connections beyond it are closed, the oldest first."""

log = logging.getLogger(__name__)


def health_app(
    metrics: Metrics, not_alive: Callable[[], str | None], not_ready: Callable[[], str | None]
) -> web.Application:
    """/healthz and /readyz, which answer 503 with what is wrong, and /metrics for Prometheus."""

    def probe(wrong: Callable[[], str | None]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            problem = wrong()
            return web.Response(text="ok") if problem is None else web.Response(status=503, text=problem)

        return answer

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/healthz", probe(not_alive))
    app.router.add_get("/readyz", probe(not_ready))
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
    """Serve on all addresses, until the caller cleans the runner up. A client that is too slow is cut off."""
    guard = Guard()
    app.middlewares.append(guard.middleware)
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=IDLE_SECONDS, lingering_time=1.0)
    await runner.setup()
    await _Site(runner, port=port, ssl_context=context).start()
    guard.start(runner)
    return runner


class Guard:
    """Ends requests that take too long, and closes connections on which nothing happens."""

    def __init__(self) -> None:
        self._busy: set[Any] = set()
        self._idle_since: dict[Any, float] = {}

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Handle the request, its body included, in the time that it may take."""
        self._busy.add(request.protocol)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                return await handler(request)
        except TimeoutError:
            return web.Response(status=408, text=f"no whole request in {REQUEST_SECONDS:.0f} s")
        finally:
            self._busy.discard(request.protocol)
            self._idle_since[request.protocol] = time.monotonic()

    def start(self, runner: web.AppRunner) -> None:
        """Close what is idle, every second, until the runner is cleaned up."""
        if runner.server is not None:
            self.close_idle(runner.server.connections, time.monotonic())
            asyncio.get_running_loop().call_later(1.0, self.start, runner)

    def close_idle(self, connections: list[Any], now: float) -> None:
        """Close connections that were idle for too long, and the oldest idle ones if there are too many."""
        idle = {found: self._idle_since.get(found, now) for found in connections if found not in self._busy}
        self._idle_since = dict(idle)
        surplus = max(0, len(connections) - MOST_CONNECTIONS)
        for position, found in enumerate(sorted(idle, key=idle.__getitem__)):
            if (position < surplus or now - idle[found] > IDLE_SECONDS) and found.transport is not None:
                found.transport.abort()


class _Site(web.TCPSite):
    """aiohttp's own, with a shorter time for the handshake."""

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        handshake = HANDSHAKE_SECONDS if self._ssl_context else None
        self._server = await asyncio.get_running_loop().create_server(
            server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=handshake,
        )
